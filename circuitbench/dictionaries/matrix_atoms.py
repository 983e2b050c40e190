"""Rank-1 matrix atoms (WriteSAE, Young 2026, arXiv:2605.12770): features whose directions are outer products.

What a recurrent step writes into its state is an outer product: dt·x ⊗ B of one head (SSD) or of all channels (S6),
k ⊗ β(v − …) in the delta rules. A feature with the same form, u ⊗ v, can be put in the place of a write. Where a plain
dictionary has rows·cols numbers for a feature's decoder direction, this one has rows + cols.

Of a matrix that is not known to be an outer product itself, the inner product with one, uᵀ S v, costs as much as that
with any other matrix. So W_enc and W_dec are made when they are used, which costs what one row costs, and all products
are those of any dictionary; the parameters, their gradients and the optimizer's moments are those of the factors.

Writes differ in length by orders of magnitude, and the squared error sees the long ones alone. With `unit_rows` all
count the same: the dictionary is homogeneous, its features of c·S are c times those of S.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from circuitbench.dictionaries.base import _SEED_SALT, Objective, Step
from circuitbench.dictionaries.selection import top_k
from circuitbench.dictionaries.sparse import SparseCode, Support
from circuitbench.dictionaries.topk import TopK
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float


class Rank1(TopK):
    """A TopK dictionary of matrices, S ≈ Σ a_i u_i v_iᵀ + b_dec, where a_i comes of u'_iᵀ (S − b_dec) v'_i + b_enc_i.

    Rows are matrices flattened. The encoder is u' ⊗ v', untied from the decoder's u ⊗ v, where it starts.

    With `unit_rows`, S ≈ Σ a_i u_i v_iᵀ, where a_i comes of u'_iᵀ S v'_i + r b_enc_i, with r the root mean square of S.
    b_dec stays 0, and training makes the error small as a share of each row's own square.

    Attributes:
        U_enc: u', `(d_dict, rows)`.
        V_enc: v', `(d_dict, cols)`.
        U_dec: u, `(d_dict, rows)`, of length 1.
        V_dec: v, `(d_dict, cols)`, of length 1.
        shape: (rows, cols) of the matrices.
        k: features active on a row.
        unit_rows: whether the dictionary is homogeneous.
    """

    kind: ClassVar[str] = "rank1"
    settings_names: ClassVar[tuple[str, ...]] = ("k", "shape", "unit_rows")

    U_enc: nn.Parameter
    V_enc: nn.Parameter
    U_dec: nn.Parameter
    V_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, *, shape: Sequence[int], unit_rows: bool = False, **sizes: Any):
        rows, cols = _checked_shape(shape, sizes["d_in"])
        if sizes.get("d_out") is not None or sizes.get("skip") or sizes.get("blocks"):
            raise BadInput(
                "rank-1 atoms belong to one site of matrices; a transcoder (d_out=, skip=, site_out=) or a crosscoder "
                '(blocks=, sites=) needs another kind, such as "topk".'
            )
        super().__init__(**sizes)
        # While there were no factors, the two names were free, and all dictionaries begin with these as parameters.
        del self._parameters["W_enc"], self._parameters["W_dec"]
        self.shape: tuple[int, int] = (rows, cols)
        self.unit_rows = unit_rows
        self.b_dec.requires_grad_(not unit_rows)
        generator = torch.Generator().manual_seed(sizes.get("seed", 0) ^ _SEED_SALT)
        for side, size in (("U", rows), ("V", cols)):
            factors = F.normalize(torch.randn(self.d_dict, size, generator=generator), dim=1).to(self.b_dec.dtype)
            self.register_parameter(f"{side}_enc", nn.Parameter(factors.clone()))
            self.register_parameter(f"{side}_dec", nn.Parameter(factors))

    @property
    def d_in(self) -> int:
        """Size of what is encoded: rows · cols."""
        return len(self.b_dec)

    @property
    def d_out(self) -> int:
        """Size of what is decoded: the same."""
        return self.d_in

    @property
    def d_dict(self) -> int:
        """Number of features."""
        return len(self.b_enc)

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_dict"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """u' ⊗ v' of every feature, flattened; made anew each time."""
        return outer(self.U_enc, self.V_enc).T

    @property
    def W_dec(self) -> Float[Tensor, "d_dict d_out"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """u ⊗ v of every feature, flattened; made anew each time."""
        return outer(self.U_dec, self.V_dec)

    @classmethod
    def default_settings(cls, d_dict: int) -> dict[str, Any]:
        """Settings that have a default."""
        return {"unit_rows": False}

    def encode_sparse(self, x: Float[Tensor, "n d_in"], weights: Tensor | None = None) -> SparseCode:
        """As in TopK; with `unit_rows`, of each row at root mean square 1, times what it had."""
        if not self.unit_rows:
            return super().encode_sparse(x, weights)
        x = self._checked(x)
        size = _lengths(x) / self.d_in**0.5
        code = super().encode_sparse(x / size, weights)
        return SparseCode(code.values * size[code.rows, 0], code.support)

    def encode_outer(self, left: Float[Tensor, "n rows"], right: Float[Tensor, "n cols"]) -> Float[Tensor, "n d_dict"]:
        """The code of left ⊗ right, at rows + cols products a feature instead of rows · cols."""
        left, right = left.to(self.b_dec.dtype), right.to(self.b_dec.dtype)
        b_dec = torch.einsum("fr,rc,fc->f", self.U_enc, self.b_dec.view(self.shape), self.V_enc)
        size = _lengths(left) * _lengths(right) / self.d_in**0.5 if self.unit_rows else 1.0
        scores = (left @ self.U_enc.T) * (right @ self.V_enc.T) + size * self.b_enc - b_dec
        values, indices = top_k(scores, self.k)
        return SparseCode(values.flatten().relu(), Support.of_indices(indices, self.d_dict)).to_dense()

    def objective(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], step: Step) -> Objective:
        """As in TopK."""
        if step.decoder_norm == "tangent":
            raise BadInput('decoder_norm="tangent" was given; rank-1 atoms have "unit" or "free".')
        if not self.unit_rows:
            return super().objective(x, target, step)
        size = _lengths(x) / self.d_in**0.5
        found = super().objective(x / size, target / size, step)
        values = found.code.values * size[found.code.rows, 0]
        return replace(found, reconstruction=found.reconstruction * size, code=SparseCode(values, found.code.support))

    @torch.no_grad()
    def start_at(self, mean: Float[Tensor, " d_in"], target_mean: Float[Tensor, " d_out"]) -> None:
        """Before training: b_dec is the data's mean, unless it stays 0."""
        if not self.unit_rows:
            super().start_at(mean, target_mean)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale u and v of every atom to length 1."""
        for factor in (self.U_dec, self.V_dec):
            factor.div_(_lengths(factor))

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Scale u and v of every atom to length 1 and its activations by what they had: the same function."""
        norm = (_lengths(self.U_dec) * _lengths(self.V_dec)).squeeze(1)
        self.normalize_decoder()
        self._scale_activations(norm)

    @torch.no_grad()
    def fold_scale(self, scale: Float[Tensor, "*d_in"], target_scale: Float[Tensor, "*d_out"]) -> None:
        """From a dictionary of x / scale, make that of x.

        Args:
            scale: one number.
            target_scale: the same number.

        Raises:
            BadInput: a scale for each component: an outer product does not stay one.
        """
        if scale.numel() != 1 or target_scale.numel() != 1:
            raise BadInput("rank-1 atoms can be scaled by one number only; center and scale the activations as one.")
        if self.unit_rows:
            return  # the same function of rows of any scale
        self.U_enc.div_(scale.to(self.U_enc))
        self.b_dec.mul_(target_scale.to(self.b_dec))
        self._scale_activations(target_scale.to(self.U_enc).expand(self.d_dict))

    def _scale_activations(self, factor: Float[Tensor, " d_dict"]) -> None:
        self.U_enc.mul_(factor[:, None])
        self.b_enc.mul_(factor)


def _checked_shape(shape: Sequence[int], d_in: int) -> tuple[int, int]:
    sizes = tuple(shape)
    if len(sizes) != 2 or min(sizes) < 1 or sizes[0] * sizes[1] != d_in:
        raise BadInput(
            f"shape={sizes} was given with d_in={d_in}; it is the (rows, cols) of the matrices, and rows · cols = d_in."
        )
    return sizes[0], sizes[1]


class _Outer(torch.autograd.Function):
    """left ⊗ right: the gradient in two passes over it, where autograd's takes four and two arrays as large."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return torch.bmm(left[:, :, None], right[:, None, :]).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        matrices = grad.reshape(len(left), left.shape[1], right.shape[1])
        return torch.bmm(matrices, right[:, :, None])[:, :, 0], torch.bmm(left[:, None, :], matrices)[:, 0]


def outer(left: Float[Tensor, "n rows"], right: Float[Tensor, "n cols"]) -> Float[Tensor, "n rows_times_cols"]:
    """left ⊗ right, row by row, flattened; differentiable once."""
    return _Outer.apply(left, right)


def _lengths(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
    return rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
