"""BatchTopK sparse autoencoders (Bussmann et al. 2024, arXiv:2412.06410): k features a row on average over a batch.

In training the k · n largest pre-activations of the whole batch are kept, so that rows that need more features have
more. What a row keeps must not depend on its neighbours afterwards: there, a feature is active above `threshold`, the
running mean of the smallest activation that batches kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from circuitbench.dictionaries import losses
from circuitbench.dictionaries.base import Dictionary, Objective, Step
from circuitbench.dictionaries.selection import above, top_of_batch
from circuitbench.dictionaries.sparse import SparseCode
from circuitbench.dictionaries.topk import checked_k

if TYPE_CHECKING:
    from jaxtyping import Float

_MEMORY = 0.99  # of the running mean


class BatchTopK(Dictionary):
    """encode(x) = the entries of (x − b_dec) @ W_enc + b_enc above `threshold`, all others 0.

    Attributes:
        threshold: `(d_dict,)`, float32; the same for all features unless the weights were rescaled.
    """

    kind: ClassVar[str] = "batchtopk"
    settings_names: ClassVar[tuple[str, ...]] = ("k",)
    training_options: ClassVar[Mapping[str, Any]] = {"auxk_weight": 1 / 32}
    float32: ClassVar[tuple[str, ...]] = ("threshold",)

    threshold: Tensor

    def __init__(self, *, k: int, **sizes: Any):
        super().__init__(**sizes)
        self.k = checked_k(k, self.d_dict)
        self.register_buffer("threshold", torch.zeros(self.d_dict, dtype=torch.float32))

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """The features above the threshold, differentiable once in x and the parameters."""
        x = self._checked(x)
        with torch.no_grad():
            values, support = above(self.preactivations(x), self.threshold.clamp_min(0))
        return SparseCode(self.chosen_preactivations(x, values, support), support)

    def encode_batch(self, x: Float[Tensor, "n d_in"], weights: Tensor | None = None) -> SparseCode:
        """As in training: the k · n largest positive entries of the batch.

        Args:
            weights: `(d_dict,)`; entries are compared after multiplication by it, where given.
        """
        x = self._checked(x)
        with torch.no_grad():
            scores = self.preactivations(x)
            values, support = top_of_batch(
                scores if weights is None else scores * weights, self.k * len(x), float(self.threshold[0])
            )
            if weights is not None:
                values = scores[support.rows, support.columns]
        return SparseCode(self.chosen_preactivations(x, values, support), support)

    def objective(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], step: Step) -> Objective:
        """The squared error, and AuxK for the dead features."""
        weights = self.W_dec.detach().norm(dim=1) if step.decoder_norm == "free" else None
        return losses.error_and_auxk(self, x, target, self.encode_batch(x, weights), step)

    @torch.no_grad()
    def after_step(self, objective: Objective, step: Step) -> None:
        """Follow the smallest activation that was kept."""
        values = objective.code.values
        if step.decoder_norm == "free":
            values = values * self.W_dec.norm(dim=1)[objective.code.columns]
        if len(values):
            smallest = values.min().float()
            follow = smallest if float(self.threshold[0]) == 0 else self.threshold.lerp(smallest, 1 - _MEMORY)
            self.threshold.copy_(follow.expand(self.d_dict))

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """As in `Dictionary`; the threshold is one for activations times norms already."""
        threshold = self.threshold.clone()
        super().fold_decoder_norm()
        self.threshold.copy_(threshold)
