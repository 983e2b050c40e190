"""Zamba (Zyphra, arXiv:2405.16712): Mamba layers whose mixer runs several S6 scans, some layers with shared attention.

Each scan has its own B, C and dt, so a mixer's sites have a head axis. As in Zamba2, the shared block's output is added
to what the mixer reads, not to the residual stream, and the shared block reads the embeddings a second time.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Architecture, Part, Site
from .blocks import CONV, RECURRENT, attention, attention_part, mlp, mlp_part, resid_post, resid_pre
from .loops import S6HeadsScan

ZAMBA = Architecture(
    model_type="zamba",
    layers="model.layers",
    parts={
        "ssm": Part(
            ("mamba", "mamba_decoder.mamba"),
            "x_proj_weight",
            {"h": "n_mamba_heads", "p": "mamba_head_dim", "n": "ssm_state_size", "d_inner": "intermediate_size"},
            S6HeadsScan(),
            cache=RECURRENT,
        ),
        "attn": replace(attention_part("shared_transf.self_attn"), to_residual=False),
        "mlp": replace(mlp_part("shared_transf.feed_forward"), to_residual=False),
    },
    sites={
        **resid_pre(),
        **attention(),
        **mlp(),
        "ssm.in_proj": Site("in_proj:output", "b t proj"),
        "ssm.gate": Site("/gate_0:output", "h b p t -> b t (h p)"),
        "ssm.conv": CONV,
        "ssm.x": Site("scan:x", "b t h p"),
        "ssm.dt": Site("scan:dt", "b t h p"),
        "ssm.B": Site("scan:B", "b t h n"),
        "ssm.C": Site("scan:C", "b t h n"),
        "ssm.decay": Site("scan:decay", "b t h p n"),
        "ssm.write": Site("scan:write", "b t h p n"),
        "ssm.state": Site("scan:state", "b t h p n", writable=False),
        "ssm.mixing": Site("scan:mixing by channel", "b channels t t", writable=False),
        "ssm.y": Site("scan:y", "b t h p"),
        "ssm.gated": Site("out_proj:input", "b t d_inner"),
        "ssm.out": Site(":output"),
        **resid_post(),
    },
    final_norm="model.final_layernorm",
    embed=Site("model.embed_tokens:output"),
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
    },
)
