"""Gated sparse autoencoders (Rajamanoharan et al. 2024, arXiv:2404.16014): which features are active, and how much.

An L1 penalty on activations makes them too small. Here it acts on the gate alone, which says whether a feature is
active; how much is a path of its own, with the gate's weights but for a scale and a bias. The gate learns to be right
by an auxiliary error: that of a reconstruction from the gate's own values, through a decoder that is held fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from circuitbench.dictionaries import losses, sparse, sparsity
from circuitbench.dictionaries.base import Dictionary, Objective, Step
from circuitbench.dictionaries.selection import above
from circuitbench.dictionaries.sparse import SparseCode

if TYPE_CHECKING:
    from jaxtyping import Float


class Gated(Dictionary):
    """encode(x) = relu(z · exp(r_mag) + b_mag) where z + b_gate > 0, else 0; z = (x − b_dec) @ W_enc.

    Attributes:
        b_gate: `(d_dict,)`.
        b_mag: `(d_dict,)`.
        r_mag: `(d_dict,)`, the log of the magnitudes' scale.
    """

    kind: ClassVar[str] = "gated"
    training_options: ClassVar[Mapping[str, Any]] = sparsity.OPTIONS
    encoder_biases: ClassVar[tuple[str, ...]] = ("b_gate", "b_mag")

    b_gate: nn.Parameter
    b_mag: nn.Parameter

    def __init__(self, **sizes: Any):
        super().__init__(**sizes)
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_mag))

    @classmethod
    def checked_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """See `sparsity.checked`."""
        return sparsity.checked(options)

    def gates(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """The positive gates, differentiable once in x and the parameters."""
        x = self._checked(x)
        with torch.no_grad():
            values, support = above(self.preactivations(x), 0.0)
        return SparseCode(self.chosen_preactivations(x, values, support), support)

    def magnitudes(self, gates: SparseCode) -> SparseCode:
        """The activations of the features whose gates these are; the gradient does not pass through the gates' bias."""
        at = gates.columns
        shared = gates.values - self.b_gate.index_select(0, at)
        scale, bias = self.r_mag.exp().index_select(0, at), self.b_mag.index_select(0, at)
        return SparseCode((shared * scale + bias).relu(), gates.support)

    @torch.no_grad()
    def begin(self, x: Float[Tensor, "n d_in"], options: Mapping[str, Any], memory: dict[str, Tensor]) -> None:
        """See `sparsity.begin`."""
        sparsity.begin(self, x, options, memory)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """The features whose gate is open, differentiable once in x and the parameters."""
        return self.magnitudes(self.gates(x))

    def objective(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], step: Step) -> Objective:
        """The error, that of the gates through a fixed decoder, and the L1 penalty on the gates."""
        gates = self.gates(x)
        code = self.magnitudes(gates)
        offset = self.offset(x)
        reconstruction = sparse.decode(code, self.W_dec) + offset
        by_gates = sparse.decode(gates, self.W_dec.detach()) + offset.detach()
        terms = {
            "error": losses.error(self, target, reconstruction, step),
            "gate_error": losses.squared_error(target, by_gates) / self.d_out,
        }
        penalty = "l1", losses.l1(self, gates.values, gates, step.decoder_norm)
        return losses.with_sparsity(self, x, code, reconstruction, terms, penalty, step)

    @torch.no_grad()
    def after_step(self, objective: Objective, step: Step) -> None:
        """Follow the target L0."""
        sparsity.follow(objective, step)
