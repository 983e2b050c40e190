"""Loss values and gradients against autograd on dense definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries import losses
from circuitbench.errors import BadInput

N, D_IN, D_DICT, K = 30, 10, 48, 3


def build() -> dictionaries.TopK:
    dictionary = dictionaries.build("topk", d_in=D_IN, d_dict=D_DICT, k=K, dtype=torch.float64)
    assert isinstance(dictionary, dictionaries.TopK)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return dictionary


def dense_auxk(
    x: Tensor, dead: Tensor, k_aux: int, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Tensor:
    """The paper's definition over all features, with dead ones told apart by −∞."""
    pre = (x - b_dec) @ W_enc + b_enc
    live = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0) * pre.relu()
    error = (x - (live @ W_dec + b_dec)).detach()
    masked = torch.where(dead, pre, -torch.inf)
    kept = torch.zeros_like(pre).scatter(1, masked.topk(k_aux).indices, 1.0) * dead
    estimate = (kept * pre.relu()) @ W_dec
    return (error - estimate).pow(2).sum() / (error - error.mean(0)).pow(2).sum()


@pytest.mark.parametrize(("n_dead", "k_aux"), [(20, None), (20, 2), (3, None), (D_DICT, 7)])
def test_auxk_and_its_gradients_equal_the_dense_definition(n_dead: int, k_aux: int | None) -> None:
    dictionary = build()
    x = torch.randn(N, D_IN, dtype=torch.float64)
    dead = torch.zeros(D_DICT, dtype=torch.bool)
    dead[torch.randperm(D_DICT)[:n_dead]] = True
    parameters = dict(dictionary.named_parameters())
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}
    expected = dense_auxk(x, dead, min(n_dead, D_IN // 2 if k_aux is None else k_aux), **copies)
    loss = losses.auxk(dictionary, x, dead, k_aux=k_aux)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(losses.auxk(dictionary, x, dead.nonzero().flatten(), k_aux=k_aux), expected)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    references = torch.autograd.grad(expected, [copies[name] for name in parameters])
    for name, gradient, reference in zip(parameters, gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, msg=name)


def test_auxk_moves_the_encoder_of_dead_features_and_of_no_others() -> None:
    dictionary = build()
    dead = torch.arange(D_DICT) < 20
    losses.auxk(dictionary, torch.randn(N, D_IN, dtype=torch.float64), dead).backward()
    for gradient in (dictionary.W_enc.grad.norm(dim=0), dictionary.W_dec.grad.norm(dim=1)):
        assert (gradient[dead] > 0).all()
        assert (gradient[~dead] == 0).all()


def test_descending_auxk_makes_dead_features_explain_what_is_left_over() -> None:
    """Features that the data never needs first are taught by AuxK alone until they explain part of the error."""
    x = torch.randn(200, D_IN, dtype=torch.float64)
    dictionary = build()
    dead = torch.arange(D_DICT) >= 16
    before = losses.auxk(dictionary, x, dead).item()
    optimizer = torch.optim.Adam(dictionary.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        torch.autograd.backward(losses.auxk(dictionary, x, dead))
        optimizer.step()
    assert losses.auxk(dictionary, x, dead).item() < 0.7 * before


def test_auxk_of_no_dead_feature_is_zero() -> None:
    loss = losses.auxk(build(), torch.randn(N, D_IN, dtype=torch.float64), torch.zeros(D_DICT, dtype=torch.bool))
    assert loss.item() == 0


def test_wrong_masks_are_refused() -> None:
    x = torch.randn(N, D_IN, dtype=torch.float64)
    with pytest.raises(BadInput, match=r"mask of dead features has shape \(5,\); it must be \(48,\)"):
        losses.auxk(build(), x, torch.ones(5, dtype=torch.bool))
    with pytest.raises(BadInput, match="the features are 0 to 47"):
        losses.auxk(build(), x, torch.tensor([48]))


def test_squared_error_is_the_mean_over_rows() -> None:
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    assert losses.squared_error(x, y).item() == pytest.approx(
        sum(((a - b) @ (a - b)).item() for a, b in zip(x, y, strict=True)) / 7
    )
