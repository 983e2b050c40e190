"""Sparse codes against dense linear algebra: the same numbers and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries import selection, sparse

N, D_IN, D_DICT, K = 40, 12, 96, 5


def dense_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> Tensor:
    """What TopK means, written with a threshold and no indices."""
    pre = (x - b_dec) @ W_enc + b_enc
    threshold = pre.sort(dim=-1, descending=True).values[..., k - 1 : k]
    return torch.where(pre >= threshold, pre, 0).relu()


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    shapes = {"x": (N, D_IN), "W_enc": (D_IN, D_DICT), "b_enc": (D_DICT,), "W_dec": (D_DICT, D_IN), "b_dec": (D_IN,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def topk_from(tensors: dict[str, Tensor], k: int = K) -> dictionaries.Dictionary:
    return dictionaries.from_weights("topk", **{n: t for n, t in tensors.items() if n != "x"}, k=k)


@pytest.mark.parametrize("k", [1, K, 60, D_DICT])
def test_encode_and_forward_equal_the_dense_reference(tensors: dict[str, Tensor], k: int) -> None:
    dictionary = topk_from(tensors, k)
    x, b_dec = tensors["x"], tensors["b_dec"]
    code = dense_encode(x, tensors["W_enc"], tensors["b_enc"], b_dec, k)
    torch.testing.assert_close(dictionary.encode(x), code)
    torch.testing.assert_close(dictionary(x), code @ tensors["W_dec"] + b_dec)
    torch.testing.assert_close(dictionary.decode(code), code @ tensors["W_dec"] + b_dec)
    stacked = x.unflatten(0, (4, 2, 5))
    torch.testing.assert_close(dictionary.encode(stacked), code.unflatten(0, (4, 2, 5)))
    torch.testing.assert_close(dictionary(stacked), dictionary(x).unflatten(0, (4, 2, 5)))
    torch.testing.assert_close(dictionary.encode(x[3]), code[3])
    torch.testing.assert_close(dictionary(x[3]), dictionary(x)[3])


def test_gradients_equal_those_of_the_dense_reference(tensors: dict[str, Tensor]) -> None:
    dictionary = topk_from(tensors)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    code = dense_encode(leaves["x"], leaves["W_enc"], leaves["b_enc"], leaves["b_dec"], K)
    weight = torch.randn(N, D_IN, dtype=torch.float64)
    penalty = torch.randn(N, D_DICT, dtype=torch.float64)
    expected = torch.autograd.grad(
        ((code @ leaves["W_dec"] + leaves["b_dec"]) * weight).sum() + (code * penalty).sum(), list(leaves.values())
    )

    x = tensors["x"].clone().requires_grad_()
    ours = {"x": x, **dict(dictionary.named_parameters())}
    sparse_code = dictionary.encode_sparse(x)
    loss = (dictionary.decode(sparse_code) * weight).sum() + (sparse_code.to_dense() * penalty).sum()
    gradients = torch.autograd.grad(loss, [ours[name] for name in leaves])
    for name, gradient, reference in zip(leaves, gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, msg=name)


def test_products_need_no_mkl(tensors: dict[str, Tensor]) -> None:
    """The portable path of the one product that prefers MKL gives the same numbers."""
    indices = torch.rand(N, D_DICT).topk(K).indices.sort(1).values
    left, right = tensors["x"], tensors["W_dec"]
    expected = (left @ right.T).gather(1, indices)
    support = sparse.Support.of_indices(indices, D_DICT)
    for product in (sparse._sampled_product_portable, sparse._sampled_product_csr):
        torch.testing.assert_close(product(support, left, right).view(N, K), expected)


def test_products_of_rows_of_any_length(tensors: dict[str, Tensor]) -> None:
    """Codes with empty rows, full rows and unused features: every product equals the dense one."""
    dense = torch.randn(N, D_DICT, dtype=torch.float64).relu() * (torch.rand(N, D_DICT) < 0.1)
    dense[0], dense[-1], dense[:, 7] = 0, 0, 0
    dense[3] = torch.rand(D_DICT, dtype=torch.float64) + 0.1
    code = sparse.SparseCode.of_dense(dense)
    assert torch.equal(code.to_dense(), dense)
    assert code.l0 == (dense > 0).sum() / N
    left, right = tensors["x"], tensors["W_dec"]
    torch.testing.assert_close(code.support.times(code.values, right), dense @ right)
    torch.testing.assert_close(code.support.transposed_times(code.values, left), dense.T @ left)
    torch.testing.assert_close(code.support.sums(code.values), dense.sum(0))
    expected = (left @ right.T)[dense > 0]
    torch.testing.assert_close(code.support.sampled_product(left, right), expected)
    torch.testing.assert_close(sparse._sampled_product_portable(code.support, left, right), expected)


@pytest.mark.parametrize("guess", [0.0, 0.5, 1.2, 50.0])
@pytest.mark.parametrize("count", [1, 300, N * D_DICT])
def test_the_largest_of_a_batch_do_not_depend_on_the_guess(count: int, guess: float) -> None:
    scores = torch.randn(N, D_DICT, dtype=torch.float64)
    values, support = selection.top_of_batch(scores, count, guess)
    expected = scores.flatten().topk(min(count, int((scores > 0).sum()))).values
    torch.testing.assert_close(values.sort(descending=True).values, expected, rtol=0, atol=0)
    assert torch.equal(scores[support.rows, support.columns], values)


@pytest.mark.parametrize(("d_dict", "k"), [(96, 5), (1024, 16), (1000, 3), (4096, 32), (800, 50)])
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
def test_top_k_in_two_rounds_is_the_top_k(d_dict: int, k: int, tied: bool) -> None:
    scores = torch.randn(64, d_dict)
    if tied:
        scores = scores.round()
    values, indices = selection.top_k(scores, k)
    torch.testing.assert_close(values.sort(1, descending=True).values, scores.topk(k).values, rtol=0, atol=0)
    assert torch.equal(scores.gather(1, indices), values)
    assert (indices.diff(dim=1) > 0).all(), "columns ascend and none appears twice"


def test_features_that_never_fire_get_no_gradient() -> None:
    """The transposed products must leave gaps where no row uses a feature, also at both ends."""
    x = torch.eye(4, 6)
    W = torch.zeros(6, 10)
    W[0, 3] = W[1, 3] = W[2, 7] = W[3, 7] = 1.0
    dictionary = dictionaries.from_weights("topk", W_enc=W, W_dec=W.T.clone(), k=1)
    dictionary(x).sum().backward()
    assert dictionary.W_enc.grad is not None and dictionary.W_dec.grad is not None
    assert set(dictionary.W_enc.grad.abs().sum(0).nonzero().flatten().tolist()) == {3, 7}
    assert set(dictionary.W_dec.grad.abs().sum(1).nonzero().flatten().tolist()) == {3, 7}
