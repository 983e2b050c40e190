"""Zamba2 (Zyphra, arXiv:2411.15242): Mamba-2 layers, some preceded by a shared attention block.

The shared block's output is added to what the mixer reads, not to the residual stream; in a hybrid layer it runs first.
The embeddings are read a second time by every shared block, so ``embed`` is the embedding's own output, which both
follow.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Architecture, Site
from .blocks import HEADS, attention, attention_part, mlp, mlp_part, resid_post, resid_pre, ssd, ssd_part

ADAPTED = "config.use_shared_attention_adapter"


def projected(name: str, axis: str) -> tuple[Site, Site]:
    """A projection, plus its adapter where the model has adapters."""
    layout = f"b t ({axis} p) -> b t {axis} p"
    return (
        Site(f"{name[0]}_proj:output", layout, when=f"!{ADAPTED}"),
        Site(f"/{name}_states_1:output", layout, when=ADAPTED),
    )


ZAMBA2 = Architecture(
    model_type="zamba2",
    layers="model.layers",
    parts={
        "ssm": ssd_part("mamba", "mamba_decoder.mamba"),
        "attn": replace(attention_part("shared_transformer.self_attn"), to_residual=False),
        "mlp": replace(mlp_part("shared_transformer.feed_forward"), to_residual=False),
    },
    sites={
        **resid_pre(),
        **attention(q=projected("query", "h")),
        "attn.k": projected("key", "kv"),
        "attn.v": projected("value", "kv"),
        "attn.z": Site("o_proj:input", HEADS),
        **mlp(),
        **ssd(),
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
        "num_mem_blocks": 1,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_expand": 2,
        "chunk_size": 8,
        "adapter_rank": 4,
    },
)
