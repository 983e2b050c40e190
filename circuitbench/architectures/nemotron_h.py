"""Nemotron-H (NVIDIA, arXiv:2504.03624): one sublayer a layer, Mamba-2 or attention or MLP or experts."""

from __future__ import annotations

from .base import Architecture
from .blocks import attention, attention_part, mlp, mlp_part, moe_part, resid_post, resid_pre, ssd, ssd_part

NEMOTRON_H = Architecture(
    model_type="nemotron_h",
    layers="model.layers",
    parts={
        "ssm": ssd_part("mixer"),
        "attn": attention_part("mixer"),
        "mlp": mlp_part("mixer", marker=("down_proj", "experts")),
        "moe": moe_part("mixer"),
    },
    sites={**resid_pre(), **ssd(), **attention(), **mlp(router="gate"), **resid_post()},
    final_norm="model.norm_f",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layers_block_type": ["mamba", "attention", "moe", "mamba", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
)
