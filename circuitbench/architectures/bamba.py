"""Bamba (IBM, 2024): Mamba-2 layers and attention layers in turn, each with an MLP."""

from __future__ import annotations

from .base import Architecture
from .blocks import attention, attention_part, mlp, mlp_part, resid_mid, resid_post, resid_pre, ssd, ssd_part

BAMBA = Architecture(
    model_type="bamba",
    layers="model.layers",
    parts={"ssm": ssd_part("mamba"), "attn": attention_part("self_attn"), "mlp": mlp_part("feed_forward")},
    sites={
        **resid_pre(),
        **ssd(),
        **attention(),
        **resid_mid("pre_ff_layernorm"),
        **mlp(),
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
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 2,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
)
