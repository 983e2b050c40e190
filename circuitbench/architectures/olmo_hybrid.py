"""OLMo Hybrid (Ai2): the gated delta rule in three layers of four, attention in the fourth.

The two kinds of layer normalise differently: what a recurrent layer's branches read is normed, what an attention
layer's branches put out is.
"""

from __future__ import annotations

from .base import LAYER, Architecture, Site
from .blocks import (
    HEADS,
    attention,
    attention_part,
    gated_delta,
    gated_delta_part,
    mlp_part,
    qkv_projections,
    resid_post,
    resid_pre,
)

RECURRENT, ATTENTION = "layer.linear_attn", "layer.self_attn"

OLMO_HYBRID = Architecture(
    model_type="olmo_hybrid",
    layers="model.layers",
    parts={
        "ssm": gated_delta_part("linear_attn"),
        "attn": attention_part("self_attn"),
        "mlp": mlp_part("mlp"),
    },
    sites={
        **resid_pre(),
        **gated_delta(qkv_projections(), Site("g_proj:output", "b t d_inner"), out="o_proj"),
        **attention(out=Site("post_attention_layernorm:output", base=LAYER)),
        # q and k are normed over all heads together, so that a head is a head only after its norm.
        "attn.q": Site("q_norm:output", HEADS),
        "attn.k": Site("k_norm:output", "b t (kv p) -> b t kv p"),
        "resid_mid": (
            Site("post_attention_layernorm:input", base=LAYER, in_place=True, when=RECURRENT),
            Site("/hidden_states_1:output", base=LAYER, when=ATTENTION),  # the sum itself: no norm reads it
        ),
        "mlp.in": (Site(":input", when=RECURRENT), Site(":input", copied=True, when=ATTENTION)),
        "mlp.hidden": Site("down_proj:input", "b t d_mlp"),
        "mlp.out": (
            Site(":output", when=RECURRENT),
            Site("post_feedforward_layernorm:output", base=LAYER, when=ATTENTION),
        ),
        **resid_post(),
    },
    final_norm="model.norm",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 8,
        "max_position_embeddings": 256,
    },
)
