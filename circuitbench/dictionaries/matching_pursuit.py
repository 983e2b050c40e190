"""Matching pursuit (Mallat & Zhang 1993) as an encoder (MP-SAE, Costa et al. 2025, arXiv:2506.03093).

There is no encoder to learn: features are taken one after the other, each time the one that fits best what is left.
So the features of a row can be correlated, and how many there are depends on the row. It costs one dense product for
each round, where other kinds have one in all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from circuitbench.dictionaries import losses
from circuitbench.dictionaries.base import Dictionary, Objective, Step
from circuitbench.dictionaries.sparse import SparseCode
from circuitbench.dictionaries.travelling import pursuit
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from circuitbench.dictionaries.sparse import Support


class MatchingPursuit(Dictionary):
    """encode(x) = the matching pursuit of x − b_dec with the rows of W_dec (see `travelling.pursuit`).

    Its parameters are W_dec and b_dec. Decoder rows have length 1, or the pursuit takes too much or too little of each.

    Attributes:
        max_iterations: rounds, and so at most so many active features; d_in where None was given.
        residual_threshold: a row is done when what is left of it is shorter; in units of the activations, while
            training of the activations scaled to unit variance. 0: never.
        stop_on_duplicate_support: whether a row is done when a round gave it no new feature.
    """

    kind: ClassVar[str] = "matching_pursuit"
    settings_names: ClassVar[tuple[str, ...]] = ("max_iterations", "residual_threshold", "stop_on_duplicate_support")
    encoder_biases: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, *, max_iterations: int | None, residual_threshold: float, stop_on_duplicate_support: bool, **sizes: Any
    ):
        if sizes.get("d_out") is not None or sizes.get("skip") or sizes.get("blocks"):
            raise BadInput(
                "matching pursuit encodes with its decoder, so it reconstructs the one site it reads; a transcoder "
                '(d_out=, skip=, site_out=) or a crosscoder (blocks=, sites=) needs another kind, such as "topk".'
            )
        super().__init__(**sizes)
        # While there was no W_dec, the name was free, and all dictionaries begin with this one as a parameter.
        del self._parameters["W_enc"]
        max_iterations = self.d_in if max_iterations is None else max_iterations
        if max_iterations < 1 or not 0 <= residual_threshold < float("inf"):
            raise BadInput(
                f"max_iterations={max_iterations}, residual_threshold={residual_threshold} were given; they must be at "
                "least 1 and at least 0."
            )
        self.max_iterations = max_iterations
        self.residual_threshold = float(residual_threshold)
        self.stop_on_duplicate_support = bool(stop_on_duplicate_support)

    @classmethod
    def default_settings(cls, d_dict: int) -> dict[str, Any]:
        """Those of SAELens."""
        return {"max_iterations": None, "residual_threshold": 1e-2, "stop_on_duplicate_support": True}

    @property
    def d_in(self) -> int:
        """Size of what is encoded."""
        return self.W_dec.shape[1]

    @property
    def d_dict(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_dict"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """W_decᵀ."""
        return self.W_dec.T

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """The pursuit of each row, differentiable in x and the parameters with the features that it took held fixed."""
        code = pursuit(self._checked(x) - self.b_dec, self.W_dec, *self.settings.values())
        return SparseCode.of_dense(code)

    def objective(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], step: Step) -> Objective:
        """The error, through all rounds of the pursuit."""
        if step.decoder_norm == "free":
            raise BadInput('decoder_norm="free" was given; a pursuit needs rows of length 1: "unit" or "tangent".')
        if self.product_dtype is not None:
            raise BadInput('precision="bfloat16" was given; matching pursuit has "float32".')
        code = self.encode_sparse(x)
        reconstruction = self.reconstruct(x, code)
        error = losses.error(self, target, reconstruction, step)
        return Objective(error, reconstruction.detach(), code.detach(), {"error": error.detach()})

    def preactivations(
        self, x: Float[Tensor, "n d_in"], features: Int[Tensor, " some"] | None = None
    ) -> Float[Tensor, "n some"]:
        """None. Raises BadInput: what a feature sees depends on the features taken before it."""
        raise BadInput("matching pursuit has no pre-activations: a feature sees what those before it left; use encode.")

    def chosen_preactivations(
        self, x: Float[Tensor, "n d_in"], values: Float[Tensor, " nnz"], support: Support
    ) -> Float[Tensor, " nnz"]:
        """None. Raises BadInput, as `preactivations`."""
        return self.preactivations(x)

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Raises BadInput where rows have another length than 1: the same function cannot be had with such rows."""
        lengths = self.W_dec.norm(dim=1)
        if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4, rtol=0):
            raise BadInput("a pursuit takes other features when decoder rows change their length; nothing was folded.")

    @torch.no_grad()
    def fold_scale(self, scale: Float[Tensor, "*d_in"], target_scale: Float[Tensor, "*d_out"]) -> None:
        """From a dictionary of x / scale, make that of x.

        Args:
            scale: one number.
            target_scale: the same number.

        Raises:
            BadInput: a scale for each component: directions would not keep their length.
        """
        if scale.numel() != 1 or target_scale.numel() != 1:
            raise BadInput("a matching pursuit can be scaled by one number only; scale the activations as one.")
        self.b_dec.mul_(target_scale.to(self.b_dec))
        self.residual_threshold *= float(target_scale)
