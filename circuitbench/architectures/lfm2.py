"""LFM2 and LFM3 (Liquid AI, arXiv:2511.23404): gated short convolutions in most layers, attention in the rest.

A convolution layer has no recurrent state, so its part is ``conv``, not ``ssm``: ``conv.out`` is out_proj(C·y), where y
at each position weighs the last few B·x. Both gates act as they are, without an activation.
"""

from __future__ import annotations

from typing import Any

from .base import LAYER, Architecture, Part, Site
from .blocks import attention, attention_part, mlp, moe_part, resid_mid, resid_post, resid_pre

THIRD = "b t (s d_model) -> s b t d_model"

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def lfm2_like(model_type: str, experts: bool = False, normed: bool = False, **random_config: Any) -> Architecture:
    """Norm, short convolution or attention, norm, MLP or experts; with `normed`, norms after the branches as well."""
    out = Site("post_operator_norm:output", base=LAYER) if normed else Site(":output")
    return Architecture(
        model_type=model_type,
        layers="model.layers",
        parts={
            "conv": Part(("conv",), dims={"proj": "in_proj.out_features"}, cache="get_conv_state"),
            "attn": attention_part("self_attn"),
            "mlp": Part(("feed_forward",), dims={"d_mlp": "w2.in_features"}, mixes=False),
            **({"moe": moe_part("feed_forward")} if experts else {}),
        },
        sites={
            **resid_pre(),
            "conv.in_proj": Site("in_proj:output", "b t proj"),
            "conv.B": Site("in_proj:output", THIRD, index=0),
            "conv.C": Site("in_proj:output", THIRD, index=1),
            "conv.x": Site("in_proj:output", THIRD, index=2),
            "conv.y": Site(
                "/causal_conv1d_fn_0:output",
                "b d_model t -> b t d_model",
                step="/causal_conv1d_update_0:output",
                trim=True,
            ),
            "conv.gated": Site("out_proj:input"),
            "conv.out": out,
            **attention(out, heads="o_proj" if normed else "out_proj"),
            **resid_mid("ffn_norm"),
            **mlp(
                "w2",
                out=Site("post_ffn_norm:output", base=LAYER) if normed else None,
                router="gate" if experts else None,
            ),
            **resid_post(),
        },
        final_norm="model.embedding_norm",
        random_config={**TINY, **random_config},
    )


LFM2 = lfm2_like("lfm2", block_auto_adjust_ff_dim=False)
LFM2_MOE = lfm2_like(
    "lfm2_moe", experts=True, num_dense_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
)
LFM3 = lfm2_like(
    "lfm3",
    normed=True,
    head_dim=8,
    sliding_window=8,
    num_hidden_layers=4,
    layer_types=["conv", "full_attention", "conv", "sliding_attention"],
)
