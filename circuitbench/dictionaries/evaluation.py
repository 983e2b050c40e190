"""How good a dictionary is: what it leaves unexplained of held-out activations, and what running on it costs the model.

Definitions, over the rows x of held-out activations with mean x̄ and reconstructions x̂; of a transcoder, x is what it
reconstructs.

* FVU, fraction of variance unexplained: Σ‖x − x̂‖² / Σ‖x − x̄‖². Explained variance is 1 − FVU.
* Explained variance, legacy: the mean over rows of 1 − ‖x − x̂‖² / ‖x − x̄‖², where x̄ is the mean of the batch of rows
  at hand, as SAELens and SAEBench have it: rows near the mean count more, and it depends on the batch.
* MSE: the mean of (x − x̂)² over rows and components.
* Cosine: of x and x̂, the mean over rows. L2: the lengths of x and of x̂, means over rows; the L2 ratio is the mean of
  ‖x̂‖ / ‖x‖.
* Relative reconstruction bias (Rajamanoharan et al. 2024, arXiv:2404.16014): E‖x̂‖² / E[x̂·x]; below 1 where the
  reconstruction is too short.
* L0: active features a row, the mean; a feature is active where its activation is not 0, which in all kinds but
  "abstopk" is greater than 0. L1: the sum of the sizes of a row's activations, the mean.
* Density of a feature: the share of rows on which it is active. Dead share: the share of features active on none.
* Max encoder (decoder) cosine: the largest cosine of a feature's encoder column (decoder row) with another feature's,
  the mean over features.
* CE: the model's mean loss a token, in nats. CE recovered: (CE ablated − CE spliced) / (CE ablated − CE clean): 1 if
  running on the reconstruction costs nothing, 0 if it costs as much as replacing the site by zeros (or by its mean).
* KL: of the model's next-token distributions, clean from spliced (or from ablated), in nats, mean over tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.splicing import (
    Batch,
    Splice,
    recovered,
    splice,
    summed_cross_entropy,
    summed_kl,
)
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "Batch",
    "Reconstruction",
    "Splice",
    "max_cosine_within",
    "reconstruction",
    "recovered",
    "splice",
    "summed_cross_entropy",
    "summed_kl",
]


@dataclass(frozen=True)
class Reconstruction:
    """How well a dictionary reconstructs held-out activations; the module's docstring defines every number.

    Attributes:
        n_rows: rows they were measured on.
        density: `(d_dict,)`, of every feature.
        fvu_by_site: of each site of a crosscoder; empty for others.
    """

    n_rows: int
    fvu: float
    explained_variance_legacy: float
    mse: float
    cosine: float
    l2_in: float
    l2_out: float
    l2_ratio: float
    relative_bias: float
    l0: float
    l1: float
    dead_share: float
    max_encoder_cosine: float
    max_decoder_cosine: float
    density: Float[Tensor, " d_dict"]
    fvu_by_site: Mapping[str, float] = field(default_factory=dict)

    @property
    def explained_variance(self) -> float:
        """1 − FVU."""
        return 1.0 - self.fvu

    def denser_than(self, share: float) -> float:
        """The share of features that are active on more than this share of the rows."""
        return (self.density > share).double().mean().item()

    def histogram(self, bins_per_decade: int = 4) -> tuple[list[float], list[int]]:
        """Densities in logarithmic bins, without the dead features.

        Returns:
            Edges, as log₁₀ of the density, ascending and ending at 0; and how many features lie from each edge up to
            the next, a density of 1 among the last.
        """
        if bins_per_decade < 1:
            raise BadInput(f"bins_per_decade={bins_per_decade} was given; it must be at least 1.")
        lowest = -int(torch.tensor(float(self.n_rows)).log10().mul(bins_per_decade).ceil())
        edges = [bin / bins_per_decade for bin in range(min(lowest, -1), 1)]
        logs = self.density[self.density > 0].double().log10()
        # A feature of one row in n has the density 1/n, which rounding must not put below the first edge.
        places = (logs * bins_per_decade + 1e-5).floor().long().clamp(int(edges[0] * bins_per_decade), -1)
        counts = torch.bincount(places - round(edges[0] * bins_per_decade), minlength=len(edges) - 1)
        return edges, counts.tolist()


@torch.no_grad()
def reconstruction(
    dictionary: Dictionary,
    activations: Tensor | Iterable[Tensor],
    targets: Tensor | Iterable[Tensor] | None = None,
    *,
    batch_size: int = 4096,
) -> Reconstruction:
    """Measure a dictionary on held-out activations.

    Args:
        dictionary: the dictionary.
        activations: a tensor `(n, d_in)` or an iterable of them.
        targets: `(n, d_out)`, what a transcoder should make of them, cut like `activations`.
        batch_size: rows at once.

    Raises:
        BadInput: no rows, the wrong size, targets missing or without a transcoder, values that are not finite, or no
            variance to explain.
    """
    if dictionary.transcodes != (targets is not None):
        raise BadInput(
            "a transcoder is judged by what it reconstructs: give targets (n, d_out), beside activations (n, d_in)."
            if dictionary.transcodes
            else "targets were given, and this dictionary reconstructs what it reads; leave them out."
        )
    sums = _Sums(dictionary)
    for x, target in _batches(activations, targets, batch_size):
        sums.add(dictionary, x.to(dictionary.W_enc), target.to(dictionary.W_enc))
    return sums.result(dictionary)


def _batches(
    activations: Tensor | Iterable[Tensor], targets: Tensor | Iterable[Tensor] | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, targets) of `batch_size` rows, however the input was cut; the last ones up to twice as many."""
    held: list[tuple[Tensor, Tensor]] = []
    n_held = 0
    for x, target in _pairs(activations, targets):
        if x.ndim != 2 or target.ndim != 2 or len(x) != len(target):
            given = f"{tuple(x.shape)}" if target is x else f"{tuple(x.shape)} and {tuple(target.shape)}"
            raise BadInput(
                f"activations have shape {given}; give rows (n, d_in), as `.flatten(0, -2)` makes them, and as many "
                "targets (n, d_out) if any."
            )
        held.append((x, target))
        n_held += len(x)
        while n_held >= 2 * batch_size:
            rows, wanted = (torch.cat(parts) for parts in zip(*held, strict=True))
            yield rows[:batch_size], wanted[:batch_size]
            held, n_held = [(rows[batch_size:], wanted[batch_size:])], n_held - batch_size
    if n_held:
        rows, wanted = (torch.cat(parts) for parts in zip(*held, strict=True))
        yield rows, wanted


def _pairs(
    activations: Tensor | Iterable[Tensor], targets: Tensor | Iterable[Tensor] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    rows = [activations] if isinstance(activations, Tensor) else activations
    if targets is None:
        yield from ((x, x) for x in rows)
    else:
        yield from zip(rows, [targets] if isinstance(targets, Tensor) else targets, strict=True)


class _Sums:
    """What is summed over rows, in double precision."""

    def __init__(self, dictionary: Dictionary) -> None:
        device = dictionary.W_dec.device
        self.n = 0
        self.l0 = self.l1 = self.legacy = self.cosine = self.l2_in = self.l2_out = self.ratio = 0.0
        self.length = self.along = 0.0
        self.n_long = 0
        self.error, self.total, self.squares = torch.zeros(3, dictionary.d_out, dtype=torch.float64, device=device)
        self.fired = torch.zeros(dictionary.d_dict, dtype=torch.int64, device=device)

    def add(self, dictionary: Dictionary, x: Tensor, target: Tensor) -> None:
        code = dictionary.encode_sparse(x)
        estimate, target = dictionary.reconstruct(x, code).double(), target.double()
        if estimate.shape != target.shape:
            raise BadInput(
                f"the dictionary reconstructs {estimate.shape[1]} components, and the targets have {target.shape[1]}."
            )
        error = (target - estimate).pow(2)
        self.n += len(x)
        self.error += error.sum(0)
        self.total += target.sum(0)
        self.squares += target.pow(2).sum(0)
        self.fired += torch.bincount(code.active_features(), minlength=dictionary.d_dict)
        self.l0 += (code.values != 0).sum().item()
        self.l1 += code.values.double().abs().sum().item()
        self.legacy += (1 - error.sum(1) / (target - target.mean(0)).pow(2).sum(1)).sum().item()
        self.cosine += F.cosine_similarity(target, estimate, dim=1, eps=1e-30).sum().item()
        before, after = target.norm(dim=1), estimate.norm(dim=1)
        self.l2_in += before.sum().item()
        self.l2_out += after.sum().item()
        self.ratio += (after / before)[before > 0].sum().item()
        self.n_long += int((before > 0).sum())
        self.length += after.pow(2).sum().item()
        self.along += (target * estimate).sum().item()

    def result(self, dictionary: Dictionary) -> Reconstruction:
        if self.n == 0:
            raise BadInput("there are no held-out activations; an iterator may have been read before.")
        # Rounding leaves a little of components that never change.
        variance = (self.squares - self.total**2 / self.n).clamp_min(0)
        if not variance.sum() > 1e-12 * self.squares.sum() or not torch.isfinite(self.error).all():
            raise BadInput(
                "the held-out activations are all the same row, or not finite; nothing can be measured on them."
            )
        return Reconstruction(
            n_rows=self.n,
            fvu=(self.error.sum() / variance.sum()).item(),
            explained_variance_legacy=self.legacy / self.n,
            mse=self.error.mean().item() / self.n,
            cosine=self.cosine / self.n,
            l2_in=self.l2_in / self.n,
            l2_out=self.l2_out / self.n,
            l2_ratio=self.ratio / self.n_long,
            relative_bias=self.length / self.along if self.along else float("nan"),
            l0=self.l0 / self.n,
            l1=self.l1 / self.n,
            dead_share=(self.fired == 0).double().mean().item(),
            max_encoder_cosine=max_cosine_within(dictionary.W_enc.T).mean().item(),
            max_decoder_cosine=max_cosine_within(dictionary.W_dec).mean().item(),
            density=(self.fired / self.n).cpu(),
            fvu_by_site=self._by_site(dictionary.blocks, variance),
        )

    def _by_site(self, blocks: Mapping[str, int], variance: Tensor) -> dict[str, float]:
        widths = list(blocks.values())
        parts = zip(blocks, self.error.split(widths), variance.split(widths), strict=True) if widths else ()
        return {address: (error.sum() / spread.sum()).item() for address, error, spread in parts}


def max_cosine_within(directions: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The largest cosine of each direction with another one of them, sign kept; blockwise. −1 where it is alone."""
    units = F.normalize(directions.detach(), dim=1)
    best = []
    for start in range(0, len(units), 2048):
        cosines = units[start : start + 2048] @ units.T
        cosines.diagonal(start).fill_(-1)
        best.append(cosines.amax(1))
    return torch.cat(best).double()
