"""Resampling (Bricken et al. 2023, "Towards Monosemanticity"): dead features begin anew, where the error is large."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitbench.dictionaries.base import Dictionary

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_ENCODER_SHARE = 0.2


def badly_reconstructed(
    error: Float[Tensor, "n d_out"], count: int, seed: int, step: int
) -> Int[Tensor, " at_most_count"]:
    """Rows, each at most once, drawn with a probability that grows as the square of their squared error.

    Args:
        error: what is left over of each row.
        count: how many rows; fewer are returned if fewer have an error.
        seed: of the run. The draw depends on it and on the step alone.
        step: of the run.
    """
    weights = error.double().pow(2).sum(1).pow(2).cpu()
    count = min(count, int((weights > 0).sum()))
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=error.device)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF_FFFF)
    return torch.multinomial(weights, count, generator=generator).to(error.device)


@torch.no_grad()
def resample(
    dictionary: Dictionary,
    fresh: Dictionary,
    optimizer: torch.optim.Optimizer,
    x: Float[Tensor, "n d_in"],
    target: Float[Tensor, "n d_out"],
    dead: Int[Tensor, " n_dead"],
    *,
    seed: int,
    step: int,
    scale: float | None = None,
) -> Int[Tensor, " n_resampled"]:
    """Point dead features at what is left over of badly reconstructed rows, and forget their moments.

    A feature's decoder row becomes the direction of what is left over of one row, its encoder the same direction (a
    transcoder's: that of the input, seen from the mean), `scale` times as long as the encoders of living features are
    on average. Everything else that belongs to the feature is as at the beginning.

    Args:
        dictionary: changed in place.
        fresh: the same dictionary as it was at the beginning.
        optimizer: Adam over its parameters.
        x: rows.
        target: what is to be reconstructed of them.
        dead: the features.
        seed: of the run.
        step: of the run.
        scale: 0.2 if not given, as in the paper; 1 for kinds that choose the k largest, where a short encoder would
            never be chosen.

    Returns:
        The features that were changed: all of them, unless fewer rows have an error.
    """
    code = dictionary.encode_sparse(x)
    error = target - dictionary.reconstruct(x, code)
    rows = badly_reconstructed(error, len(dead), seed, step)
    dead = dead[: len(rows)]
    if len(dead) == 0:
        return dead
    alive = torch.ones(dictionary.d_dict, dtype=torch.bool, device=dead.device)
    alive[dead] = False
    lengths = dictionary.W_enc.norm(dim=0)
    length = lengths[alive].mean() if alive.any() else fresh.W_enc.norm(dim=0).mean()
    length *= scale if scale is not None else (1.0 if hasattr(dictionary, "k") else _ENCODER_SHARE)
    written = F.normalize(error[rows], dim=1)
    mean = x.mean(0)
    read = F.normalize(x[rows] - mean, dim=1) if dictionary.transcodes else written
    own = dict(fresh.named_parameters())
    for name, parameter in dictionary.named_parameters():
        if name == "W_enc":
            parameter.T[dead] = (length * read).to(parameter)
        elif name == "W_dec":
            parameter[dead] = (written * own[name][dead].norm(dim=1, keepdim=True)).to(parameter)
        elif name in ("b_dec", "W_skip"):
            continue
        else:
            parameter[dead] = own[name][dead]
            if dictionary.transcodes and name in ("b_enc", "b_gate"):
                parameter[dead] = -(mean.to(parameter) @ dictionary.W_enc[:, dead])
        for moment in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state.get(parameter, {})
            if moment in state:
                (state[moment].T if name == "W_enc" else state[moment])[dead] = 0
    return dead
