"""Activations with known sparse features: the ground truth that a dictionary should recover."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def planted(
    n: int, *, d_in: int, n_features: int, active: int, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """`n` rows, each the sum of about `active` of `n_features` unit directions with weights in (0.5, 1.5), and a mean.

    Returns (rows, directions).
    """
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(n_features, d_in, generator=generator), dim=1)
    mean = 3 * torch.randn(d_in, generator=generator)
    on = torch.rand(n, n_features, generator=generator) < active / n_features
    weights = on * (0.5 + torch.rand(n, n_features, generator=generator))
    return scale * (weights @ directions + mean), directions


def mean_max_cosine(truth: Tensor, found: Tensor) -> float:
    """MMCS: for every true feature the cosine with the closest found one, mean over true features."""
    return (F.normalize(truth, dim=1) @ F.normalize(found, dim=1).T).amax(1).mean().item()
