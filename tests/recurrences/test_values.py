"""Outputs and states are those of the paper's recurrence, and of Hugging Face's own code."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers.models.kimi_linear.modeling_kimi_linear import (
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from circuitbench.recurrences import gated_delta, kda, s6, ssd
from tests.recurrences import reference
from tests.recurrences.cases import Case, case, close, each_recurrence, each_shape

PRECISIONS = [(torch.float64, None, 1e-12), (torch.float32, None, 1e-5), (torch.float32, torch.float64, 2e-7)]


@pytest.mark.parametrize(("dtype", "accumulate", "tolerance"), PRECISIONS)
@each_shape
def test_forward_and_states_are_the_recurrence(name, sizes, dtype, accumulate, tolerance) -> None:
    layer = case(name, **sizes).to(dtype)
    y, states = reference.run(name, layer.operands, layer.initial_state, layer.D)
    options = {"initial_state": layer.initial_state, "accumulate": accumulate}
    ours, final = layer.module.forward(**layer.operands, D=layer.D, **options)
    close(ours, y, tolerance)
    close(final, states[:, -1], tolerance)
    close(layer.module.states(**layer.operands, **options), states, tolerance)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert final.dtype == (accumulate or dtype)


@each_recurrence
def test_a_run_in_two_parts_is_the_whole_run(name) -> None:
    layer = case(name)
    y, final = layer.module.forward(**layer.operands, initial_state=layer.initial_state)
    halves = [
        {k: v if k == "A" else v[:, part] for k, v in layer.operands.items()} for part in (slice(20), slice(20, 37))
    ]
    first, state = layer.module.forward(**halves[0], initial_state=layer.initial_state)
    second, last = layer.module.forward(**halves[1], initial_state=state)
    close(torch.cat((first, second), 1), y, 1e-5)
    close(last, final, 1e-5)


@each_recurrence
def test_without_an_initial_state_the_run_starts_from_zero(name) -> None:
    layer = case(name)
    zero = torch.zeros_like(layer.initial_state)
    for left, right in zip(
        layer.module.forward(**layer.operands), layer.module.forward(**layer.operands, initial_state=zero), strict=True
    ):
        assert torch.equal(left, right)


@each_recurrence
@pytest.mark.parametrize("chunk", [1, 7, 37, 100, None])
def test_iter_states_hands_out_the_states_in_order(name, chunk) -> None:
    layer = case(name)
    edits = {4: torch.zeros_like, 5: lambda h: -h, 30: layer.initial_state}
    options = {"initial_state": layer.initial_state, "edits": edits}
    states = layer.module.states(**layer.operands, **options)
    position = 0
    for start, part in layer.module.iter_states(**layer.operands, **options, chunk=chunk):
        assert start == position and part.shape[1] <= (chunk or 37)
        close(part, states[:, start : start + part.shape[1]], 1e-5)
        position += part.shape[1]
        part.zero_()  # what is handed out is the caller's
    assert position == 37


@each_recurrence
def test_decay_and_write_make_the_states(name) -> None:
    layer = case(name).to(torch.float64)
    decay = layer.module.decay_of(**layer.operands)
    write = layer.module.write_of(**layer.operands, initial_state=layer.initial_state)
    states = layer.module.states(**layer.operands, initial_state=layer.initial_state)
    before = torch.cat((layer.initial_state[:, None], states[:, :-1]), 1)
    decay = decay.reshape(*decay.shape, *[1] * (write.ndim - decay.ndim))
    close(decay * before + write, states, 1e-12)


def test_ssd_skip_may_differ_in_each_channel() -> None:
    layer = case("ssd")
    D = torch.randn(4, 3)
    y, _ = reference.run("ssd", layer.operands, layer.initial_state, D)
    close(ssd.forward(**layer.operands, D=D, initial_state=layer.initial_state)[0], y, 1e-5)


@each_recurrence
def test_bfloat16_stays_within_three_percent(name) -> None:
    layer = case(name, length=70)
    y, states = reference.run(name, layer.operands, layer.initial_state, layer.D)
    half = layer.to(torch.bfloat16)
    ours, final = half.module.forward(**half.operands, D=half.D, initial_state=half.initial_state)
    assert ours.dtype == torch.bfloat16 and final.dtype == torch.float32
    close(ours, y, 3e-2)
    close(final, states[:, -1], 3e-2)
    exact, _ = reference.run(name, half.operands, half.initial_state, half.D)
    close(ours, exact, 2**-8)  # nothing is lost but the rounding of y itself


@each_recurrence
@pytest.mark.parametrize("scale", [0.0, 1e-6, 30.0, 1e5])
def test_extreme_decays_stay_finite_and_right(name, scale) -> None:
    layer = case(name, length=150)
    log_decay = "g" if name in ("gated_delta", "kda") else "A"
    layer.operands[log_decay] = layer.operands[log_decay] * scale
    check(layer)


@each_recurrence
def test_one_vanishing_decay_costs_the_later_ones_no_digits(name) -> None:
    # A difference of running sums would: after a step of -1e6 the sum has no digits left for steps of -0.01.
    layer = case(name, length=100)
    if name in ("gated_delta", "kda"):
        layer.operands["g"][:] = -0.01
        layer.operands["g"][:, 40] = -1e6
    else:
        layer.operands["A"][:] = -1.0
        layer.operands["dt"][:] = 0.01
        layer.operands["dt"][:, 40] = 1e6
        layer.operands["x"][:, 40] = 0.0
    check(layer)


def check(layer: Case) -> None:
    for value in (*layer.operands.values(), layer.initial_state):
        value.requires_grad_()
    y, states = reference.run(layer.name, layer.operands, layer.initial_state)
    ours, final = layer.module.forward(**layer.operands, initial_state=layer.initial_state)
    close(ours, y, 1e-5)
    close(final, states[:, -1], 1e-5)
    inputs = [*layer.operands.values(), layer.initial_state]
    weights = torch.randn_like(ours)
    for grad, expected in zip(
        torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(y, inputs, weights.double()), strict=True
    ):
        assert torch.isfinite(grad).all()
        close(grad, expected, 1e-5)


def test_s6_is_hugging_faces_scan() -> None:
    layer = case("s6")
    o = {key: value.transpose(1, 2) if key in ("x", "dt", "B", "C") else value for key, value in layer.operands.items()}
    theirs = inspect.unwrap(mamba_selective_scan)
    y, final = theirs(o["x"], o["dt"], o["A"], o["B"], o["C"], D=layer.D, return_last_state=True)
    ours, state = s6.forward(**layer.operands, D=layer.D)
    close(ours, y.transpose(1, 2), 1e-5)
    close(state, final, 1e-5)


def test_ssd_is_hugging_faces_scan() -> None:
    layer = case("ssd")
    o = layer.operands
    theirs = inspect.unwrap(mamba2_chunk_scan)
    y, final = theirs(
        *o.values(), 16, D=layer.D, initial_states=layer.initial_state, return_final_states=True, dt_softplus=False
    )
    ours, state = ssd.forward(**o, D=layer.D, initial_state=layer.initial_state)
    close(ours, y, 1e-5)
    close(state, final, 1e-5)


def test_gated_delta_is_hugging_faces_rule() -> None:
    layer = case("gated_delta")
    x, k, q, g, beta = layer.operands.values()
    q = F.normalize(q, dim=-1)
    y, final = inspect.unwrap(torch_chunk_gated_delta_rule)(
        q, k, x, g, beta, initial_state=layer.initial_state, output_final_state=True
    )
    ours, state = gated_delta.forward(x, k, q * q.shape[-1] ** -0.5, g, beta, initial_state=layer.initial_state)
    close(ours, y, 1e-5)
    close(state, final, 1e-5)


@pytest.mark.parametrize("function", [chunk_kimi_delta_attention, recurrent_kimi_delta_attention])
def test_kda_is_hugging_faces_attention(function) -> None:
    layer = case("kda")
    x, k, q, g, beta = layer.operands.values()
    q = F.normalize(q, dim=-1)
    y, final = inspect.unwrap(function)(q, k, x, g, beta, initial_state=layer.initial_state, output_final_state=True)
    ours, state = kda.forward(x, k, q * q.shape[-1] ** -0.5, g, beta, initial_state=layer.initial_state)
    close(ours, y, 1e-5)
    close(state, final, 1e-5)
