"""Mamba (Gu & Dao 2023, arXiv:2312.00752) and Falcon-Mamba, which adds weightless norms on dt, B and C."""

from __future__ import annotations

from .base import Architecture
from .blocks import resid_post, resid_pre, s6, s6_part

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "expand": 2,
    "conv_kernel": 4,
    "time_step_rank": 4,
}

MAMBA = Architecture(
    model_type="mamba",
    layers="backbone.layers",
    parts={"ssm": s6_part("mixer")},
    sites={**resid_pre(), **s6(), **resid_post()},
    final_norm="backbone.norm_f",
    random_config=TINY,
)

FALCON_MAMBA = Architecture(
    model_type="falcon_mamba",
    layers="backbone.layers",
    parts={"ssm": s6_part("mixer")},
    sites={**resid_pre(), **s6(), **resid_post()},
    final_norm="backbone.norm_f",
    random_config=TINY,
)
