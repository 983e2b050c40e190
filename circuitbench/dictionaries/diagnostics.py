"""What the activations say before training: how far their mean is from 0, and how many features that would cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

_POINTS, _REACH = 4001, 12.0  # of the integral over a Gaussian


def outlier_severity(mean: Float[Tensor, " d"], variance: Float[Tensor, " d"]) -> float:
    """γ = ‖μ‖ / ‖σ‖ (arXiv:2605.31518): the length of the mean row over the root of the summed variances.

    It does not change with the scale of the activations, and is 0 for centred ones.

    Args:
        mean: of each component.
        variance: of each component.
    """
    return (mean.double().norm() / variance.double().sum().sqrt()).item()


def dead_at_start(gamma: float, n_rows: int) -> float:
    """The share of features that would be active on none of `n_rows`, if their input were not centred.

    Of a random direction w, w·x has a mean of about ‖μ‖·u/√d and a standard deviation of about ‖σ‖/√d, with u from a
    standard normal distribution. In Gaussian activations the feature is silent on all rows with probability
    Φ(−γ·u) to the power of `n_rows`; this is the mean over u.
    """
    u = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    weight = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
    silent = torch.exp(n_rows * torch.special.log_ndtr(-gamma * u))
    return torch.trapezoid(silent * weight, u).item()


def said(gamma: float, n_rows: int) -> str:
    """What is told before training."""
    share = dead_at_start(gamma, n_rows)
    return (
        f"activations: γ = |mean| / |standard deviation| = {gamma:.2f}; seen from 0, about {share:.1%} of random "
        f"features would be active on none of {n_rows} rows (arXiv:2605.31518); b_dec starts at the mean, which "
        "takes this cause of dead features away"
    )
