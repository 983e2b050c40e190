"""JumpReLU sparse autoencoders (Rajamanoharan et al. 2024, arXiv:2407.14435): a threshold a feature, an L0 penalty.

How many features are active does not change smoothly with a threshold; its gradient is estimated from the activations
near the threshold: those less than `bandwidth` / 2 from it count as if the step were a ramp (a rectangle kernel).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from circuitbench.dictionaries import losses, sparsity
from circuitbench.dictionaries.base import Dictionary, Objective, Step
from circuitbench.dictionaries.selection import above
from circuitbench.dictionaries.sparse import SparseCode
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float


_FIRST_THRESHOLD = 0.5  # in units of data of variance 1


class JumpReLU(Dictionary):
    """encode(x) = the entries of (x − b_dec) @ W_enc + b_enc above `threshold`, all others 0.

    Attributes:
        threshold: `(d_dict,)`, at least 0, float32 whatever the dtype; the threshold itself, not its logarithm, which
            moves far too slowly.
    """

    kind: ClassVar[str] = "jumprelu"
    training_options: ClassVar[Mapping[str, Any]] = {**sparsity.OPTIONS, "bandwidth": 1.0}
    float32: ClassVar[tuple[str, ...]] = ("threshold",)

    def __init__(self, **sizes: Any):
        super().__init__(**sizes)
        self.threshold = nn.Parameter(torch.zeros(self.d_dict, dtype=torch.float32))

    @classmethod
    def checked_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """See `sparsity.checked`; the bandwidth, in units of data of variance 1, is more than 0."""
        checked = {**cls.training_options, **sparsity.checked(options)}
        if not checked["bandwidth"] > 0:
            raise BadInput(f"bandwidth={checked['bandwidth']} was given; it must be more than 0.")
        return checked

    @torch.no_grad()
    def begin(self, x: Float[Tensor, "n d_in"], options: Mapping[str, Any], memory: dict[str, Tensor]) -> None:
        """See `sparsity.begin`; thresholds are small at first, so that activations can begin small, too."""
        self.threshold.fill_(_FIRST_THRESHOLD)
        sparsity.begin(self, x, options, memory)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """The features above their threshold, differentiable once in x and the parameters but the threshold."""
        x = self._checked(x)
        with torch.no_grad():
            values, support = above(self.preactivations(x), self.threshold.clamp_min(0))
        return SparseCode(self.chosen_preactivations(x, values, support), support)

    def encode_estimated(self, x: Float[Tensor, "n d_in"], bandwidth: float) -> tuple[SparseCode, Float[Tensor, ""]]:
        """The same code and its L0, the mean over rows, with estimated gradients in the threshold."""
        x = self._checked(x)
        with torch.no_grad():
            # What lies below a threshold by less than half the bandwidth is 0, and has a say in where it goes.
            values, support = above(self.preactivations(x), self.threshold - bandwidth / 2)
        values = self.chosen_preactivations(x, values, support)
        values, active = _Jump.apply(values, self.threshold.index_select(0, support.columns), bandwidth)
        return SparseCode(values, support), active.sum() / support.n

    def objective(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], step: Step) -> Objective:
        """The error, and an L0 penalty: features active on a row, over d_out."""
        code, l0 = self.encode_estimated(x, step.options["bandwidth"])
        reconstruction = self.reconstruct(x, code)
        terms = {"error": losses.error(self, target, reconstruction, step)}
        return losses.with_sparsity(self, x, code, reconstruction, terms, ("l0", l0 / self.d_out), step)

    @torch.no_grad()
    def after_step(self, objective: Objective, step: Step) -> None:
        """Thresholds stay at least 0; follow the target L0."""
        self.threshold.clamp_(min=0)
        sparsity.follow(objective, step)


class _Jump(torch.autograd.Function):
    """z where z > threshold, else 0; and 1 there, else 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        active = z > threshold
        ctx.save_for_backward(z, threshold, active)
        ctx.bandwidth = bandwidth
        return torch.where(active, z, 0), active.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_code: Tensor, grad_active: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold, active = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = near * (threshold * grad_code + grad_active) / -ctx.bandwidth
        return grad_code * active, grad_threshold.to(threshold.dtype), None
