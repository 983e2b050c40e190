"""The mixers of RecurrentGemma, RWKV-4 and xLSTM for one prompt, step by step in float64, as in `reference`.

RWKV-4 and xLSTM are computed in natural units, without the running maximum that the models divide by; their states are
compared in the models' units, exp(m).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.architectures.reference import Edit, causal_taps, linear, sigmoid, softplus, unchanged, weights_of


def gelu(value: Tensor) -> Tensor:
    """The approximation with a tanh."""
    return value / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def recurrent_gemma(
    module: Any, hidden: Tensor, edit: Edit = unchanged, when: str = "before_read"
) -> dict[str, Tensor]:
    """De et al. 2024, figure 2c and equations 1 to 4."""
    w = weights_of(module)
    gate, projected = linear(w, "linear_y", hidden), linear(w, "linear_x", hidden)
    conv = causal_taps(w, "conv_1d", projected)
    heads = conv.unflatten(-1, (w["rg_lru.input_gate_weight"].shape[0], -1))
    i, r = (
        sigmoid(torch.einsum("thc,hcd->thd", heads, w[f"rg_lru.{g}_gate_weight"]) + w[f"rg_lru.{g}_gate_bias"])
        for g in ("input", "recurrent")
    )
    i, r = i.flatten(1), r.flatten(1)
    decay = torch.exp(-8 * softplus(w["rg_lru.recurrent_param"]) * r)
    x = (1 - decay**2).sqrt() * i * conv
    decay[0], x[0] = 0, (i * conv)[0]  # a document begins
    state, states, outputs = torch.zeros_like(x[0]), [], []
    for t in range(len(x)):
        state = decay[t] * state + x[t]
        read, state = state, edit(t, state)
        states.append(state)
        outputs.append(read if when == "after_read" else state)
    y = torch.stack(outputs)
    gated = y * gelu(gate)
    return {
        "gate": gate, "in_proj": projected, "conv": conv, "input_gate": i, "recurrence_gate": r, "x": x,
        "decay": decay, "write": x, "state": torch.stack(states), "y": y, "gated": gated,
        "out": linear(w, "linear_out", gated),
    }  # fmt: skip


def rwkv(module: Any, hidden: Tensor, edit: Edit = unchanged, when: str = "after_read") -> dict[str, Tensor]:
    """Peng et al. 2023, section 4: a weighted mean of the values before, and of the present one with a bonus."""
    w = weights_of(module)
    before = torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]])
    gate, k, x = (
        linear(w, name, mix[0] * hidden + (1 - mix[0]) * before)
        for name, mix in ((name, w[f"time_mix_{name}"]) for name in ("receptance", "key", "value"))
    )
    log_decay = -torch.exp(w["time_decay"])
    num, den, m = torch.zeros_like(x[0]), torch.zeros_like(x[0]), torch.full_like(x[0], -1e30)
    scales, decays, writes, states, outputs = [], [], [], [], []
    for t in range(len(x)):
        bonus = torch.exp(w["time_first"] + k[t])
        outputs.append((num + bonus * x[t]) / (den + bonus))
        largest = torch.maximum(m + log_decay, k[t])
        decays.append(torch.exp(m + log_decay - largest))
        writes.append(torch.stack([torch.exp(k[t] - largest) * x[t], torch.exp(k[t] - largest)], -1))
        num = torch.exp(log_decay) * num + torch.exp(k[t]) * x[t]
        den = torch.exp(log_decay) * den + torch.exp(k[t])
        m = largest
        states.append(edit(t, torch.stack([num, den], -1) * torch.exp(-m)[:, None]))
        num, den = (states[-1] * torch.exp(m)[:, None]).unbind(-1)
        scales.append(m)
    y = torch.stack(outputs)
    gated = sigmoid(gate) * y
    every = module.config.rescale_every
    undone = 2.0 ** (module.layer_id // every) if every else 1.0  # the weights have been divided by it
    return {
        "gate": gate, "k": k, "x": x, "scale": torch.stack(scales), "decay": torch.stack(decays),
        "write": torch.stack(writes), "state": torch.stack(states), "y": y, "gated": gated,
        "out": linear(w, "output", gated) * undone,
    }  # fmt: skip


def xlstm(module: Any, hidden: Tensor, edit: Edit = unchanged, when: str = "before_read") -> dict[str, Tensor]:
    """Beck et al. 2024, section 2.3, with the soft caps of xLSTM 7B; the denominator is at least 1 in natural units."""
    w, config = weights_of(module), module.config
    q, k, x = (linear(w, name, hidden).unflatten(-1, (config.num_heads, -1)) for name in "qkv")
    cap = config.gate_soft_cap
    i, f = (cap * torch.tanh(linear(w, f"{name}_preact", hidden) / cap) for name in ("igate", "fgate"))
    gate, q = linear(w, "ogate_preact", hidden), q / q.shape[-1] ** 0.5
    memory, m = torch.zeros(*k.shape[1:], x.shape[2] + 1, dtype=torch.float64), torch.zeros_like(i[0])
    scales, decays, writes, states, outputs = [], [], [], [], []
    for t in range(len(x)):
        columns = torch.cat([x[t], torch.ones_like(x[t, :, :1])], -1)
        largest = torch.maximum(m - softplus(-f[t]), i[t])
        unit = torch.exp(largest)[:, None, None]
        decays.append(sigmoid(f[t]) * torch.exp(m - largest))
        added = torch.exp(i[t])[:, None, None] * k[t, :, :, None] * columns[:, None]
        writes.append(added / unit)
        memory = sigmoid(f[t])[:, None, None] * memory + added
        read, state = memory, edit(t, memory / unit)
        memory, m = state * unit, largest
        states.append(state)
        scales.append(m)
        sums = torch.einsum("hkv,hk->hv", read if when == "after_read" else memory, q[t])
        least = torch.maximum(sums[:, -1:].abs(), torch.ones_like(sums[:, -1:]))
        outputs.append(sums[:, :-1] / (least + config.eps * unit[..., 0]))
    y = torch.stack(outputs)
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    normed = normed * w["multihead_norm.weight"].unflatten(-1, normed.shape[1:])
    if "multihead_norm.bias" in w:
        normed = normed + w["multihead_norm.bias"].unflatten(-1, normed.shape[1:])
    gated = sigmoid(gate) * normed.flatten(1)
    return {
        "x": x, "B": k, "C": q, "input_gate": i, "forget_gate": f, "scale": torch.stack(scales),
        "decay": torch.stack(decays), "write": torch.stack(writes), "state": torch.stack(states), "y": y,
        "normed": normed, "gate": gate, "gated": gated, "out": linear(w, "out_proj", gated),
    }  # fmt: skip


MIXERS = {"recurrent_gemma": recurrent_gemma, "rwkv": rwkv, "xlstm": xlstm}
