"""What a dictionary is trained to make small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitbench.dictionaries.base import Dictionary, Objective, Step
from circuitbench.dictionaries.sparse import SparseCode
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def squared_error(x: Float[Tensor, "n d"], reconstruction: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The squared distance between a row and its reconstruction, mean over rows."""
    return (x - reconstruction).pow(2).sum(1).mean()


def error_and_auxk(
    dictionary: Dictionary,
    x: Float[Tensor, "n d_in"],
    target: Float[Tensor, "n d_out"],
    code: SparseCode,
    step: Step,
) -> Objective:
    """The squared error as a share of variance, plus `auxk_weight` · AuxK: what kinds with a fixed L0 make small."""
    reconstruction = dictionary.reconstruct(x, code)
    fvu = squared_error(target, reconstruction) / dictionary.d_out
    parts, loss = {"fvu": fvu.detach()}, fvu
    if len(step.dead) and step.options["auxk_weight"]:
        aux = auxk(dictionary, x, step.dead, target=target, reconstruction=reconstruction.detach())
        parts["auxk"], loss = aux.detach(), loss + step.options["auxk_weight"] * aux
    return Objective(loss, reconstruction.detach(), code.detach(), parts)


def auxk(
    dictionary: Dictionary,
    x: Float[Tensor, "n d_in"],
    dead: Bool[Tensor, " d_dict"] | Int[Tensor, " n_dead"],
    *,
    target: Float[Tensor, "n d_out"] | None = None,
    reconstruction: Float[Tensor, "n d_out"] | None = None,
    k_aux: int | None = None,
) -> Float[Tensor, ""]:
    """AuxK (Gao et al. 2024, arXiv:2406.04093, A.2): how badly the dead features explain what the live ones leave over.

    What is left over, target − reconstruction, is a constant: the gradient reaches the encoder and the decoder of the
    dead features, and `b_dec`.

    Args:
        dead: a mask over features, or their indices.
        target: what is reconstructed: x itself, where it is not given.
        reconstruction: of the target by the dictionary; computed where it is not given.
        k_aux: how many dead features may be active on a row: d_in / 2 where it is not given, as in the paper.

    Returns:
        The squared error of the dead features' estimate, as a share of the variance of what is left over; 0 if none
        is dead.

    Raises:
        BadInput: the mask has another length than d_dict, or an index is out of range.
    """
    dead = _indices(dead, dictionary.d_dict)
    if len(dead) == 0:
        return x.new_zeros(())
    with torch.no_grad():
        left_over = (x if target is None else target) - (dictionary(x) if reconstruction is None else reconstruction)
        variance = (left_over - left_over.mean(0)).pow(2).sum()
    k_aux = min(dictionary.d_in // 2 if k_aux is None else k_aux, len(dead))
    values = dictionary.preactivations(x, dead)
    if k_aux < len(dead):
        largest = values.topk(k_aux, dim=1, sorted=False)
        values = torch.zeros_like(values).scatter(1, largest.indices, largest.values)
    estimate = values.relu() @ dictionary.W_dec[dead]
    return (left_over - estimate).pow(2).sum() / variance.clamp_min(torch.finfo(x.dtype).tiny)


def _indices(features: Tensor, d_dict: int) -> Tensor:
    if features.dtype == torch.bool:
        if features.shape != (d_dict,):
            raise BadInput(f"the mask of dead features has shape {tuple(features.shape)}; it must be ({d_dict},).")
        return features.nonzero().squeeze(1)
    if len(features) and (int(features.min()) < 0 or int(features.max()) >= d_dict):
        raise BadInput(f"a dead feature's index is out of range; the features are 0 to {d_dict - 1}.")
    return features
