"""Matching pursuit against the algorithm row by row, in closed form, and by finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from circuitbench import dictionaries
from circuitbench.dictionaries import evaluation
from circuitbench.dictionaries.base import Step
from circuitbench.errors import BadInput
from tests.dictionaries.examples import example

D_IN, D_DICT = 6, 20
NO_STOP = {"residual_threshold": 0.0, "stop_on_duplicate_support": False}


def pursuit(rows: Tensor | None = None, **settings: Any) -> dictionaries.Dictionary:
    d_dict = D_DICT if rows is None else len(rows)
    dictionary = dictionaries.build(
        "matching_pursuit", d_in=D_IN, d_dict=d_dict, dtype=torch.float64, seed=1, **settings
    )
    with torch.no_grad():
        dictionary.b_dec.copy_(torch.randn(D_IN))
        if rows is not None:
            dictionary.W_dec.copy_(rows)
    return dictionary


def row_by_row(dictionary: dictionaries.Dictionary, x: Tensor) -> Tensor:
    """The algorithm as a person would do it, on one row at a time."""
    settings, D = dictionary.settings, dictionary.W_dec.detach()
    codes = []
    for row in x:
        left, code = row - dictionary.b_dec.detach(), [0.0] * len(D)
        for _ in range(settings["max_iterations"]):
            products = [float(left @ direction) for direction in D]
            best = max(range(len(D)), key=lambda i: products[i])
            if products[best] <= 0:
                break
            again = code[best] != 0
            code[best] += products[best]
            left = left - products[best] * D[best]
            if (settings["stop_on_duplicate_support"] and again) or left.norm() < settings["residual_threshold"]:
                break
        codes.append(code)
    return torch.tensor(codes, dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "fewest", "most"),
    [
        ({}, 2, 6),
        ({"max_iterations": 3}, 1, 3),
        ({"max_iterations": 40, **NO_STOP}, 6, 20),
        ({"max_iterations": 40, "residual_threshold": 1.0, "stop_on_duplicate_support": False}, 0, 12),
        ({"max_iterations": 40, "residual_threshold": 0.0, "stop_on_duplicate_support": True}, 2, 20),
    ],
)
def test_the_code_is_that_of_the_algorithm_row_by_row(settings: dict[str, Any], fewest: int, most: int) -> None:
    dictionary = pursuit(**settings)
    x = 2 * torch.randn(30, D_IN, dtype=torch.float64)
    code = dictionary.encode(x)
    torch.testing.assert_close(code, row_by_row(dictionary, x))
    active = (code > 0).sum(1)
    assert (code >= 0).all() and active.min() >= fewest and active.max() <= most
    torch.testing.assert_close(dictionary(x), code @ dictionary.W_dec + dictionary.b_dec)
    torch.testing.assert_close(dictionary.encode(x[3:4]), code[3:4])  # a row does not depend on its neighbours
    torch.testing.assert_close(dictionary.travelling([7, 2]).encode(x), code[:, [7, 2]])


def test_orthogonal_features_are_taken_in_full() -> None:
    """Each direction and its opposite: the pursuit ends when every component is taken, and nothing is left."""
    axes = torch.linalg.qr(torch.randn(D_IN, D_IN, dtype=torch.float64))[0]
    rows = torch.cat([axes, -axes])
    dictionary = pursuit(rows, residual_threshold=0.0)
    x = torch.randn(30, D_IN, dtype=torch.float64)
    torch.testing.assert_close(dictionary.encode(x), ((x - dictionary.b_dec) @ rows.T).relu(), atol=1e-9, rtol=0)
    few = pursuit(rows, max_iterations=2, residual_threshold=0.0)
    few.load_state_dict(dictionary.state_dict())
    exact = ((x - dictionary.b_dec) @ rows.T).relu()
    largest = exact.topk(2, dim=1)
    torch.testing.assert_close(few.encode(x), torch.zeros_like(exact).scatter(1, largest.indices, largest.values))


def test_the_gradient_goes_through_all_rounds() -> None:
    rows = F.normalize(torch.randn(8, D_IN, dtype=torch.float64), dim=1)
    dictionary = pursuit(rows, max_iterations=4, **NO_STOP)
    x = torch.randn(4, D_IN, dtype=torch.float64)
    step = Step(0.5, torch.tensor([], dtype=torch.int64), {})
    names = [name for name, _ in dictionary.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(  # pyright: ignore[reportPrivateUsage]
            dictionary, dict(zip(names, values, strict=True))
        ):
            return dictionary.objective(x, x, step).loss

    values = [parameter.detach().clone().requires_grad_() for parameter in dictionary.parameters()]
    assert names == ["W_dec", "b_dec"]
    torch.testing.assert_close(loss(*values), (x - dictionary(x)).pow(2).mean())
    assert torch.autograd.gradcheck(loss, values, eps=1e-7, atol=1e-6)
    assert torch.autograd.gradcheck(lambda rows: dictionary.encode(rows).square().sum(), x.requires_grad_(), eps=1e-7)


def test_scaled_activations_have_a_scaled_code() -> None:
    dictionary = pursuit(residual_threshold=0.8)
    x = 2 * torch.randn(30, D_IN, dtype=torch.float64)
    code, out = dictionary.encode(x), dictionary(x)
    dictionary.fold_scale(torch.tensor(3.0), torch.tensor(3.0))
    torch.testing.assert_close(dictionary.encode(3 * x), 3 * code)
    torch.testing.assert_close(dictionary(3 * x), 3 * out)
    assert dictionary.settings["residual_threshold"] == pytest.approx(2.4)
    with pytest.raises(BadInput, match="by one number only"):
        dictionary.fold_scale(torch.ones(D_IN), torch.ones(D_IN))


def test_it_learns_the_features_of_its_data() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(24, 12, generator=generator), dim=1)
    code = torch.rand(6000, 24, generator=generator) * (torch.rand(6000, 24, generator=generator) < 2 / 24)
    x = code @ directions
    how: dict[str, Any] = {"d_dict": 24, "batch_size": 256, "progress": False, "lr": 0.01, "max_iterations": 4}
    start, end = (
        dictionaries.train(x[:5000], kind="matching_pursuit", steps=steps, **how).dictionary for steps in (1, 80)
    )
    fvu = [evaluation.reconstruction(d, x[5000:]).fvu for d in (start, end)]
    assert fvu[1] < 0.3 * fvu[0], fvu
    torch.testing.assert_close(end.W_dec.norm(dim=1), torch.ones(24))


def test_what_a_pursuit_has_not_is_refused() -> None:
    refused: tuple[dict[str, Any], ...] = ({"d_out": 4}, {"skip": True}, {"blocks": {"a": 2, "b": 4}})
    for sizes in refused:
        with pytest.raises(BadInput, match="matching pursuit encodes with its decoder"):
            dictionaries.build("matching_pursuit", d_in=6, d_dict=20, **sizes)
    stops: tuple[dict[str, Any], ...] = (
        {"max_iterations": 0},
        {"residual_threshold": -1.0},
        {"residual_threshold": float("nan")},
    )
    for wrong in stops:
        with pytest.raises(BadInput, match="must be at least 1 and at least 0"):
            pursuit(**wrong)
    dictionary = example("matching_pursuit")
    assert dict(dictionary.named_parameters()).keys() == {"W_dec", "b_dec"}
    with pytest.raises(BadInput, match="has no pre-activations"):
        dictionary.preactivations(torch.randn(3, 6))
    rows = torch.randn(64, 6)
    how: dict[str, Any] = {"kind": "matching_pursuit", "d_dict": 8, "steps": 2, "batch_size": 32, "progress": False}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"decoder_norm": "free"}, '"unit" or "tangent"'),
        ({"precision": "bfloat16"}, 'has "float32"'),
        ({"l0": 4}, "l0 is not an argument of kind 'matching_pursuit'; it takes max_iterations"),
    )
    for wrong, said in cases:
        with pytest.raises(BadInput, match=said):
            dictionaries.train(rows, **how, **wrong)
    dictionary.fold_decoder_norm()
    with torch.no_grad():
        dictionary.W_dec[0] *= 2
    with pytest.raises(BadInput, match="takes other features when decoder rows change their length"):
        dictionary.fold_decoder_norm()
