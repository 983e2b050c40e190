"""MiniMax-Text-01 (arXiv:2501.08313): lightning attention in most layers, softmax attention in the others, experts.

Lightning attention is a linear recurrence with one fixed decay a head, so it is an ``ssm``: x are the values, B the
keys, C the queries. The norms stand before the residual connections (as in the first transformers), which scale both
sides: a layer makes ``alpha·norm(x) + beta·branch(norm(x))`` of x, twice. ``ssm.out``, ``attn.out`` and ``mlp.out``
include their beta.
"""

from __future__ import annotations

from .base import Architecture, Part, Site
from .blocks import HEADS, attention, attention_part, mlp, mlp_part, moe_part, resid_mid, resid_post, resid_pre
from .loops import LightningScan

MINIMAX = Architecture(
    model_type="minimax",
    layers="model.layers",
    parts={
        "ssm": Part(
            ("self_attn",),
            "qkv_proj",
            {"h": "num_attention_heads", "p": "head_dim", "n": "head_dim", "proj": "qkv_proj.out_features"},
            LightningScan(),
            cache="get_linear_cache",
        ),
        "attn": attention_part("self_attn"),
        "mlp": mlp_part("mlp"),
        "moe": moe_part("mlp"),
    },
    sites={
        **resid_pre(),
        "ssm.in_proj": Site("qkv_proj:output", "b t proj"),
        "ssm.x": Site("scan:x", "b t h p"),
        "ssm.B": Site("scan:B", "b t h n"),
        "ssm.C": Site("scan:C", "b t h n"),
        "ssm.decay": Site("scan:decay", "b t h"),
        "ssm.write": Site("scan:write", "b t h p n"),
        "ssm.state": Site("scan:state", "b t h p n", writable=False),
        "ssm.mixing": Site("scan:mixing", "b h t t", writable=False),
        "ssm.y": Site("scan:y", "b t h p"),
        "ssm.normed": Site("norm:output", HEADS),
        "ssm.gate": Site("output_gate:output", "b t d_inner"),
        "ssm.gated": Site("out_proj:input", "b t d_inner"),
        "ssm.out": Site(":output", scale="layer.attn_beta_factor"),
        **attention(out=Site(":output", scale="layer.attn_beta_factor")),
        **resid_mid("post_attention_layernorm"),
        # The experts read the residual stream itself.
        **mlp(router="gate", out=Site(":output", scale="layer.mlp_beta_factor"))
        | {"mlp.in": Site(":input", copied=True)},
        **resid_post(),
    },
    final_norm="model.norm",
    post_norm=True,
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 4,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        "linear_attn_alpha_factor": 1.2,
        "linear_attn_beta_factor": 0.8,
        "full_attn_alpha_factor": 1.1,
        "full_attn_beta_factor": 0.9,
        "mlp_alpha_factor": 0.9,
        "mlp_beta_factor": 1.3,
    },
)
