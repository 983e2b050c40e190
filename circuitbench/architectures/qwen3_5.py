"""Qwen3.5 (Alibaba): Qwen3-Next's layers with the mixer's projections apart, and an MLP, or experts, in every layer.

A checkpoint is that of a model that sees; as a language model it loads without its eyes, and with the configuration of
its text part, whose ``model_type`` ends in ``_text``.
"""

from __future__ import annotations

from typing import Any

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

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 256,
}


def qwen3_5_like(model_type: str, experts: bool, **random_config: Any) -> Architecture:
    """Norm, mixer, norm, MLP or experts."""
    return Architecture(
        model_type=model_type,
        layers="model.layers",
        parts={
            "ssm": gated_delta_part("linear_attn"),
            "attn": attention_part("self_attn"),
            "mlp": mlp_part("mlp"),
            **({"moe": moe_part("mlp")} if experts else {}),
        },
        sites={
            **resid_pre(),
            **gated_delta({"ssm.qkv_proj": Site("in_proj_qkv:output", "b t conv_dim")}, PER_HEAD_GATE),
            # q and its output gate come out of one projection, per head: [q | gate]
            **attention(q=Site("q_proj:output", "b t (h s p) -> s b t h p", index=0)),
            **resid_mid("post_attention_layernorm"),
            **mlp(router="gate" if experts else None),
            **resid_post(),
        },
        final_norm="model.norm",
        random_config={**TINY, **random_config},
    )


QWEN3_5 = qwen3_5_like("qwen3_5_text", experts=False, intermediate_size=48)
QWEN3_5_MOE = qwen3_5_like(
    "qwen3_5_moe_text",
    experts=True,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
