"""Learning rates and k move over a run as their closed forms say; gradients are no longer than they may be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries.recipe import Recipe, recipe
from circuitbench.dictionaries.run import Run
from circuitbench.errors import BadInput
from tests.dictionaries.planted import planted

COMMON = {"d_dict": 48, "steps": 200, "batch_size": 64}


def made(**settings: object) -> Recipe:
    return recipe({"x": 16}, **COMMON | settings)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return planted(300, d_in=16, n_features=40, active=3)[0]


def test_linear_rises_stays_and_falls() -> None:
    one = made(lr=0.5, lr_warmup=0.1, lr_decay=0.25)
    for step in range(200):
        if step < 20:
            expected = 0.5 * (step + 1) / 20
        elif step < 150:
            expected = 0.5
        else:
            expected = 0.5 * (200 - step) / 50
        assert one.learning_rate(step) == pytest.approx(expected)


def test_cosine_falls_along_half_a_cosine() -> None:
    one = made(lr=0.5, lr_schedule="cosine", lr_warmup=0.0, lr_decay=1.0)
    for step in range(200):
        assert one.learning_rate(step) == pytest.approx(0.25 * (1 + math.cos(math.pi * step / 200)))
    late = made(lr=0.5, lr_schedule="cosine", lr_decay=0.5)
    assert late.learning_rate(99) == 0.5 and late.learning_rate(150) == pytest.approx(0.25)


def test_constant_does_not_fall() -> None:
    one = made(lr=0.5, lr_schedule="constant", lr_warmup=0.1)
    assert [one.learning_rate(step) for step in (0, 9, 19, 199)] == pytest.approx([0.025, 0.25, 0.5, 0.5])


def test_the_optimizer_is_given_the_schedule(rows: Tensor) -> None:
    run = Run(made(lr=0.5, lr_schedule="cosine", steps=7), {"x": rows})
    for step in range(7):
        run.train_on({"x": rows[:64]})
        assert run.optimizer.param_groups[0]["lr"] == run.recipe.learning_rate(step)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_k_moves_from_its_start_to_its_end(rows: Tensor, kind: str) -> None:
    settings = {"d_dict": 48, "batch_size": 64, "progress": False, "log_every": 1, "dtype": torch.float64}
    result = dictionaries.train(rows, kind=kind, k=3, k_start=11, k_anneal=0.5, steps=16, **settings)
    # 8 steps down from 11 to 3, one a step, and 8 at the end. Values below 0 do not count: few, and none in BatchTopK.
    expected = [*range(11, 3, -1), *[3] * 8]
    assert result.history["l0"] == pytest.approx(expected, rel=0.03 if kind == "topk" else 1e-12)
    assert result.dictionary.settings["k"] == 3
    early = dictionaries.train(rows, kind=kind, k=3, k_start=11, k_anneal=0.0, steps=16, **settings)
    assert early.history["l0"] == pytest.approx([3] * 16, rel=0.03)


def test_gradients_are_shortened_together(rows: Tensor) -> None:
    """In the first step: to the length asked for, all by one factor; shorter ones are left alone."""
    gradients = {}
    for limit in (None, 1e-3, 1e3):
        run = Run(made(max_grad_norm=limit, dtype=torch.float64), {"x": rows})
        run.train_on({"x": rows[:64]})
        gradients[limit] = torch.cat([parameter.grad.flatten() for parameter in run.parameters])
    length = gradients[None].norm()
    assert 1e-3 < length < 1e3
    torch.testing.assert_close(gradients[1e-3], gradients[None] * 1e-3 / length, rtol=2e-3, atol=0)
    assert gradients[1e-3].norm().item() == pytest.approx(1e-3, rel=2e-3)
    assert torch.equal(gradients[1e3], gradients[None])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_schedule": "step"}, "lr_schedule='step' was given; it is one of 'linear', 'cosine', 'constant'"),
        ({"lr_schedule": "constant", "lr_decay": 0.5}, "lr_decay=0.5 was given with lr_schedule='constant'"),
        ({"lr_warmup": 1.5}, "lr_warmup=1.5 was given; it is a share of the run"),
        ({"k_start": 99}, "k_start=99 was given; it must lie between 1 and d_dict = 48"),
        ({"kind": "standard", "k_start": 9}, "kind 'standard' has no k"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 was given; it must be above 0"),
        ({"lr": -1.0}, "lr=-1.0 was given; it must be above 0"),
        ({"resample_every": 0}, "resample_every=0 was given"),
        ({"precision": "float16"}, "precision='float16' was given"),
        ({"precision": "bfloat16", "dtype": torch.float64}, "'bfloat16' goes with torch.float32"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        made(**settings)
