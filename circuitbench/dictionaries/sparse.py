"""Sparse codes, and the products that cost what their non-zeros cost.

A sparse step has one product that must be dense, every feature's pre-activation, and five that need not be: the
reconstruction and the gradients of both weight matrices, of the code and of the input. Four of them are sums of few
rows of a matrix, which `torch.nn.functional.embedding_bag` computes faster than a CSR product, and on every device; the
fifth, the gradient of the code, is a product sampled at few entries.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

with warnings.catch_warnings():
    # torch says once in a process that CSR tensors are in beta: here, not in the middle of a user's training.
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


class Support:
    """Which of `d_dict` features each of `n` rows uses: the pattern of a sparse code, and of its transpose.

    Attributes:
        columns: the features, row by row, ascending in each.
        row_starts: where each row begins in `columns`, and where the last one ends.
    """

    def __init__(self, columns: Int[Tensor, " nnz"], row_starts: Int[Tensor, " n_plus_1"], d_dict: int):
        self.columns = columns
        self.row_starts = row_starts
        self.d_dict = d_dict

    @staticmethod
    def of_indices(indices: Int[Tensor, "n k"], d_dict: int) -> Support:
        """The same number of features in every row, ascending."""
        n, k = indices.shape
        return Support(indices.flatten(), torch.arange(0, n * k + 1, k, device=indices.device), d_dict)

    @staticmethod
    def of_mask(active: Bool[Tensor, "n d_dict"]) -> Support:
        """The features where the mask is true."""
        counts = active.sum(1)
        row_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Support(active.nonzero()[:, 1], row_starts, active.shape[1])

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.row_starts) - 1

    @cached_property
    def rows(self) -> Int[Tensor, " nnz"]:
        """The row of every entry."""
        counts = self.row_starts.diff()
        return torch.repeat_interleave(
            torch.arange(self.n, device=counts.device), counts, output_size=len(self.columns)
        )

    @cached_property
    def by_feature(self) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"], Int[Tensor, " d_dict"]]:
        """The transpose: the order that sorts the entries by feature, their rows in it, and where a feature starts."""
        order = self.columns.argsort(stable=True)
        ends = torch.bincount(self.columns, minlength=self.d_dict).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return order, self.rows[order], starts

    def times(self, values: Float[Tensor, " nnz"], matrix: Float[Tensor, "d_dict d"]) -> Float[Tensor, "n d"]:
        """code @ matrix."""
        return F.embedding_bag(self.columns, matrix, self.row_starts[:-1], per_sample_weights=values, mode="sum")

    def transposed_times(
        self, values: Float[Tensor, " nnz"], matrix: Float[Tensor, "n d"]
    ) -> Float[Tensor, "d_dict d"]:
        """codeᵀ @ matrix."""
        order, rows, starts = self.by_feature
        return F.embedding_bag(rows, matrix, starts, per_sample_weights=values[order], mode="sum")

    def sums(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_dict"]:
        """The column sums of the code."""
        return values.new_zeros(self.d_dict).index_add_(0, self.columns, values)

    def sampled_product(self, left: Float[Tensor, "n d"], right: Float[Tensor, "d_dict d"]) -> Float[Tensor, " nnz"]:
        """left @ rightᵀ, at the entries of the support only."""
        if left.is_cuda or torch.backends.mkl.is_available():
            return _sampled_product_csr(self, left, right)
        return _sampled_product_portable(self, left, right)


def _sampled_product_csr(
    support: Support, left: Float[Tensor, "n d"], right: Float[Tensor, "d_dict d"]
) -> Float[Tensor, " nnz"]:
    zeros = left.new_zeros(len(support.columns))
    size = (support.n, len(right))
    pattern = torch.sparse_csr_tensor(support.row_starts, support.columns, zeros, size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


def _sampled_product_portable(
    support: Support, left: Float[Tensor, "n d"], right: Float[Tensor, "d_dict d"]
) -> Float[Tensor, " nnz"]:
    """For torch without MKL: the same numbers as the gradient of an embedding bag in its weights, in twice the time."""
    with torch.enable_grad():
        weights = left.new_zeros(len(support.columns), requires_grad=True)
        product = F.embedding_bag(
            support.columns, right.detach(), support.row_starts[:-1], per_sample_weights=weights, mode="sum"
        )
        return torch.autograd.grad(product, weights, left)[0]


class _Preactivations(torch.autograd.Function):
    """Selected entries of (x − b_in) @ W_enc + b_enc, whose values are known already: this adds their backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_in: Tensor | None, values: Tensor, support: Support
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, *([] if b_in is None else [b_in]))
        ctx.support = support
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, *shift = ctx.saved_tensors
        support: Support = ctx.support
        grad_x = grad_W_enc = grad_b_in = None
        grad_b_enc = support.sums(grad)
        if ctx.needs_input_grad[0]:
            grad_x = support.times(grad, W_enc.T.contiguous())
        if ctx.needs_input_grad[1]:
            grad_W_enc = support.transposed_times(grad, x - shift[0] if shift else x).T
        if ctx.needs_input_grad[3]:
            grad_b_in = -(W_enc @ grad_b_enc)
        return grad_x, grad_W_enc, grad_b_enc, grad_b_in, None, None


class _Decode(torch.autograd.Function):
    """code @ W_dec."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, support: Support) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.support = support
        return support.times(values, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = ctx.support.sampled_product(grad, W_dec) if ctx.needs_input_grad[0] else None
        grad_W_dec = ctx.support.transposed_times(values, grad) if ctx.needs_input_grad[1] else None
        return grad_values, grad_W_dec, None


@dataclass(frozen=True, eq=False)
class SparseCode:
    """The activations of a dictionary's features on `n` rows; features not listed are 0, listed ones may be."""

    values: Float[Tensor, " nnz"]
    support: Support

    @property
    def columns(self) -> Int[Tensor, " nnz"]:
        """The feature of every value, row by row, ascending in each."""
        return self.support.columns

    @property
    def row_starts(self) -> Int[Tensor, " n_plus_1"]:
        """Where each row begins, and where the last one ends."""
        return self.support.row_starts

    @property
    def rows(self) -> Int[Tensor, " nnz"]:
        """The row of every value."""
        return self.support.rows

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.support.n

    @property
    def d_dict(self) -> int:
        """Number of features."""
        return self.support.d_dict

    @property
    def l0(self) -> Float[Tensor, ""]:
        """Active features (≠ 0) of a row, the mean."""
        return (self.values != 0).sum() / self.n

    def active_features(self) -> Int[Tensor, " nnz_active"]:
        """The features that are active (≠ 0) anywhere; one entry for every row where it is."""
        return self.columns[self.values != 0]

    def to_dense(self) -> Float[Tensor, "n d_dict"]:
        """The same code with its zeros."""
        return self.values.new_zeros(self.n, self.d_dict).index_put((self.rows, self.columns), self.values)

    def detach(self) -> SparseCode:
        """The same numbers, cut from the graph."""
        return SparseCode(self.values.detach(), self.support)

    @staticmethod
    def of_dense(features: Float[Tensor, "n d_dict"]) -> SparseCode:
        """A dense code's entries that are not 0, differentiable."""
        support = Support.of_mask(features != 0)
        return SparseCode(features[support.rows, support.columns], support)


def preactivations(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_dict"],
    b_enc: Float[Tensor, " d_dict"],
    b_in: Float[Tensor, " d_in"] | None,
    values: Float[Tensor, " nnz"],
    support: Support,
) -> Float[Tensor, " nnz"]:
    """Selected entries of (x − b_in) @ W_enc + b_enc, differentiable once at the cost of the entries.

    Args:
        values: what these entries are, known from the dense product that selected them.
    """
    return _Preactivations.apply(x, W_enc, b_enc, b_in, values, support)


def decode(code: SparseCode, W_dec: Float[Tensor, "d_dict d_out"]) -> Float[Tensor, "n d_out"]:
    """code @ W_dec, differentiable once in both."""
    return _Decode.apply(code.values, W_dec, code.support)
