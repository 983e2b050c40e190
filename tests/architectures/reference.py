"""What a mixer computes for one prompt, step by step in float64, from the papers' formulas and its own weights.

Written apart from the package: no recurrence of ours, no code of transformers. One prompt at a time, so that padding
does not exist here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BY_CHANNEL = ("kimi_linear", "bailing_hybrid")
Edit = Callable[[int, Tensor], Tensor]  # (position, h_t) -> h_t
DELTA = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "bailing_hybrid")


def unchanged(position: int, state: Tensor) -> Tensor:
    return state


def silu(value: Tensor) -> Tensor:
    return value / (1 + torch.exp(-value))


def sigmoid(value: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-value))


def softplus(value: Tensor) -> Tensor:
    return value.clamp(min=0) + torch.log1p(torch.exp(-value.abs()))


def rms(value: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    normed = value / (value.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().double() for name, parameter in module.named_parameters()}


def linear(weights: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    out = value @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def causal_conv(weights: dict[str, Tensor], value: Tensor) -> Tensor:
    """Each channel: the weighted sum of its last k values, then SiLU."""
    return silu(causal_taps(weights, "conv1d", value))


def causal_taps(weights: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    """Each channel: the weighted sum of its last k values."""
    kernel = weights[f"{name}.weight"][:, 0]
    out = torch.zeros_like(value) + weights.get(f"{name}.bias", torch.zeros(value.shape[1], dtype=value.dtype))
    for t in range(value.shape[0]):
        for back in range(min(kernel.shape[1], t + 1)):
            out[t] += kernel[:, -1 - back] * value[t - back]
    return out


def mixer(
    config: Any, module: nn.Module, hidden: Tensor, edit: Edit = unchanged, when: str = "before_read"
) -> dict[str, Tensor]:
    """Every site of the mixer for hidden states `(t, d_model)`; `edit` changes the state at a position."""
    family, hidden = config.model_type, hidden.double()
    if family.startswith("lfm"):
        return short_conv(module, hidden)
    if family in ("recurrent_gemma", "rwkv", "xlstm"):
        from tests.architectures.reference_rnn import MIXERS  # which is written with the functions of this file

        return MIXERS[family](module, hidden, edit, when)
    if family in ("mamba", "falcon_mamba", "jamba"):
        return s6_mixer(family, module, hidden, edit, when)
    if family in DELTA:
        return delta_mixer(family, module, hidden, edit, when)
    return ssd_mixer(config, module, hidden, edit, when)


def s6_mixer(family: str, module: Any, hidden: Tensor, edit: Edit, when: str) -> dict[str, Tensor]:
    """Algorithm 2 of Gu & Dao 2023, in the arrangement of figure 3; Jamba and Falcon-Mamba norm dt, B and C."""
    w = weights_of(module)
    projected = linear(w, "in_proj", hidden)
    x, gate = projected.chunk(2, dim=-1)
    x = conv = causal_conv(w, x)
    n = w["A_log"].shape[1]
    low_rank, B, C = (x @ w["x_proj.weight"].T).split([w["x_proj.weight"].shape[0] - 2 * n, n, n], dim=-1)
    if family == "falcon_mamba":
        low_rank, B, C = (rms(value, module.rms_eps) for value in (low_rank, B, C))
    if family == "jamba":
        eps = module.dt_layernorm.variance_epsilon
        low_rank = rms(low_rank, eps, w["dt_layernorm.weight"])
        B, C = rms(B, eps, w["b_layernorm.weight"]), rms(C, eps, w["c_layernorm.weight"])
    dt = softplus(linear(w, "dt_proj", low_rank))
    A = -torch.exp(w["A_log"])
    decay = torch.exp(dt[:, :, None] * A)
    write = dt[:, :, None] * x[:, :, None] * B[:, None, :]
    state, states, outputs = torch.zeros_like(A), [], []
    for t in range(len(x)):
        state = decay[t] * state + write[t]
        read, state = state, edit(t, state)
        states.append(state)
        outputs.append((read if when == "after_read" else state) @ C[t] + w["D"] * x[t])
    y = torch.stack(outputs)
    gated = y * silu(gate)
    return {
        "in_proj": projected, "conv": conv, "x": x, "dt": dt, "B": B, "C": C, "decay": decay, "write": write,
        "state": torch.stack(states), "y": y, "gate": gate, "gated": gated, "out": linear(w, "out_proj", gated),
    }  # fmt: skip


def ssd_mixer(config: Any, module: Any, hidden: Tensor, edit: Edit, when: str) -> dict[str, Tensor]:
    """Section 7 of Dao & Gu 2024: one scalar decay a head, B and C shared by the heads of a group."""
    family, w = config.model_type, weights_of(module)
    heads, groups, n = module.num_heads, module.n_groups, module.ssm_state_size
    inner = module.intermediate_size
    if family == "falcon_h1":
        hidden = hidden * module.ssm_in_multiplier
    projected = linear(w, "in_proj", hidden)
    sizes = [inner, inner, groups * n, groups * n, heads]
    gate, x, B, C, dt = projected.split(sizes, dim=-1)
    if family == "falcon_h1":
        gate, x, B, C, dt = (m * v for m, v in zip(config.ssm_multipliers, (gate, x, B, C, dt), strict=True))
    conv = causal_conv(w, torch.cat([x, B, C], dim=-1))
    x, B, C = conv.split([inner, groups * n, groups * n], dim=-1)
    x, B, C = (value.unflatten(-1, (parts, -1)) for value, parts in ((x, heads), (B, groups), (C, groups)))
    low, high = module.time_step_limit
    dt = softplus(dt + w["dt_bias"]).clamp(low, high)
    decay = torch.exp(-dt * torch.exp(w["A_log"]))
    write = torch.stack(
        [dt[:, h, None, None] * x[:, h, :, None] * B[:, h * groups // heads, None, :] for h in range(heads)], dim=1
    )
    state, states, outputs = torch.zeros_like(write[0]), [], []
    for t in range(len(x)):
        state = decay[t, :, None, None] * state + write[t]
        read, state = state, edit(t, state)
        states.append(state)
        used = read if when == "after_read" else state
        outputs.append(torch.stack([used[h] @ C[t, h * groups // heads] + w["D"][h] * x[t, h] for h in range(heads)]))
    y = torch.stack(outputs)
    gated = gate_and_norm(family, module, w, y.flatten(1), gate)
    return {
        "in_proj": projected, "conv": conv, "x": x, "dt": dt, "B": B, "C": C, "decay": decay, "write": write,
        "state": torch.stack(states), "y": y, "gate": gate, "gated": gated, "out": linear(w, "out_proj", gated),
    }  # fmt: skip


def gate_and_norm(family: str, module: Any, w: dict[str, Tensor], y: Tensor, gate: Tensor) -> Tensor:
    """Norm over each group's channels of the gated output; Falcon-H1 may norm first, or not at all."""
    if family == "falcon_h1" and not module.mamba_rms_norm:
        return y * silu(gate)

    def normed(value: Tensor) -> Tensor:
        groups = module.n_groups
        return rms(value.unflatten(-1, (groups, -1)), module.norm.variance_epsilon).flatten(-2) * w["norm.weight"]

    if family == "falcon_h1" and module.norm.norm_before_gate:
        return normed(y) * silu(gate)
    return normed(y * silu(gate))


def delta_mixer(family: str, module: Any, hidden: Tensor, edit: Edit, when: str) -> dict[str, Tensor]:
    """Yang, Kautz & Hatamizadeh 2024: decay the memory, then move what it holds at k towards v by beta.

    Kimi Linear's memory decays channel by channel (Kimi Team 2025); in Ling, by exp(−5) at most.
    """
    w = weights_of(module)
    found, (q, k, v), (b, a), gate = PROJECTED.get(family, projected_apart)(module, w, hidden)
    heads, dv = v.shape[1] // module_dim(module, "head_v_dim"), module_dim(module, "head_v_dim")
    dk = module_dim(module, "head_k_dim")
    conv = causal_conv(w, torch.cat([q, k, v], dim=-1))
    q, k, v = conv.split([q.shape[1], k.shape[1], v.shape[1]], dim=-1)
    q, k = (value.unflatten(-1, (-1, dk)) for value in (q, k))
    q, k = (value / (value.square().sum(-1, keepdim=True) + 1e-6).sqrt() for value in (q, k))
    each = heads // k.shape[1]
    B = torch.stack([k[:, h // each] for h in range(heads)], dim=1)
    C = torch.stack([q[:, h // each] for h in range(heads)], dim=1) / dk**0.5
    v = v.unflatten(-1, (heads, dv))
    beta = sigmoid(b) * (2 if getattr(module, "allow_neg_eigval", False) else 1)
    if family in BY_CHANNEL:
        rate, shift = w["forget_gate.A_log"].reshape(heads, 1), w["forget_gate.dt_bias"].reshape(heads, dk)
        asked, rate = a.unflatten(-1, (heads, dk)) + shift, torch.exp(rate)
        if getattr(module.forget_gate, "safe_gate", False):
            decay = torch.exp(module.forget_gate.lower_bound * sigmoid(rate * asked))
        else:
            decay = torch.exp(-rate * softplus(asked))
    else:
        decay = torch.exp(-torch.exp(w["A_log"]) * softplus(a + w["dt_bias"]))
    kept = decay if decay.dim() == 3 else decay[:, :, None].expand(-1, -1, dk)
    state = torch.zeros(heads, dk, dv, dtype=torch.float64)
    states, outputs, writes = [], [], []
    for t in range(len(v)):
        state = kept[t, :, :, None] * state
        held = torch.stack([B[t, h] @ state[h] for h in range(heads)])
        write = B[t, :, :, None] * (beta[t, :, None] * (v[t] - held))[:, None, :]
        state = state + write
        read, state = state, edit(t, state)
        used = read if when == "after_read" else state
        states.append(state)
        writes.append(write)
        outputs.append(torch.stack([C[t, h] @ used[h] for h in range(heads)]))
    y = torch.stack(outputs)
    norm, out = ("norm", "out_proj") if hasattr(module, "norm") else ("o_norm", "o_proj")
    normed = rms(y, module.get_submodule(norm).variance_epsilon, w[f"{norm}.weight"]).flatten(1)
    gated = normed * (sigmoid(gate) if family in BY_CHANNEL else silu(gate))
    return {
        **found, "conv": conv, "x": v, "B": B, "C": C, "beta": beta, "decay": decay, "write": torch.stack(writes),
        "state": torch.stack(states), "y": y, "gate": gate, "gated": gated, "out": gated @ w[f"{out}.weight"].T,
    }  # fmt: skip


def module_dim(module: Any, name: str) -> int:
    """Size of a head's keys or values, which are alike in Kimi Linear."""
    return getattr(module, name) if hasattr(module, name) else module.head_dim


Projected = tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor], Tensor]


def projected_qkvz(module: Any, w: dict[str, Tensor], hidden: Tensor) -> Projected:
    """Qwen3-Next: key head by key head, its q, k, and the v and z of the value heads it serves; so for b and a."""
    dk, dv, each = module.head_k_dim, module.head_v_dim, module.num_v_heads // module.num_k_heads
    fused = hidden @ w["in_proj_qkvz.weight"].T
    by_head = fused.unflatten(-1, (module.num_k_heads, -1)).split([dk, dk, each * dv, each * dv], dim=-1)
    q, k, v, z = (value.flatten(1) for value in by_head)
    b, a = (hidden @ w["in_proj_ba.weight"].T).unflatten(-1, (module.num_k_heads, -1)).split([each, each], dim=-1)
    return {"in_proj": fused}, (q, k, v), (b.flatten(1), a.flatten(1)), z


def projected_qkv(module: Any, w: dict[str, Tensor], hidden: Tensor) -> Projected:
    """Qwen3.5: one projection for q, k and v, and one each for the others."""
    fused = linear(w, "in_proj_qkv", hidden)
    q, k, v = fused.split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    b, a, z = (linear(w, f"in_proj_{name}", hidden) for name in "baz")
    return {"qkv_proj": fused}, (q, k, v), (b, a), z


def projected_low_rank(module: Any, w: dict[str, Tensor], hidden: Tensor) -> Projected:
    """Kimi Linear: decay and gate pass a narrow layer."""
    found = {f"{name}_proj": linear(w, f"{name}_proj", hidden) for name in "qkv"}
    decay = linear(w, "forget_gate.f_b_proj", linear(w, "forget_gate.f_a_proj", hidden))
    gate = linear(w, "g_b_proj", linear(w, "g_a_proj", hidden))
    q, k, v = found.values()
    return found, (q, k, v), (linear(w, "b_proj", hidden), decay), gate


def projected_apart(module: Any, w: dict[str, Tensor], hidden: Tensor) -> Projected:
    """OLMo Hybrid and Ling: six projections."""
    decay = "forget_gate.f_proj" if hasattr(module, "forget_gate") else "a_proj"
    names = ["q_proj", "k_proj", "v_proj", "b_proj", decay, "g_proj"]
    q, k, v, b, a, g = (linear(w, name, hidden) for name in names)
    return {"q_proj": q, "k_proj": k, "v_proj": v}, (q, k, v), (b, a), g


PROJECTED = {"qwen3_next": projected_qkvz, "qwen3_5_text": projected_qkv, "qwen3_5_moe_text": projected_qkv}
PROJECTED |= {"kimi_linear": projected_low_rank}


def short_conv(module: Any, hidden: Tensor) -> dict[str, Tensor]:
    """LFM2: z = Conv(B ⊙ x), then C ⊙ z, with B, C and x from one projection."""
    w = weights_of(module)
    fused = linear(w, "in_proj", hidden)
    B, C, x = fused.chunk(3, dim=-1)
    y = causal_taps(w, "conv", B * x)
    gated = C * y
    found = {"in_proj": fused, "B": B, "C": C, "x": x, "y": y, "gated": gated}
    return {**found, "out": linear(w, "out_proj", gated)}
