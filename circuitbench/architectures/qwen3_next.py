"""Qwen3-Next: the gated delta rule (arXiv:2412.06464) in three layers of four, gated attention in the fourth."""

from __future__ import annotations

from .base import Architecture, Site
from .blocks import (
    PER_HEAD_GATE,
    attention,
    attention_part,
    gated_delta,
    gated_delta_part,
    mlp,
    mlp_part,
    moe_part,
    resid_mid,
    resid_post,
    resid_pre,
)

QWEN3_NEXT = Architecture(
    model_type="qwen3_next",
    layers="model.layers",
    parts={
        "ssm": gated_delta_part("linear_attn"),
        "attn": attention_part("self_attn"),
        "mlp": mlp_part("mlp"),
        "moe": moe_part("mlp"),
    },
    sites={
        **resid_pre(),
        **gated_delta({"ssm.in_proj": Site("in_proj_qkvz:output", "b t proj")}, PER_HEAD_GATE),
        # q and its output gate come out of one projection, per head: [q | gate]
        **attention(q=Site("q_proj:output", "b t (h s p) -> s b t h p", index=0)),
        **resid_mid("post_attention_layernorm"),
        **mlp(router="gate"),
        **resid_post(),
    },
    final_norm="model.norm",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 2,
    },
)
