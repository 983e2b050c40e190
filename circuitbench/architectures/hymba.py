"""Hymba (NVIDIA 2024, arXiv:2411.13676): S6 heads and attention heads side by side in every layer, behind meta tokens.

The heads of either kind are normed as one branch: ``ssm.branch`` and ``attn.branch`` are where the two are apart and
of one scale, ``ssm.out`` and ``attn.out`` what each adds to the residual stream. A layer that shares the keys and
values of an earlier one has no ``attn.k`` and ``attn.v``: edits of the earlier layer's reach it. The code of the model
is ours (`models.hymba`).
"""

from __future__ import annotations

from dataclasses import replace

from .base import Architecture, Part, Site
from .blocks import HEADS, mlp, mlp_part, resid_mid, resid_post, resid_pre, s6, s6_part
from .scans import ContinuedS6Scan

OWN = "!reuse_kv"  # keys and values are the layer's own
BOTH = "s b t d_model -> s b t d_model"  # one projection of both branches, each of which counts half
HALF = "layer.mamba.branch_weight"
SCAN = {name: site for name, site in s6().items() if name not in ("ssm.gated", "ssm.out")}

HYMBA = Architecture(
    model_type="hymba",
    layers="model.layers",
    parts={
        "ssm": replace(s6_part("mamba"), scan=ContinuedS6Scan()),
        "attn": Part(
            ("mamba.self_attn",),
            dims={"h": "num_heads", "p": "head_dim", "v": "value_dim", "d_inner": "layer.mamba.intermediate_size"},
        ),
        "mlp": mlp_part("moe.experts.0"),
    },
    sites={
        **resid_pre(),
        **SCAN,
        "ssm.gated": Site("pre_avg_layernorm2:input", "b t d_inner"),
        "ssm.branch": Site("pre_avg_layernorm2:output", "b t d_inner"),
        "attn.q": Site(":input[0]", HEADS),
        "attn.k": Site(":input[1]", "b t (kv p) -> b t kv p", when=OWN),
        "attn.v": Site(":input[2]", "b t (kv v) -> b t kv v", when=OWN),
        "attn.pattern": Site("pattern:", "b h t t"),
        "attn.z": Site("pre_avg_layernorm1:input", "b t (h v) -> b t h v", base="ssm"),
        "attn.branch": Site("pre_avg_layernorm1:output", "b t d_inner", base="ssm"),
        "ssm.out": Site("out_proj:output", BOTH, index=0, scale=HALF),
        "attn.out": Site("out_proj:output", BOTH, index=1, scale=HALF, base="ssm"),
        **resid_mid("pre_moe_layernorm"),
        **mlp(),
        **resid_post(),
    },
    final_norm="model.final_layernorm",
    meta_tokens="config.num_memory_tokens",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 4,
        "global_attn_idx": [0, 4],
        "kv_reuse_group": [[1, 2, 3]],
        "max_position_embeddings": 256,
        "orig_max_position_embeddings": 64,
        "rope": True,
        "rope_type": "ntk",
        "num_memory_tokens": 3,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "tie_word_embeddings": True,
    },
)
