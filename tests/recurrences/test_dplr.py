"""The chunked core of RWKV-7 and KDA is the loop, whatever size of blocks the decays allow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from circuitbench.recurrences import _dplr
from circuitbench.recurrences._dplr import CHUNK, _safe_block, dplr_forward
from tests.recurrences.cases import close


def operands(steepest: float, with_back: bool, length: int = 70) -> dict[str, Tensor]:
    keys = (2, length, 3, 4)
    k, r, probe = torch.randn(keys), torch.randn(keys), F.normalize(torch.randn(keys), dim=-1)
    decay = torch.exp(-steepest * torch.rand(keys))
    decay[0, 0, 0, 0] = torch.exp(torch.tensor(-steepest))
    steps = {"decay": decay, "probe": probe, "k": k, "r": r, "x": torch.randn(2, length, 3, 5)}
    if with_back:
        return {**steps, "back": -probe * torch.rand(keys)}
    return {**steps, "k": probe * torch.rand(keys), "probe": probe * decay}


def loop(steps: dict[str, Tensor], S: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(steps["x"].shape[1]):
        now = {key: value[:, t].double() for key, value in steps.items()}
        asked = torch.einsum("bhk,bhkv->bhv", now["probe"], S)
        back = now["back"] if "back" in now else -now["k"]
        S = (
            now["decay"][..., None] * S
            + torch.einsum("bhk,bhv->bhkv", back, asked)
            + torch.einsum("bhk,bhv->bhkv", now["k"], now["x"])
        )
        outputs.append(torch.einsum("bhk,bhkv->bhv", now["r"], S))
    return torch.stack(outputs, 1), S


@pytest.fixture(autouse=True)
def few_chunks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dplr, "TOGETHER", 2 * 3 * 4 * CHUNK)  # one, of these sizes


def compare(steps: dict[str, Tensor]) -> None:
    state = torch.randn(2, 3, 4, 5)
    inputs = [value.requires_grad_() for value in (*steps.values(), state)]
    y, final = dplr_forward(steps, state, None, "before_read", [])
    expected, last = loop(steps, state.double())
    close(y, expected, 2e-6)
    close(final, last, 2e-6)
    weights = torch.randn_like(y)
    for grad, right in zip(
        torch.autograd.grad(y, inputs, weights), torch.autograd.grad(expected, inputs, weights.double()), strict=True
    ):
        close(grad, right, 1e-5)


@pytest.mark.parametrize("with_back", [True, False])
@pytest.mark.parametrize(("steepest", "block"), [(0.01, 32), (0.62, 32), (0.7, 16), (2.4, 8), (3.0, 1), (30.0, 1)])
def test_every_size_of_block_is_the_loop(steepest, block, with_back) -> None:
    steps = operands(steepest, with_back)
    assert _safe_block(steps["decay"], CHUNK) == block
    compare(steps)


@pytest.mark.parametrize("with_back", [True, False])
@pytest.mark.parametrize("value", [0.0, -0.7, 1.5, 1e-38])
def test_decays_of_any_sign_and_size_are_the_loop(value, with_back) -> None:
    steps = operands(0.5, with_back)
    steps["decay"][:, 10:13, 1] = value
    compare(steps)
