"""Transformers, the baseline: GPT-2, GPT-NeoX (Pythia), and the Llama family with its relatives."""

from __future__ import annotations

from typing import Any

from .base import LAYER, Architecture, Site
from .blocks import HEADS, attention, attention_part, mlp, mlp_part, resid_mid, resid_post, resid_pre

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def llama_like(model_type: str, **random_config: Any) -> Architecture:
    """Pre-norm attention, then a gated MLP."""
    return Architecture(
        model_type=model_type,
        layers="model.layers",
        parts={"attn": attention_part("self_attn"), "mlp": mlp_part("mlp")},
        sites={**resid_pre(), **attention(), **resid_mid("post_attention_layernorm"), **mlp(), **resid_post()},
        final_norm="model.norm",
        random_config={**TINY, **random_config},
    )


def gemma_like(model_type: str, **random_config: Any) -> Architecture:
    """As llama, with a norm after each branch too: a branch's output is what that norm adds to the residual stream."""
    return Architecture(
        model_type=model_type,
        layers="model.layers",
        parts={"attn": attention_part("self_attn"), "mlp": mlp_part("mlp")},
        sites={
            **resid_pre(),
            **attention(out=Site("post_attention_layernorm:output", base=LAYER)),
            **resid_mid("pre_feedforward_layernorm"),
            **mlp(out=Site("post_feedforward_layernorm:output", base=LAYER)),
            **resid_post(),
        },
        final_norm="model.norm",
        random_config={**TINY, **random_config},
    )


LLAMA = llama_like("llama")
MISTRAL = llama_like("mistral")
QWEN2 = llama_like("qwen2")
QWEN3 = llama_like("qwen3")
GEMMA2 = gemma_like("gemma2", query_pre_attn_scalar=8, sliding_window=16)
GEMMA3 = gemma_like("gemma3_text", query_pre_attn_scalar=8, sliding_window=16)

QKV = "b t (s h p) -> s b t h p"

GPT2 = Architecture(
    model_type="gpt2",
    layers="transformer.h",
    parts={"attn": attention_part("attn", marker="c_attn"), "mlp": mlp_part("mlp")},
    sites={
        **resid_pre(),
        "attn.q": Site("c_attn:output", QKV, index=0),
        "attn.k": Site("c_attn:output", QKV, index=1),
        "attn.v": Site("c_attn:output", QKV, index=2),
        "attn.pattern": Site("pattern:", "b h t t"),
        "attn.z": Site("c_proj:input", HEADS),
        "attn.out": Site(":output"),
        **resid_mid("ln_2"),
        **mlp("c_proj"),
        **resid_post(),
    },
    final_norm="transformer.ln_f",
    random_config={"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
)

NEOX_QKV = "b t (h s p) -> s b t h p"

GPT_NEOX = Architecture(
    model_type="gpt_neox",
    layers="gpt_neox.layers",
    parts={
        "attn": attention_part("attention", marker="query_key_value", head_dim="head_size"),
        "mlp": mlp_part("mlp"),
    },
    sites={
        **resid_pre(),
        "attn.q": Site("query_key_value:output", NEOX_QKV, index=0),
        "attn.k": Site("query_key_value:output", NEOX_QKV, index=1),
        "attn.v": Site("query_key_value:output", NEOX_QKV, index=2),
        "attn.pattern": Site("pattern:", "b h t t"),
        "attn.z": Site("dense:input", HEADS),
        "attn.out": Site(":output"),
        # With the parallel residual (Pythia) nothing stands between attention and MLP; without it, this sum does.
        "resid_mid": Site("/attn_output_1:output", base=LAYER, when="!layer.use_parallel_residual"),
        **mlp("dense_4h_to_h"),
        **resid_post(),
    },
    final_norm="gpt_neox.final_layer_norm",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
)
