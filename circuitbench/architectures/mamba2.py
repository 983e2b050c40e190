"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060)."""

from __future__ import annotations

from .base import Architecture
from .blocks import resid_post, resid_pre, ssd, ssd_part

MAMBA2 = Architecture(
    model_type="mamba2",
    layers="backbone.layers",
    parts={"ssm": ssd_part("mixer")},
    sites={**resid_pre(), **ssd(), **resid_post()},
    final_norm="backbone.norm_f",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "expand": 2,
        "head_dim": 16,
        "num_heads": 4,
        "n_groups": 2,
        "chunk_size": 8,
    },
)
