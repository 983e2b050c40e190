"""Granite 4 (IBM): Mamba-2 or attention, then experts and a shared MLP; every branch times ``residual_multiplier``."""

from __future__ import annotations

from .base import LAYER, Architecture, Site
from .blocks import (
    HEADS,
    attention,
    attention_part,
    mlp_part,
    moe_part,
    resid_mid,
    resid_post,
    resid_pre,
    ssd,
    ssd_part,
)

SCALE = "layer.residual_multiplier"

GRANITEMOEHYBRID = Architecture(
    model_type="granitemoehybrid",
    layers="model.layers",
    parts={
        "ssm": ssd_part("mamba"),
        "attn": attention_part("self_attn"),
        "mlp": mlp_part("shared_mlp"),
        "moe": moe_part("block_sparse_moe"),
    },
    sites={
        **resid_pre(),
        **ssd(out=Site(":output", scale=SCALE)),
        **attention(out=Site(":output", scale=SCALE)),
        "attn.z": Site("o_proj:input", HEADS),
        **resid_mid("post_attention_layernorm"),
        "moe.router": Site("router/router_logits_0:output", "(b t) experts -> b t experts"),
        "mlp.in": Site(":input"),
        "mlp.hidden": Site("output_linear:input", "b t d_mlp"),
        "mlp.out": (
            Site("/hidden_states_4:output", base=LAYER, scale=SCALE, when="layer.has_experts"),
            Site("/hidden_states_5:output", base=LAYER, scale=SCALE, when="!layer.has_experts"),
        ),
        **resid_post(),
    },
    final_norm="model.norm",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "shared_intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 2,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "mamba_chunk_size": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 1.5,
        "logits_scaling": 2.0,
    },
)
