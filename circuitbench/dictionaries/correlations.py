"""Features of two dictionaries, of one model or of two, matched by what they respond to: on the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from circuitbench.activations import ActivationStream
from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.sparse import SparseCode
from circuitbench.errors import BadInput
from circuitbench.tracing.features import site_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from circuitbench.activations.text import Text
    from circuitbench.models import Model

_ROWS = 2048  # of the table of correlations at once
_PAIRS = 2**22  # products of two active features at once


@dataclass(frozen=True)
class Mppc:
    """For each feature of a dictionary, the feature of another one that is most correlated with it.

    Attributes:
        correlation: `(d_a,)`, Pearson's over tokens; NaN for a feature whose activation never changes.
        partner: `(d_a,)`, which feature of the other one; −1 where there is none.
        baseline: `(d_a,)`, what the same search finds where there is nothing to find; None if it was not asked for.
        n_rows: tokens.
    """

    correlation: Float[Tensor, " d_a"]
    partner: Int[Tensor, " d_a"]
    baseline: Float[Tensor, " d_a"] | None
    n_rows: int

    @property
    def mean(self) -> float:
        """The mean over the features that are active at all (or not always the same)."""
        return self.correlation.nanmean().item()

    @property
    def excess(self) -> float:
        """The mean of correlation − baseline over the same features: what is more than chance, or than geometry."""
        if self.baseline is None:
            raise BadInput('no baseline was computed; call mppc with baseline="shuffled" or "rotated".')
        return (self.correlation - self.baseline).nanmean().item()


Baseline = Literal["shuffled", "rotated"]


@torch.no_grad()
def mppc(
    a: Dictionary,
    activations_a: Tensor | Iterable[Tensor],
    b: Dictionary,
    activations_b: Tensor | Iterable[Tensor],
    *,
    baseline: Baseline | None = "shuffled",
    batch_size: int = 4096,
    seed: int = 0,
) -> Mppc:
    """Max pairwise Pearson correlation (Wang et al. 2024, arXiv:2410.06672) of the features of `a` with those of `b`.

    Not symmetric: every feature of `a` gets its best partner in `b`. Takes 8 · d_a · d_b bytes, twice that with a
    baseline, whatever the number of tokens.

    Args:
        a: a dictionary.
        activations_a: `(n, d_in)` of `a`, or an iterable of them.
        b: another one, perhaps of another model.
        activations_b: at the same tokens in the same order, cut in the same way.
        baseline: what the correlations are to be compared with. A maximum over many features is large by chance alone.
            "shuffled": the tokens of `b` in another order within each batch: chance, at the same densities. "rotated":
            `b` reads its activations after a random rotation (around its b_dec): random directions of the same space.
        batch_size: rows at once.
        seed: of the baseline.

    Raises:
        BadInput: activations of different tokens, fewer than two rows, or a kind whose activations have a sign.
    """
    if baseline not in (None, "shuffled", "rotated"):
        raise BadInput(f'baseline={baseline!r} was given; it is "shuffled", "rotated" or None.')
    if a.signed or b.signed:
        raise BadInput(
            'activations of an "abstopk" dictionary have a sign, and which one says nothing; compare one direction at '
            "a time: give dictionary.two_sided()."
        )
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(b.d_in, b.d_in, generator=generator, dtype=torch.float64))[0].to(b.W_enc)
    found, chance = _Correlations(a.d_dict, b.d_dict), _Correlations(a.d_dict, b.d_dict) if baseline else None
    for x_a, x_b in _at_once(activations_a, activations_b, batch_size):
        code_a, x_b = a.encode_sparse(x_a.to(a.W_enc)), x_b.to(b.W_enc)
        found.add(code_a, b.encode_sparse(x_b))
        if chance is not None and baseline == "shuffled":
            order = torch.randperm(len(x_b), generator=generator).to(x_b.device)
            chance.add(code_a, b.encode_sparse(x_b[order]))
        elif chance is not None:
            center = 0 if b.b_in is None else b.b_in
            chance.add(code_a, b.encode_sparse((x_b - center) @ rotation + center))
    correlation, partner = found.best()
    return Mppc(correlation, partner, None if chance is None else chance.best()[0], found.n)


def _at_once(
    a: Tensor | Iterable[Tensor], b: Tensor | Iterable[Tensor], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    parts_a, parts_b = ([x] if isinstance(x, Tensor) else x for x in (a, b))
    for x_a, x_b in zip(parts_a, parts_b, strict=True):
        if x_a.ndim != 2 or x_b.ndim != 2 or len(x_a) != len(x_b):
            raise BadInput(
                f"activations of shapes {tuple(x_a.shape)} and {tuple(x_b.shape)} were given; they must be (n, d_in) "
                "with one row for each of the same n tokens."
            )
        yield from zip(x_a.split(batch_size), x_b.split(batch_size), strict=True)


class _Correlations:
    """Sums over tokens from which the correlation of every pair follows; in double precision."""

    def __init__(self, d_a: int, d_b: int) -> None:
        self.n = 0
        self.products = torch.zeros(d_a, d_b, dtype=torch.float64)
        self.sums = [torch.zeros(d, dtype=torch.float64) for d in (d_a, d_b)]
        self.squares = [torch.zeros(d, dtype=torch.float64) for d in (d_a, d_b)]

    def add(self, a: SparseCode, b: SparseCode) -> None:
        """Take in the codes of the same tokens, at the cost of the pairs that are active together."""
        self.n += a.n
        for place, code in enumerate((a, b)):
            values, columns = code.values.double().cpu(), code.columns.cpu()
            self.sums[place].index_add_(0, columns, values)
            self.squares[place].index_add_(0, columns, values.pow(2))
        values_a, columns_a, rows = a.values.double().cpu(), a.columns.cpu(), a.rows.cpu()
        values_b, columns_b, starts = b.values.double().cpu(), b.columns.cpu(), b.row_starts.cpu()
        partners = starts.diff()[rows]  # how many entries of b each entry of a meets
        for part in torch.arange(len(rows)).split(max(1, _PAIRS // max(1, int(starts.diff().max())))):
            counts = partners[part]
            left = part.repeat_interleave(counts)
            within = torch.arange(len(left)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
            right = starts[rows[left]] + within
            place = columns_a[left] * self.products.shape[1] + columns_b[right]
            self.products.view(-1).index_add_(0, place, values_a[left] * values_b[right])

    def best(self) -> tuple[Float[Tensor, " d_a"], Int[Tensor, " d_a"]]:
        """For each feature of a the largest correlation, and with which one; NaN and −1 where there is none."""
        if self.n < 2:
            raise BadInput(f"a correlation needs at least two tokens; there are {self.n}.")
        deviations = []
        for sums, squares in zip(self.sums, self.squares, strict=True):
            variance = squares - sums**2 / self.n
            # What rounding leaves of a constant is not a variance.
            deviations.append(torch.where(variance > 1e-12 * squares, variance, torch.nan).sqrt())
        values, columns = [], []
        for start in range(0, len(self.products), _ROWS):
            rows = slice(start, start + _ROWS)
            covariance = self.products[rows] - self.sums[0][rows, None] * self.sums[1] / self.n
            correlation = (covariance / deviations[0][rows, None] / deviations[1]).nan_to_num(nan=-2.0)
            best = correlation.max(1)
            values.append(best.values)
            columns.append(best.indices)
        correlation, partner = torch.cat(values), torch.cat(columns)
        nothing = correlation < -1.5
        return correlation.masked_fill(nothing, torch.nan), partner.masked_fill(nothing, -1)


def mppc_on_text(
    a: tuple[Model, Dictionary],
    b: tuple[Model, Dictionary],
    text: Text,
    *,
    baseline: Baseline | None = "shuffled",
    context: int = 256,
    prompts_per_forward: int = 16,
    seed: int = 0,
) -> Mppc:
    """`mppc` of two dictionaries, each with the model whose site it reads, on one text.

    Args:
        a: a model and its dictionary.
        b: another, or the same model with another dictionary; it must make the same token ids of the text.
        text: as for `ActivationStream`.
        baseline: as in `mppc`.
        context: tokens the models read at once.
        prompts_per_forward: sequences of that size a forward.
        seed: of the baseline.

    Raises:
        BadInput: the models read the text as different tokens; a dictionary without a site, or of another size.
    """
    text = list(text) if isinstance(text, Iterator) else text  # it is read by both
    streams = []
    for model, dictionary in (a, b):
        address = site_of(dictionary, None)
        stream = ActivationStream(model, address, text, context=context, sequences_per_forward=prompts_per_forward)
        if stream.widths()[address] != dictionary.d_in:
            raise BadInput(
                f"the dictionary reads {dictionary.d_in} components, and {address} has {stream.widths()[address]}; "
                "give each dictionary with the model it was trained on."
            )
        streams.append(stream)
    batches = []
    for number, ((ids, _), (other, _)) in enumerate(zip(*(s.forwards() for s in streams), strict=False)):
        if ids.shape != other.shape or not torch.equal(ids, other):
            raise BadInput(
                f"the two models read the text as different tokens (forward {number}); features can be compared token "
                "by token only where both have the same tokenizer."
            )
        batches.append(ids)
    if any(s.counts().tokens != sum(ids.numel() for ids in batches) for s in streams):
        raise BadInput("the two models read the text as different numbers of tokens; they need the same tokenizer.")

    def rows(stream: ActivationStream) -> Iterator[Tensor]:
        for ids in batches:
            keep = streams[0].kept(ids) & streams[1].kept(ids)
            yield stream.read(ids)[stream.sites[0]][keep]

    return mppc(a[1], rows(streams[0]), b[1], rows(streams[1]), baseline=baseline, seed=seed)
