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
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu
from transformers.models.xlstm.modeling_xlstm import mlstm_chunkwise_native_autograd, mlstm_recurrent_sequence_native

from circuitbench.recurrences import gated_delta, kda, mlstm, rg_lru, s6, ssd, wkv4
from tests.recurrences import reference
from tests.recurrences.cases import RATIOS, Case, case, close, each_recurrence, each_shape

LOG_DECAY = {
    "gated_delta": "g",
    "kda": "g",
    "rwkv7": "w",
    "wkv4": "w",
    "mlstm": "forget_gate",
}  # the operand that holds it; elsewhere it is dt·A
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
    halves = [layer.part(slice(20)), layer.part(slice(20, 37))]
    if "initial_scale" in layer.operands:  # the state is in its units, and says nothing without them
        halves[1]["initial_scale"] = layer.module.scale_of(**halves[0])[:, -1]
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
    if name == "rg_lru":  # given as the decay itself
        layer.operands["a"] = layer.operands["a"] ** scale
    else:
        log_decay = LOG_DECAY.get(name, "A")
        layer.operands[log_decay] = layer.operands[log_decay] * scale
    check(layer)


@each_recurrence
def test_one_vanishing_decay_costs_the_later_ones_no_digits(name) -> None:
    # A difference of running sums would: after a step of -1e6 the sum has no digits left for steps of -0.01.
    layer = case(name, length=100)
    if name == "wkv4":  # its decay is the same at every position
        return
    if name == "rg_lru":
        layer.operands["a"][:] = 0.99
        layer.operands["a"][:, 40] = 0.0
    elif name in LOG_DECAY:
        layer.operands[LOG_DECAY[name]][:] = -0.01
        layer.operands[LOG_DECAY[name]][:, 40] = -1e6
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
    exact = torch.autograd.grad(y, inputs, weights.double())
    largest = max(grad.abs().max().item() for grad in exact)
    for grad, expected in zip(torch.autograd.grad(ours, inputs, weights), exact, strict=True):
        assert torch.isfinite(grad).all()
        # The units of a state cancel out of y, and leave the rounding of what cancels.
        scale = largest if layer.name in RATIOS else expected.abs().max().item()
        assert (grad.double() - expected).abs().max().item() <= 1e-5 * max(scale, 1e-12)


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


def test_rg_lru_is_hugging_faces_scan() -> None:
    layer = case("rg_lru")
    x, a = layer.operands.values()
    reset = a == 0
    y, final = RecurrentGemmaRglru._rnn_scan(None, x, a, reset, layer.initial_state)
    ours, state = rg_lru.forward(x, a, initial_state=layer.initial_state)
    close(ours, y, 1e-6)
    close(state, final, 1e-6)


def test_wkv4_is_hugging_faces_operator_and_its_state_is_the_cache() -> None:
    layer = case("wkv4")
    x, k, w, u, scale = layer.operands.values()
    cached = [*layer.initial_state.unbind(-1), scale]
    y, final = rwkv_linear_attention_cpu((-w).log(), u, k, x, state=cached, return_state=True)
    ours, state = wkv4.forward(**layer.operands, initial_state=layer.initial_state)
    close(ours, y, 1e-6)
    close(state, torch.stack(final[:2], -1), 1e-6)
    close(wkv4.scale_of(**layer.operands)[:, -1], final[2], 1e-6)
    from_nothing, _ = rwkv_linear_attention_cpu((-w).log(), u, k, x)
    close(wkv4.forward(x, k, w, u)[0], from_nothing, 1e-6)


def test_the_weights_of_rwkv4_sum_to_one() -> None:
    layer = case("wkv4")
    weights = wkv4.mixing(**layer.operands, channels=[0, 4])
    close(weights.sum(-1), torch.ones(2, 2, 37), 1e-6)
    assert (weights >= 0).all()
    with_state = wkv4.mixing(**layer.operands, channels=[0, 4], initial_state=layer.initial_state)
    assert (with_state.sum(-1)[..., 0] < 1).all()


def test_the_state_of_rwkv4_needs_its_units(as_users_have_it) -> None:
    layer = case("wkv4")
    del layer.operands["initial_scale"]
    with pytest.raises(ValueError, match=r"in units of exp\(initial_scale\); give initial_scale"):
        wkv4.forward(**layer.operands, initial_state=layer.initial_state)


@pytest.mark.parametrize("chunk", [None, 8])
def test_mlstm_is_hugging_faces_sequence_and_chunkwise_code(chunk) -> None:
    layer = case("mlstm", length=40)
    x, k, q, i, f, scale, eps = layer.operands.values()
    given = [v.transpose(1, 2) for v in (q * q.shape[-1] ** 0.5, k, x, i, f)]
    start = (layer.initial_state[..., :-1], layer.initial_state[..., -1], scale[..., None])
    theirs = mlstm_recurrent_sequence_native if chunk is None else mlstm_chunkwise_native_autograd
    y, final = theirs(*given, *start, return_last_states=True, eps=eps.item(), chunk_size=chunk)
    ours, state = mlstm.forward(**layer.operands, initial_state=layer.initial_state)
    close(ours, y.transpose(1, 2), 1e-5)
    close(state, torch.cat((final[0], final[1][..., None]), -1), 1e-5)
    close(mlstm.scale_of(**layer.operands)[:, -1], final[2][..., 0], 1e-6)
