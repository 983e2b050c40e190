"""TopK sparse autoencoders (Gao et al. 2024, arXiv:2406.04093): the k largest pre-activations, after a ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from circuitbench.dictionaries import losses
from circuitbench.dictionaries.base import Dictionary, Objective, Step
from circuitbench.dictionaries.selection import top_k
from circuitbench.dictionaries.sparse import SparseCode, Support
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float


class TopK(Dictionary):
    """encode(x) = relu(the k largest entries of (x − b_dec) @ W_enc + b_enc), all others 0."""

    kind: ClassVar[str] = "topk"
    settings_names: ClassVar[tuple[str, ...]] = ("k",)
    training_options: ClassVar[Mapping[str, Any]] = {"auxk_weight": 1 / 32}

    def __init__(self, *, k: int, **sizes: Any):
        super().__init__(**sizes)
        self.k = checked_k(k, self.d_dict)

    def encode_sparse(self, x: Float[Tensor, "n d_in"], weights: Tensor | None = None) -> SparseCode:
        """The k features of each row and their activations, differentiable once in x and the parameters.

        Args:
            weights: `(d_dict,)`; features are chosen by weight · pre-activation, where given.
        """
        x = self._checked(x)
        with torch.no_grad():
            # Selecting before the relu gives the same code, and a top-k over values without ties at 0 is faster.
            scores = self.preactivations(x)
            if weights is not None:
                indices = top_k(scores * weights, self.k)[1]
                values = scores.gather(1, indices)
            else:
                values, indices = top_k(scores, self.k)
        support = Support.of_indices(indices, self.d_dict)
        values = self.chosen_preactivations(x, values.flatten(), support)
        return SparseCode(values.relu(), support)

    def objective(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], step: Step) -> Objective:
        """The squared error, and AuxK for the dead features."""
        weights = self.W_dec.detach().norm(dim=1) if step.decoder_norm == "free" else None
        code = self.encode_sparse(x, weights)
        return losses.error_and_auxk(self, x, target, code, step)


def checked_k(k: int, d_dict: int) -> int:
    """k, if there can be so many active features."""
    if not 1 <= k <= d_dict:
        raise BadInput(f"k={k} was given; it must lie between 1 and d_dict = {d_dict}.")
    return k
