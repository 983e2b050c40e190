"""Standard sparse autoencoders (Bricken et al. 2023): positive pre-activations, and an L1 penalty that keeps them few.

The penalty weighs activations by the length of their decoder rows (Conerly et al. 2024, "Update on how we train SAEs"),
so it does not depend on how a feature's scale is shared between encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from circuitbench.dictionaries import losses, sparsity
from circuitbench.dictionaries.base import Dictionary, Objective, Step
from circuitbench.dictionaries.selection import above
from circuitbench.dictionaries.sparse import SparseCode

if TYPE_CHECKING:
    from jaxtyping import Float


class Standard(Dictionary):
    """encode(x) = relu((x − b_dec) @ W_enc + b_enc)."""

    kind: ClassVar[str] = "standard"
    training_options: ClassVar[Mapping[str, Any]] = sparsity.OPTIONS

    @classmethod
    def checked_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """See `sparsity.checked`."""
        return sparsity.checked(options)

    @torch.no_grad()
    def begin(self, x: Float[Tensor, "n d_in"], options: Mapping[str, Any], memory: dict[str, Tensor]) -> None:
        """See `sparsity.begin`."""
        sparsity.begin(self, x, options, memory)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """The positive features, differentiable once in x and the parameters."""
        x = self._checked(x)
        with torch.no_grad():
            values, support = above(self.preactivations(x), 0.0)
        return SparseCode(self.chosen_preactivations(x, values, support), support)

    def objective(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], step: Step) -> Objective:
        """The error and the L1 penalty."""
        code = self.encode_sparse(x)
        reconstruction = self.reconstruct(x, code)
        terms = {"error": losses.error(self, target, reconstruction, step)}
        penalty = "l1", losses.l1(self, code.values, code, step.decoder_norm)
        return losses.with_sparsity(self, x, code, reconstruction, terms, penalty, step)

    @torch.no_grad()
    def after_step(self, objective: Objective, step: Step) -> None:
        """Follow the target L0."""
        sparsity.follow(objective, step)
