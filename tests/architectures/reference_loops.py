"""The mixers of Zamba and MiniMax for one prompt, step by step in float64, from the papers and their own weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.architectures.reference import Edit, causal_conv, rms, silu, softplus, unchanged, weights_of


def zamba(module: Any, hidden: Tensor, edit: Edit = unchanged, when: str = "before_read") -> dict[str, Tensor]:
    """A Mamba block whose channels are cut into heads after the convolution, each with a dt, B and C of its own."""
    w, hidden = weights_of(module), hidden.double()
    heads, n, rank = module.n_mamba_heads, module.ssm_state_size, module.time_step_rank
    projected = hidden @ w["in_proj.weight"].T
    x, gate = projected[:, 0::2], projected[:, 1::2]  # in turn, channel by channel
    x = conv = causal_conv(w, x)
    x = x.unflatten(-1, (heads, -1))
    parts = torch.stack([x[:, h] @ w["x_proj_weight"][h].T for h in range(heads)], 1)
    low_rank, B, C = parts.split([rank, n, n], dim=-1)
    dt = softplus(torch.stack([low_rank[:, h] @ w["dt_proj_weight"][h].T for h in range(heads)], 1) + w["dt_proj_bias"])
    A = -torch.exp(w["A_log"])
    decay = torch.exp(dt[..., None] * A)
    write = (dt * x)[..., None] * B[:, :, None, :]
    state, states, outputs = torch.zeros_like(A), [], []
    for t in range(len(x)):
        state = decay[t] * state + write[t]
        read, state = state, edit(t, state)
        states.append(state)
        used = read if when == "after_read" else state
        outputs.append((used * C[t, :, None, :]).sum(-1) + w["D"] * x[t])
    y = torch.stack(outputs)
    gated = y.flatten(1) * silu(gate)
    return {
        "in_proj": projected, "conv": conv, "x": x, "dt": dt, "B": B, "C": C, "decay": decay, "write": write,
        "state": torch.stack(states), "y": y, "gate": gate, "gated": gated, "out": gated @ w["out_proj.weight"].T,
    }  # fmt: skip


def minimax(module: Any, hidden: Tensor, edit: Edit = unchanged, when: str = "before_read") -> dict[str, Tensor]:
    """Lightning attention: KV_t = exp(-slope)·KV_{t-1} + k_t⊗v_t and o_t = q_t·KV_t, then a norm and a sigmoid gate."""
    w, hidden = weights_of(module), hidden.double()
    heads, size = module.num_attention_heads, module.head_dim
    projected = hidden @ w["qkv_proj.weight"].T
    q, k, v = silu(projected).unflatten(-1, (heads, 3 * size)).split(size, dim=-1)
    # Section 2.2: slopes are a geometric sequence over heads that fades out with depth.
    depth = 1 - module.layer_idx / (module.num_hidden_layers - 1 + 1e-5) + 1e-5
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) * depth for h in range(heads)], dtype=torch.float64)
    decay = torch.exp(-slopes).expand(len(hidden), heads)
    write = v[..., None] * k[:, :, None, :]
    state, states, outputs = torch.zeros(heads, size, size, dtype=torch.float64), [], []
    for t in range(len(hidden)):
        state = decay[t, :, None, None] * state + write[t]
        read, state = state, edit(t, state)
        states.append(state)
        outputs.append(torch.einsum("hpn,hn->hp", read if when == "after_read" else state, q[t]))
    y = torch.stack(outputs)
    normed = rms(y.flatten(1), module.norm.variance_epsilon, w["norm.weight"])
    gate = hidden @ w["output_gate.weight"].T
    gated = normed / (1 + torch.exp(-gate))
    return {
        "in_proj": projected, "x": v, "B": k, "C": q, "decay": decay, "write": write, "state": torch.stack(states),
        "y": y, "normed": normed.unflatten(-1, (heads, size)), "gate": gate, "gated": gated,
        "out": gated @ w["out_proj.weight"].T,
    }  # fmt: skip
