"""Which map fits which model."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from transformers import CONFIG_MAPPING

from ..errors import UnsupportedModel
from . import (
    bamba,
    falcon_h1,
    granitemoehybrid,
    hymba,
    jamba,
    kimi_linear,
    lfm2,
    mamba,
    mamba2,
    minimax,
    nemotron_h,
    olmo_hybrid,
    qwen3_5,
    qwen3_next,
    recurrent_gemma,
    rwkv,
    rwkv7,
    transformer,
    xlstm,
    zamba,
    zamba2,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .base import Architecture

ARCHITECTURES: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Add a map (or replace one), so that `load_model` finds it by its ``model_type``.

    Args:
        architecture: The map. Run ``circuitbench.check`` on a model of the family before you trust it.
    """
    ARCHITECTURES[architecture.model_type] = architecture
    return architecture


def language_model_type(model_type: str) -> str:
    """The ``model_type`` of a family's language model, where Hugging Face has one of its own for what sees as well."""
    if model_type in ARCHITECTURES or model_type not in CONFIG_MAPPING:
        return model_type
    parts = getattr(CONFIG_MAPPING[model_type], "sub_configs", {})
    return getattr(parts.get("text_config"), "model_type", model_type)


def families_like(name: str) -> str:
    """How many maps there are, and those with names like this one, for an error."""
    near = difflib.get_close_matches(name, ARCHITECTURES, 4, 0.0)
    return (
        f"maps for {len(ARCHITECTURES)} families, with names like this {', '.join(near)} (all of them: "
        "sorted(circuitbench.architectures.ARCHITECTURES))"
    )


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The map for a Hugging Face configuration, or for its text part.

    Raises:
        UnsupportedModel: If no map is registered for its ``model_type``.
    """
    model_type = language_model_type(config.model_type)
    if model_type not in ARCHITECTURES:
        raise UnsupportedModel(
            f"No architecture map for model_type {config.model_type!r}; there are {families_like(model_type)}. "
            "Add yours with circuitbench.register_architecture(Architecture(...))."
        )
    return ARCHITECTURES[model_type]


for _map in (
    mamba.MAMBA,
    mamba.FALCON_MAMBA,
    mamba2.MAMBA2,
    jamba.JAMBA,
    falcon_h1.FALCON_H1,
    hymba.HYMBA,
    bamba.BAMBA,
    zamba.ZAMBA,
    zamba2.ZAMBA2,
    nemotron_h.NEMOTRON_H,
    granitemoehybrid.GRANITEMOEHYBRID,
    qwen3_next.QWEN3_NEXT,
    qwen3_5.QWEN3_5,
    qwen3_5.QWEN3_5_MOE,
    kimi_linear.KIMI_LINEAR,
    kimi_linear.BAILING_HYBRID,
    lfm2.LFM2,
    lfm2.LFM2_MOE,
    lfm2.LFM3,
    olmo_hybrid.OLMO_HYBRID,
    minimax.MINIMAX,
    recurrent_gemma.RECURRENT_GEMMA,
    rwkv.RWKV,
    rwkv7.RWKV7,
    xlstm.XLSTM,
    transformer.GPT2,
    transformer.GPT_NEOX,
    transformer.LLAMA,
    transformer.MISTRAL,
    transformer.QWEN2,
    transformer.QWEN3,
    transformer.GEMMA2,
    transformer.GEMMA3,
):
    register(_map)
