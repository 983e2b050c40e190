"""Sparse probing: how much of a concept a few features of a dictionary hold (Gurnee et al. 2023, arXiv:2305.01610).

A k-sparse probe is a logistic regression on k features: those whose mean activation differs most between the two
classes of the training rows, in units of their standard deviation there. A dictionary whose features mean something
needs few. The baseline is a logistic regression on everything the site holds: what there is to be found.

The regressions are penalised by λ/2·‖w‖² a row, on inputs of mean 0 and standard deviation 1, and are solved to their
one minimum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.splice_run import check_widths, rows_at, sites_read
from circuitbench.errors import BadInput
from circuitbench.tracing import capture

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from circuitbench.models import Model


@dataclass(frozen=True)
class ProbeScore:
    """How well a probe tells the classes apart on held-out rows.

    Attributes:
        accuracy: share of rows on the right side of the threshold 0.
        auroc: how often a positive row scores above a negative one; ties count half.
        f1: of the positive class.
        features: which features it reads; empty for the baseline.
    """

    accuracy: float
    auroc: float
    f1: float
    features: tuple[int, ...] = ()


@dataclass(frozen=True)
class SparseProbe:
    """Sparse probes of one concept, and what they are to be compared with.

    Attributes:
        by_k: k -> the probe on k features.
        baseline: the probe on all that the site holds.
        majority: accuracy of always saying the more frequent class of the held-out rows.
        n_train: rows that probes were fitted on.
        n_test: held-out rows.
    """

    by_k: dict[int, ProbeScore]
    baseline: ProbeScore
    majority: float
    n_train: int
    n_test: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        found = asdict(self)
        return found | {"by_k": {str(k): asdict(score) for k, score in self.by_k.items()}}

    def __str__(self) -> str:
        lines = [f"{self.n_train} rows to fit, {self.n_test} held out; the majority is {self.majority:.3f}"]
        named = {f"k = {k}": score for k, score in self.by_k.items()} | {"all of the site": self.baseline}
        lines += [f"{n}: accuracy {s.accuracy:.3f}, AUROC {s.auroc:.3f}, F1 {s.f1:.3f}" for n, s in named.items()]
        return "\n".join(lines)


@torch.no_grad()
def sparse_probe(
    dictionary: Dictionary,
    activations: Float[Tensor, "n d_in"],
    labels: Bool[Tensor, " n"],
    *,
    ks: Sequence[int] = (1, 2, 5, 10),
    test_share: float = 0.25,
    penalty: float = 1e-3,
    seed: int = 0,
) -> SparseProbe:
    """Probe a dictionary's features for a concept.

    Args:
        dictionary: the dictionary.
        activations: of its site, one row an example.
        labels: whether the concept is there.
        ks: numbers of features.
        test_share: of the rows, held out: the same share of each class.
        penalty: λ.
        seed: of which rows are held out.

    Raises:
        BadInput: other numbers of labels than of rows, fewer than two rows of a class on either side, or a k out of
            range.
    """
    if activations.ndim != 2 or labels.shape != activations.shape[:1] or labels.dtype != torch.bool:
        raise BadInput(
            f"activations {tuple(activations.shape)} and labels {labels.dtype} {tuple(labels.shape)} were given; give "
            "rows (n, d_in) and one true or false for each."
        )
    x = activations.to(dictionary.W_enc)
    return _probes(_encoded(dictionary, x), x, labels, ks, test_share, penalty, seed)


@torch.no_grad()
def probe_texts(
    dictionary: Dictionary,
    model: Model,
    texts: Sequence[str],
    labels: Iterable[bool] | Sequence[Iterable[bool]],
    *,
    site: str | None = None,
    ks: Sequence[int] = (1, 2, 5, 10),
    test_share: float = 0.25,
    penalty: float = 1e-3,
    seed: int = 0,
) -> SparseProbe:
    """`sparse_probe` of labelled texts.

    Args:
        dictionary: the dictionary.
        model: the model it was trained on.
        texts: examples.
        labels: one for each text, of which the means over tokens are probed, of features as of activations; or for each
            text one for each of its tokens.
        site: where the dictionary belongs; default: the site it was trained on.
        ks: as in `sparse_probe`, and so are
        test_share: this,
        penalty: this,
        seed: this.

    Raises:
        BadInput: as `sparse_probe`; other numbers of labels than of texts or tokens.
    """
    given = list(labels)
    if len(given) != len(texts):
        raise BadInput(f"{len(texts)} texts came with {len(given)} labels; give one for each text.")
    reads = sites_read(model, dictionary, site)
    found = capture(model, list(texts), reads)
    lengths = found.lengths.tolist()
    by_token = [isinstance(label, Iterable) for label in given]
    if any(by_token) != all(by_token):
        raise BadInput("some labels are of texts and some of tokens; give all of one sort.")
    real = torch.arange(max(lengths)) < found.lengths[:, None]
    rows = rows_at(found, reads, real)
    check_widths(dictionary, rows.shape[1], dictionary.d_out, reads, reads)
    x = rows.to(dictionary.W_enc)
    code = _encoded(dictionary, x)
    if not all(by_token):
        code, x = (torch.stack([part.mean(0) for part in parts.split(lengths)]) for parts in (code, x))
        return _probes(code, x, torch.tensor([bool(label) for label in given]), ks, test_share, penalty, seed)
    flat: list[bool] = []
    for number, (own, length) in enumerate(zip(given, lengths, strict=True)):
        of_tokens = [bool(label) for label in own]  # pyright: ignore[reportGeneralTypeIssues]
        if len(of_tokens) != length:
            raise BadInput(f"text {number} has {length} tokens and {len(of_tokens)} labels; give one for each token.")
        flat += of_tokens
    return _probes(code, x, torch.tensor(flat), ks, test_share, penalty, seed)


def _encoded(dictionary: Dictionary, x: Tensor) -> Float[Tensor, "n d_dict"]:
    return torch.cat([dictionary.encode(rows) for rows in x.split(4096)])


def _probes(
    code: Float[Tensor, "n d_dict"],
    x: Float[Tensor, "n d_in"],
    labels: Bool[Tensor, " n"],
    ks: Sequence[int],
    test_share: float,
    penalty: float,
    seed: int,
) -> SparseProbe:
    """Probes on features, and on what they are features of."""
    if not ks or min(ks) < 1 or max(ks) > code.shape[1]:
        raise BadInput(f"ks={list(ks)} were given; each must lie between 1 and d_dict = {code.shape[1]}.")
    if not 0 < test_share < 1 or penalty <= 0:
        raise BadInput(f"test_share={test_share} and penalty={penalty}: the first lies between 0 and 1, both above 0.")
    y = labels.to(x.device)
    test = _held_out(y, test_share, seed)
    order = _ranked(code[~test], y[~test])

    def fitted(inputs: Tensor, features: tuple[int, ...] = ()) -> ProbeScore:
        scores = _scores(inputs[~test], y[~test], inputs[test], penalty)
        return ProbeScore(*_judged(scores, y[test]), features)

    by_k = {k: fitted(code[:, order[:k]], tuple(order[:k].tolist())) for k in ks}
    share = y[test].double().mean().item()
    return SparseProbe(by_k, fitted(x), max(share, 1 - share), int((~test).sum()), int(test.sum()))


def _held_out(y: Tensor, share: float, seed: int) -> Bool[Tensor, " n"]:
    """The same share of each class, at random."""
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in (True, False):
        of_class = (y.cpu() == label).nonzero().squeeze(1)
        count = round(share * len(of_class))
        if count < 2 or len(of_class) - count < 2:
            raise BadInput(
                f"{len(of_class)} of {len(y)} rows are labelled {label}; at least two of each class must be left to "
                f"fit and two to test, at test_share={share}."
            )
        test[of_class[torch.randperm(len(of_class), generator=generator)[:count]]] = True
    return test.to(y.device)


def _ranked(code: Tensor, y: Tensor) -> Int[Tensor, " d_dict"]:
    """Features by how far apart their means in the two classes are, in standard deviations."""
    code = code.double()
    apart = (code[y].mean(0) - code[~y].mean(0)).abs() / code.std(0).clamp_min(1e-12)
    return apart.argsort(descending=True, stable=True)


@torch.enable_grad()
def _scores(train: Tensor, y: Tensor, test: Tensor, penalty: float) -> Float[Tensor, " n_test"]:
    """Fit a logistic regression, and its log-odds on other rows; in double precision."""
    mean, std = train.double().mean(0), train.double().std(0)
    scale = torch.where(std > 1e-12, std, 1.0)
    inputs, others = (train.double() - mean) / scale, (test.double() - mean) / scale
    weights = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64, device=inputs.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    wanted = y.double()

    def closure() -> Tensor:
        solver.zero_grad()
        logits = inputs @ weights[1:] + weights[0]
        loss = F.binary_cross_entropy_with_logits(logits, wanted) + penalty / 2 * weights[1:].pow(2).sum()
        torch.autograd.backward(loss)
        return loss

    solver.step(closure)
    assert weights.grad is not None  # the closure ran
    return (others @ weights[1:] + weights[0]).detach()


def _judged(scores: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Accuracy, AUROC and F1."""
    said = scores > 0
    accuracy = (said == y).double().mean().item()
    hits = (said & y).sum().item()
    f1 = 2 * hits / (said.sum().item() + y.sum().item())
    # The rank sum of Mann and Whitney; ties have the mean of their ranks.
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place].double()
    n, m = y.sum().item(), (~y).sum().item()
    return accuracy, (ranks[y].sum().item() - n * (n + 1) / 2) / (n * m), f1
