"""Jamba (AI21, arXiv:2403.19887): S6 layers and attention layers in turn, every other one with a mixture of experts."""

from __future__ import annotations

from .base import Architecture
from .blocks import attention, attention_part, mlp, mlp_part, moe_part, resid_mid, resid_post, resid_pre, s6, s6_part

JAMBA = Architecture(
    model_type="jamba",
    layers="model.layers",
    parts={
        "ssm": s6_part("mamba"),
        "attn": attention_part("self_attn"),
        "mlp": mlp_part("feed_forward"),
        "moe": moe_part("feed_forward"),
    },
    sites={
        **resid_pre(),
        **s6(),
        **attention(),
        **resid_mid("pre_ff_layernorm"),
        **mlp(router="router"),
        **resid_post(),
    },
    final_norm="model.final_layernorm",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
    },
)
