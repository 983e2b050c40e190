"""Hymba written down a second time: one prompt, float64, loops, no cache, no module of the package."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (
        torch.stack([row / math.sqrt(float((row * row).mean()) + eps) for row in x.flatten(0, -2)]).view_as(x) * weight
    )


def turn(x: Tensor, positions: list[int], base: float) -> Tensor:
    """Rotary embedding of `(t, h, p)` as a product of complex numbers."""
    half = x.shape[-1] // 2
    angles = torch.tensor([[p / base ** (2 * i / x.shape[-1]) for i in range(half)] for p in positions])
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def sees(query: int, key: int, meta: int, window: int | None) -> bool:
    """Whether one position attends to another; the meta tokens are positions 0 to meta - 1."""
    return key <= query and (window is None or key < meta or query - key <= window)


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """S6, number by number along time; x and dt `(t, d)`."""
    h, out = torch.zeros_like(A), []
    for t in range(len(x)):
        h = torch.exp(dt[t][:, None] * A) * h + (dt[t] * x[t])[:, None] * B[t]
        out.append(h @ C[t] + D * x[t])
    return torch.stack(out)


def base_of(config: Any) -> float:
    """The rotary embedding's base."""
    width = config.hidden_size // config.num_attention_heads
    if config.rope_type != "ntk":
        return config.rope_theta
    return config.rope_theta * (2 * config.max_position_embeddings / config.orig_max_position_embeddings - 1) ** (
        width / (width - 2)
    )


def producer(config: Any, layer: int) -> int:
    """The layer whose keys and values a layer attends to."""
    for first, *others in config.kv_reuse_group or []:
        if layer in others:
            return first
    every = config.kv_reuse_every_i_layer
    return layer if every <= 0 or config.kv_reuse_group is not None else layer // every * every


def run(config: Any, weights: dict[str, Tensor], ids: list[int]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Logits of one prompt `(t, vocab)`, and every layer's tensors, meta tokens included."""
    w = {name: value.detach().double() for name, value in weights.items()}
    eps, meta, heads = config.rms_norm_eps, config.num_memory_tokens, config.num_attention_heads
    kv = config.num_key_value_heads
    d_inner, n, rank = config.mamba_expand * config.hidden_size, config.mamba_d_state, config.mamba_dt_rank
    width, value_width = config.hidden_size // heads, d_inner // heads
    hidden = w["model.embed_tokens.weight"][ids]
    if meta:
        hidden = torch.cat([w["model.memory_tokens"], hidden])
    positions = list(range(len(hidden)))
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    layers: list[dict[str, Tensor]] = []
    for layer in range(config.num_hidden_layers):
        p = {name.removeprefix(f"model.layers.{layer}."): value for name, value in w.items()}
        seen: dict[str, Tensor] = {"resid_pre": hidden}
        projected = rms(hidden, p["input_layernorm.weight"], eps) @ p["mamba.in_proj.weight"].T
        projected = projected + p.get("mamba.in_proj.bias", torch.zeros(()))
        own = producer(config, layer) == layer
        sizes = [heads * width, kv * width * own, kv * value_width * own, d_inner, d_inner]
        q, k, v, x, gate = projected.split(sizes, -1)
        # state-space heads
        taps, kernel = p["mamba.conv1d.weight"][:, 0], config.mamba_d_conv
        before = torch.cat([torch.zeros(kernel - 1, d_inner, dtype=torch.float64), x])
        x = torch.stack([(before[t : t + kernel] * taps.T).sum(0) for t in range(len(x))])
        x = F.silu(x + p.get("mamba.conv1d.bias", torch.zeros(())))
        dt, B, C = (x @ p["mamba.x_proj.0.weight"].T).split([rank, n, n], -1)
        if config.mamba_inner_layernorms:
            inner = {"dt": dt, "B": B, "C": C}
            dt, B, C = (rms(value, p[f"mamba.{name}_layernorm.weight"], eps) for name, value in inner.items())
        dt = F.softplus(dt @ p["mamba.dt_proj.0.weight"].T + p["mamba.dt_proj.0.bias"])
        y = scan(x, dt, -p["mamba.A_log.0"].exp(), B, C, p["mamba.D.0"])
        gated = y * F.silu(gate)
        # attention heads
        q = q.view(-1, heads, width)
        if config.kq_norm != "none":
            q = normed(q, p["mamba.self_attn.q_norm.weight"])
        q_turned = turn(q, positions, base_of(config)) if config.rope else q
        if own:
            k, v = k.view(-1, kv, width), v.view(-1, kv, value_width)
            if config.kq_norm != "none":
                k = normed(k, p["mamba.self_attn.k_norm.weight"])
            shared[layer] = (turn(k, positions, base_of(config)) if config.rope else k, v)
        keys, values = shared[producer(config, layer)]
        window = None if layer in (config.global_attn_idx or []) else config.sliding_window
        mask = torch.tensor([[sees(i, j, meta, window) for j in positions] for i in positions])
        z = F.scaled_dot_product_attention(
            q_turned.transpose(0, 1),
            keys.transpose(0, 1).repeat_interleave(heads // kv, 0),
            values.transpose(0, 1).repeat_interleave(heads // kv, 0),
            attn_mask=mask,
        ).transpose(0, 1)
        # both
        ssm = rms(gated, p["mamba.pre_avg_layernorm2.weight"], eps)
        attention = rms(z.flatten(1), p["mamba.pre_avg_layernorm1.weight"], eps)
        mean = (attention + ssm) / 2
        hidden = hidden + mean @ p["mamba.out_proj.weight"].T + p.get("mamba.out_proj.bias", torch.zeros(()))
        seen |= {"x": x, "dt": dt, "B": B, "C": C, "y": y, "gate": gate, "gated": gated, "z": z}
        seen |= {"ssm": ssm, "attention": attention, "resid_mid": hidden}
        inner = rms(hidden, p["pre_moe_layernorm.weight"], eps)
        up = inner @ p["moe.experts.0.up_proj.weight"].T
        if config.mlp_hidden_act == "silu":
            up = F.silu(inner @ p["moe.experts.0.gate_proj.weight"].T) * up
        else:
            up = up.clamp(min=0) ** 2
        hidden = hidden + up @ p["moe.experts.0.down_proj.weight"].T
        seen["resid_post"] = hidden
        layers.append(seen)
    final = rms(hidden, w["model.final_layernorm.weight"], eps)[meta:]
    return final @ w["lm_head.weight"].T, layers


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """Keys or queries `(t, h, p)`, normed; the weight is one for all heads or one for each."""
    return rms(x, weight.view(-1, x.shape[-1]) if weight.dim() == 1 else weight[0, :, 0], 1e-6)
