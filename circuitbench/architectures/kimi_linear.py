"""Kimi Delta Attention in most layers, latent attention in the rest: Kimi Linear (arXiv:2510.26692), and Ling 3.

Latent attention (MLA) caches a small ``attn.latent``, and makes the keys and values of all positions from it at every
step. So ``attn.k`` and ``attn.v`` are read where they have been expanded, head by head (the last channels of k are the
same in all heads), and what is written there holds for one forward. Kimi Linear rotates nothing: positions enter
through the recurrent layers alone. Ling rotates those last channels, of k before it is read.
"""

from __future__ import annotations

from typing import Any

from .base import Architecture, Part, Site
from .blocks import RECURRENT, gated_delta, mlp, mlp_part, moe_part, qkv_projections, resid_mid, resid_post, resid_pre
from .scans import KDAScan

KDA_DIMS = {"h": "num_heads", "v": "head_dim", "k": "head_dim", "d_inner": "qkv_dim", "d_key": "qkv_dim"}
MLA_DIMS = {"h": "num_heads", "p": "qk_head_dim", "v": "v_head_dim", "r": "kv_lora_rank"}
Q = "b t (h p) -> b t h p"

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 256,
}


def kda_and_mla(model_type: str, gate: str, **random_config: Any) -> Architecture:
    """Norm, Kimi Delta Attention or latent attention, norm, MLP or experts; `gate` is what the gate comes out of."""
    return Architecture(
        model_type=model_type,
        layers="model.layers",
        parts={
            "ssm": Part(("self_attn",), "conv1d", KDA_DIMS, KDAScan(), cache=RECURRENT),
            "attn": Part(("self_attn",), "kv_a_proj_with_mqa", MLA_DIMS),
            "mlp": mlp_part("mlp"),
            "moe": moe_part("mlp"),
        },
        sites={
            **resid_pre(),
            **gated_delta(qkv_projections(), Site(f"{gate}:output", "b t d_inner"), decay="b t h k", out="o_proj"),
            "attn.q": (Site("q_b_proj:output", Q, when="q_b_proj"), Site("q_proj:output", Q)),
            "attn.latent": Site("kv_a_layernorm:output", "b t r"),
            "attn.k": Site("/self_expand_kv_0:output[0]", "b h t p -> b t h p", trim=True, made_from="attn.latent"),
            "attn.v": Site("/self_expand_kv_0:output[1]", "b h t v -> b t h v", trim=True, made_from="attn.latent"),
            "attn.pattern": Site("pattern:", "b h t t"),
            "attn.z": Site("o_proj:input", "b t (h v) -> b t h v"),
            "attn.out": Site(":output"),
            **resid_mid("post_attention_layernorm"),
            **mlp(router="gate"),
            **resid_post(),
        },
        final_norm="model.norm",
        random_config={**TINY, **random_config},
    )


KIMI_LINEAR = kda_and_mla("kimi_linear", "g_b_proj", linear_num_heads=4, linear_head_dim=8)
BAILING_HYBRID = kda_and_mla("bailing_hybrid", "g_proj", head_dim=8, n_group=2, topk_group=1)
