"""What a dictionary found of a known truth; what is here is handed on by `dictionaries.synthetic`.

Definitions. A true feature and a latent belong together where the one-to-one assignment with the largest sum of cosines
between true directions and decoder rows puts them together.

* MMCS: the largest cosine of a true direction with a decoder row, the mean over true features.
* Recovered: the share of true features whose largest cosine is above 0.9.
* Precision, recall, F1 of a true feature: of "its latent is active" as a detector of "it is active", over rows. Means
  over the true features that were active on at least one row; a feature without a latent, or whose latent is never
  active, has 0.
* Shrinkage: over recovered features and rows on which both the feature and its latent are active, the sum of the
  latent's activations (times the length of its decoder row) over the sum of the true ones; 1 is none, below 1 the
  activations are too small.
* Absorption (Chanin et al. 2024, arXiv:2409.14507): over pairs of a true parent and its child, and rows on which the
  child is active (so the parent is), the share on which the child's latent is active and the parent's is not.
* Of a kind whose activations have a sign ("abstopk"), a latent stands for its decoder row or for the opposite one,
  whichever fits: cosines are without sign, and the latent is active where its activation has the sign that fits.
* FVU, L0 and dead share as in `dictionaries.evaluation`, on the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitbench.dictionaries.matching import assign, max_cosines
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from circuitbench.dictionaries.base import Dictionary
    from circuitbench.dictionaries.synthetic import Truth

RECOVERED = 0.9


@dataclass(frozen=True)
class Scores:
    """What a dictionary found of a known truth; every number is defined at the top of `dictionaries.recovery`.

    Attributes:
        shrinkage: NaN where no feature was recovered.
        absorption: NaN for a truth without a hierarchy.
        true_l0: true features active on a row, the mean.
        n_rows: rows that all but MMCS and recovered were measured on.
    """

    mmcs: float
    recovered: float
    f1: float
    precision: float
    recall: float
    fvu: float
    l0: float
    dead_share: float
    shrinkage: float
    absorption: float
    true_l0: float
    n_rows: int


@torch.no_grad()
def score(
    dictionary: Dictionary, truth: Truth, *, n: int = 16_384, seed: int = 1_000_003, batch_size: int = 4096
) -> Scores:
    """Compare a dictionary with the truth that it was trained on.

    Args:
        dictionary: of rows of `truth`, reconstructing them.
        truth: the truth.
        n: fresh rows on which activity is compared.
        seed: of these rows; another than that of the rows it was trained on.
        batch_size: rows at once.

    Raises:
        BadInput: a dictionary of another size, or no rows.
    """
    if (dictionary.d_in, dictionary.d_out) != (truth.d_in, truth.d_in):
        raise BadInput(
            f"the dictionary is from {dictionary.d_in} to {dictionary.d_out}, and rows of this truth have "
            f"{truth.d_in} components."
        )
    if n < 1 or batch_size < 1:
        raise BadInput(f"n={n} and batch_size={batch_size} were given; both must be at least 1.")
    device = dictionary.W_dec.device
    directions = truth.directions.to(device)
    rows = dictionary.W_dec
    best = max_cosines(directions, torch.cat([rows, -rows]) if dictionary.signed else rows)[0]
    latent, side = _partners(directions, rows, dictionary.signed)
    has_latent = latent >= 0
    lengths = side * rows.double().norm(dim=1)[latent]
    counts = _Counts(truth, dictionary)
    n_rows = 0
    while n_rows < n:
        rows = min(batch_size, n - n_rows)
        x, activations = (part.to(device) for part in truth.sample(rows, seed + n_rows))
        x = x.to(dictionary.W_dec)
        features = dictionary.encode(x)
        counts.reconstruction(x, dictionary.decode(features), features)
        counts.detection(activations, (features[:, latent] * has_latent).double() * lengths)
        n_rows += rows
    return counts.scores(best, n_rows)


def _partners(directions: Tensor, W_dec: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The latent of each true feature, −1 where there are too few; and 1, or −1 where it is the opposite that fits."""
    cosines = F.normalize(directions.double(), dim=1) @ F.normalize(W_dec.double(), dim=1).T
    if not signed:
        return assign(cosines), cosines.new_ones(len(cosines))
    latent = assign(cosines.abs())
    return latent, torch.where(cosines.gather(1, latent.clamp_min(0)[:, None])[:, 0] < 0, -1.0, 1.0).to(cosines)


class _Counts:
    """Sums over rows."""

    def __init__(self, truth: Truth, dictionary: Dictionary) -> None:
        device = dictionary.W_dec.device
        self.children = (truth.parent >= 0).nonzero().squeeze(1).to(device)
        self.parents = truth.parent.to(device)[self.children]
        # Both active, only the truth, only the latent; and the sums of activations where both are.
        self.both, self.missed, self.wrong, self.found_sum, self.true_sum = torch.zeros(
            5, truth.n_features, dtype=torch.float64, device=device
        )
        self.absorbed = self.with_child = self.error = self.l0 = 0.0
        self.total, self.squares = torch.zeros(2, truth.d_in, dtype=torch.float64, device=device)
        self.fired = torch.zeros(dictionary.d_dict, dtype=torch.int64, device=device)

    def reconstruction(self, x: Tensor, estimate: Tensor, features: Tensor) -> None:
        self.error += (x.double() - estimate.double()).pow(2).sum().item()
        self.total += x.double().sum(0)
        self.squares += x.double().pow(2).sum(0)
        self.fired += (features != 0).sum(0)
        self.l0 += (features != 0).sum().item()

    def detection(self, true: Tensor, found: Tensor) -> None:
        is_true, is_found = true > 0, found > 0
        both = is_true & is_found
        self.both += both.sum(0)
        self.missed += (is_true & ~is_found).sum(0)
        self.wrong += (is_found & ~is_true).sum(0)
        self.found_sum += (found * both).sum(0)
        self.true_sum += (true.double() * both).sum(0)
        self.absorbed += (both[:, self.children] & ~is_found[:, self.parents]).sum().item()
        self.with_child += is_true[:, self.children].sum().item()

    def scores(self, best: Tensor, n_rows: int) -> Scores:
        variance = (self.squares - self.total**2 / n_rows).sum().item()
        if not variance > 0:
            raise BadInput("the rows are all the same; give more rows than 1.")
        active = self.both + self.missed
        seen = active > 0
        if not seen.any():
            raise BadInput(f"no true feature was active on {n_rows} rows; give a larger n.")
        precision = self.both / (self.both + self.wrong).clamp_min(1)
        recall = self.both / active.clamp_min(1)
        f1 = 2 * self.both / (2 * self.both + self.missed + self.wrong).clamp_min(1)
        known = best > RECOVERED
        return Scores(
            mmcs=best.mean().item(),
            recovered=known.double().mean().item(),
            f1=f1[seen].mean().item(),
            precision=precision[seen].mean().item(),
            recall=recall[seen].mean().item(),
            fvu=self.error / variance,
            l0=self.l0 / n_rows,
            dead_share=(self.fired == 0).double().mean().item(),
            shrinkage=(self.found_sum[known].sum() / self.true_sum[known].sum()).item(),
            absorption=self.absorbed / self.with_child if self.with_child else float("nan"),
            true_l0=active.sum().item() / n_rows,
            n_rows=n_rows,
        )
