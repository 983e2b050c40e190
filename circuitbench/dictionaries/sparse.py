"""Sparse codes, and the products that cost what their non-zeros cost.

A TopK step has one product that must be dense, every feature's pre-activation, and five that need not be: the
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
    from jaxtyping import Float, Int

with warnings.catch_warnings():
    # torch says once in a process that CSR tensors are in beta: here, not in the middle of a user's training.
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)

# A pre-selection by groups of this many features makes torch's top-k on the CPU, whose time is per element, about
# 1.4 times faster.
_GROUP = 8


def top_k(scores: Float[Tensor, "n d_dict"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The `k` largest scores of each row and their columns, columns ascending.

    On the CPU in two rounds, and exactly so: what is not in one of the `k` groups with the largest maxima cannot be
    among the `k` largest.
    """
    d_dict = scores.shape[1]
    n_groups = d_dict // _GROUP
    if scores.device.type == "cpu" and d_dict % _GROUP == 0 and d_dict > 2 * _GROUP * k:
        # Group j holds the columns j, j + n_groups, j + 2·n_groups, …: maxima are then taken along contiguous memory.
        group = scores.view(-1, _GROUP, n_groups).amax(1).topk(k, sorted=False).indices
        member = torch.arange(0, d_dict, n_groups, device=scores.device)
        candidates = (group.unsqueeze(1) + member.unsqueeze(1)).flatten(1)
        values, chosen = scores.gather(1, candidates).topk(k, sorted=False)
        indices = candidates.gather(1, chosen)
    else:
        values, indices = scores.topk(k, sorted=False)
    indices, order = indices.sort(dim=1)
    return values.gather(1, order), indices


class Support:
    """Which `k` of `d_dict` features each of `n` rows uses: the pattern of a sparse code, and of its transpose."""

    def __init__(self, indices: Int[Tensor, "n k"], d_dict: int):
        self.indices = indices
        self.d_dict = d_dict

    @cached_property
    def by_feature(self) -> tuple[Int[Tensor, " nk"], Int[Tensor, " nk"], Int[Tensor, " d_dict"]]:
        """The transpose: the order that sorts the entries by feature, their rows in it, and where a feature starts."""
        flat = self.indices.flatten()
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=self.d_dict).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return order, order // self.indices.shape[1], starts

    def times(self, values: Float[Tensor, "n k"], matrix: Float[Tensor, "d_dict d"]) -> Float[Tensor, "n d"]:
        """code @ matrix."""
        return F.embedding_bag(self.indices, matrix, per_sample_weights=values, mode="sum")

    def transposed_times(self, values: Float[Tensor, "n k"], matrix: Float[Tensor, "n d"]) -> Float[Tensor, "d_dict d"]:
        """codeᵀ @ matrix."""
        order, rows, starts = self.by_feature
        return F.embedding_bag(rows, matrix, starts, per_sample_weights=values.flatten()[order], mode="sum")

    def sums(self, values: Float[Tensor, "n k"]) -> Float[Tensor, " d_dict"]:
        """The column sums of the code."""
        return values.new_zeros(self.d_dict).index_add_(0, self.indices.flatten(), values.flatten())

    def sampled_product(self, left: Float[Tensor, "n d"], right: Float[Tensor, "d_dict d"]) -> Float[Tensor, "n k"]:
        """left @ rightᵀ, at the entries of the support only."""
        if left.is_cuda or torch.backends.mkl.is_available():
            return _sampled_product_csr(self.indices, left, right)
        return _sampled_product_portable(self.indices, left, right)


def _sampled_product_csr(
    indices: Int[Tensor, "n k"], left: Float[Tensor, "n d"], right: Float[Tensor, "d_dict d"]
) -> Float[Tensor, "n k"]:
    n, k = indices.shape
    row_starts = torch.arange(0, n * k + 1, k, device=left.device)
    pattern = torch.sparse_csr_tensor(
        row_starts, indices.flatten(), left.new_zeros(n * k), (n, len(right)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values().view(n, k)


def _sampled_product_portable(
    indices: Int[Tensor, "n k"], left: Float[Tensor, "n d"], right: Float[Tensor, "d_dict d"]
) -> Float[Tensor, "n k"]:
    """For torch without MKL: the same numbers as the gradient of an embedding bag in its weights, in twice the time."""
    with torch.enable_grad():
        weights = left.new_zeros(indices.shape, requires_grad=True)
        product = F.embedding_bag(indices, right.detach(), per_sample_weights=weights, mode="sum")
        return torch.autograd.grad(product, weights, left)[0]


class _Preactivations(torch.autograd.Function):
    """Selected entries of (x − b_dec) @ W_enc + b_enc, whose values are known already: this adds their backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, values: Tensor, support: Support
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.support = support
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        support: Support = ctx.support
        grad_x = grad_W_enc = grad_b_dec = None
        grad_b_enc = support.sums(grad)
        if ctx.needs_input_grad[0]:
            grad_x = support.times(grad, W_enc.T.contiguous())
        if ctx.needs_input_grad[1]:
            grad_W_enc = support.transposed_times(grad, x - b_dec).T
        if ctx.needs_input_grad[3]:
            grad_b_dec = -(W_enc @ grad_b_enc)
        return grad_x, grad_W_enc, grad_b_enc, grad_b_dec, None, None


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
    """The activations of a dictionary's features on `n` rows, `k` a row; features not listed are 0."""

    values: Float[Tensor, "n k"]
    support: Support

    @property
    def indices(self) -> Int[Tensor, "n k"]:
        """The features of `values`, ascending in each row."""
        return self.support.indices

    def to_dense(self) -> Float[Tensor, "n d_dict"]:
        """The same code with its zeros."""
        return self.values.new_zeros(len(self.values), self.support.d_dict).scatter(1, self.indices, self.values)


def encode_top_k(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_dict"],
    b_enc: Float[Tensor, " d_dict"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
) -> SparseCode:
    """relu of the `k` largest entries of (x − b_dec) @ W_enc + b_enc in each row, differentiable once."""
    with torch.no_grad():
        # Selecting before the relu gives the same code, and a top-k over values without ties at 0 is faster.
        values, indices = top_k(torch.addmm(b_enc, x - b_dec, W_enc), k)
    support = Support(indices, W_enc.shape[1])
    values = _Preactivations.apply(x, W_enc, b_enc, b_dec, values, support)
    return SparseCode(values.relu(), support)


def decode(code: SparseCode, W_dec: Float[Tensor, "d_dict d_out"]) -> Float[Tensor, "n d_out"]:
    """code @ W_dec, differentiable once in both."""
    return _Decode.apply(code.values, W_dec, code.support)
