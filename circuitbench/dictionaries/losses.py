"""What a dictionary is trained to make small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitbench.dictionaries import sparsity
from circuitbench.dictionaries.base import Dictionary, Objective, Step
from circuitbench.dictionaries.sparse import SparseCode
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def squared_error(x: Float[Tensor, "n d"], reconstruction: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The squared distance between a row and its reconstruction, mean over rows."""
    return (x - reconstruction).pow(2).sum(1).mean()


def error(dictionary: Dictionary, target: Tensor, reconstruction: Tensor, step: Step) -> Float[Tensor, ""]:
    """What a reconstruction costs: by default the squared error as a share of variance."""
    if step.error is not None:
        return step.error(target, reconstruction)
    return squared_error(target, reconstruction) / dictionary.d_out


def error_and_auxk(
    dictionary: Dictionary,
    x: Float[Tensor, "n d_in"],
    target: Float[Tensor, "n d_out"],
    code: SparseCode,
    step: Step,
) -> Objective:
    """The error, plus `auxk_weight` · AuxK: what kinds with a fixed L0 make small."""
    reconstruction = dictionary.reconstruct(x, code)
    return with_auxk(dictionary, x, target, code, reconstruction, error(dictionary, target, reconstruction, step), step)


def with_auxk(
    dictionary: Dictionary,
    x: Float[Tensor, "n d_in"],
    target: Float[Tensor, "n d_out"],
    code: SparseCode,
    reconstruction: Float[Tensor, "n d_out"],
    loss: Float[Tensor, ""],
    step: Step,
) -> Objective:
    """A loss, plus `auxk_weight` · AuxK where features are dead."""
    parts = {"error": loss.detach()}
    if len(step.dead) and step.options["auxk_weight"]:
        aux = auxk(dictionary, x, step.dead, target=target, reconstruction=reconstruction.detach())
        parts["auxk"], loss = aux.detach(), loss + step.options["auxk_weight"] * aux
    return Objective(loss, reconstruction.detach(), code.detach(), parts)


def with_sparsity(
    dictionary: Dictionary,
    x: Float[Tensor, "n d_in"],
    code: SparseCode,
    reconstruction: Float[Tensor, "n d_out"],
    terms: Mapping[str, Float[Tensor, ""]],
    penalty: tuple[str, Float[Tensor, ""]],
    step: Step,
) -> Objective:
    """The sum of terms, plus the weight of sparsity · a penalty, plus `dead_weight` · `revival` of dead features."""
    name, amount = penalty
    parts = {label: term.detach() for label, term in terms.items()} | {name: amount.detach()}
    loss = torch.stack([*terms.values()]).sum() + sparsity.weight(step) * amount
    if len(step.dead) and step.options["dead_weight"]:
        revived = revival(dictionary, x, step.dead)
        parts["revival"], loss = revived.detach(), loss + step.options["dead_weight"] * revived
    return Objective(loss, reconstruction.detach(), code.detach(), parts)


def l1(dictionary: Dictionary, values: Float[Tensor, " nnz"], code: SparseCode, decoder_norm: str) -> Float[Tensor, ""]:
    """Σ activation · length of its decoder row, the mean over rows, over d_out.

    The length is 1 unless decoder rows are free; there it keeps the penalty from being evaded by small activations.
    """
    if decoder_norm == "free":
        values = values * dictionary.W_dec.norm(dim=1).index_select(0, code.columns)
    return values.sum() / (code.n * dictionary.d_out)


def revival(dictionary: Dictionary, x: Float[Tensor, "n d_in"], dead: Int[Tensor, " n_dead"]) -> Float[Tensor, ""]:
    """How far dead features are from being active: Σ relu(threshold − pre-activation), mean over rows, over d_out.

    The pre-activation loss of Conerly et al. 2025 ("Dictionary learning optimization techniques"), weighted by the
    decoder rows' lengths; the gradient reaches encoder, bias and threshold of the dead features.
    """
    bound = getattr(dictionary, "threshold", None)
    missing = -dictionary.preactivations(x, dead)
    if bound is not None:
        missing = missing + bound[dead].to(missing.dtype)
    weights = dictionary.W_dec.detach()[dead].norm(dim=1)
    return (missing.relu() * weights).sum() / (len(x) * dictionary.d_out)


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
        is dead, or of a single row.

    Raises:
        BadInput: the mask has another length than d_dict, or an index is out of range.
    """
    dead = _indices(dead, dictionary.d_dict)
    if len(dead) == 0 or len(x) == 1:  # one row has no variance
        return x.new_zeros(())
    with torch.no_grad():
        left_over = (x if target is None else target) - (dictionary(x) if reconstruction is None else reconstruction)
        variance = (left_over - left_over.mean(0)).pow(2).sum()
    k_aux = min(dictionary.d_in // 2 if k_aux is None else k_aux, len(dead))
    values = dictionary.preactivations(x, dead)
    if k_aux < len(dead):
        largest = (values.abs() if dictionary.signed else values).topk(k_aux, dim=1, sorted=False).indices
        values = torch.zeros_like(values).scatter(1, largest, values.gather(1, largest))
    estimate = (values if dictionary.signed else values.relu()) @ dictionary.W_dec[dead]
    return (left_over - estimate).pow(2).sum() / variance.clamp_min(torch.finfo(x.dtype).tiny)


def _indices(features: Tensor, d_dict: int) -> Tensor:
    if features.dtype == torch.bool:
        if features.shape != (d_dict,):
            raise BadInput(f"the mask of dead features has shape {tuple(features.shape)}; it must be ({d_dict},).")
        return features.nonzero().squeeze(1)
    if len(features) and (int(features.min()) < 0 or int(features.max()) >= d_dict):
        raise BadInput(f"a dead feature's index is out of range; the features are 0 to {d_dict - 1}.")
    return features
