"""Families and random configurations that the tests run over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import circuitbench as cb
from circuitbench.architectures import ARCHITECTURES
from circuitbench.models.random import random_model

S6 = ["mamba", "falcon_mamba", "jamba"]
SSD = ["mamba2", "falcon_h1", "bamba", "zamba2", "nemotron_h", "granitemoehybrid"]
DELTA = ["qwen3_next", "kimi_linear"]
RNN = ["recurrent_gemma", "rwkv", "xlstm"]
RECURRENT = [*S6, *SSD, *DELTA, *RNN]
SHORT_CONV = ["lfm2", "lfm2_moe", "lfm3"]
# Alike another family but for their own modules, which `check` and the tests of sites and mixers look at.
TWINS = ["qwen3_5_text", "qwen3_5_moe_text", "bailing_hybrid", "lfm2", "lfm3"]
TRANSFORMERS = ["gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
FAMILIES = [*RECURRENT, "olmo_hybrid", "lfm2_moe", *TRANSFORMERS]
PADDED = [family for family in FAMILIES if family not in RNN]  # where padding is masked

ODD_DELTA = {"linear_num_key_heads": 1, "linear_num_value_heads": 3}
ODD_DELTA |= {"linear_key_head_dim": 5, "linear_value_head_dim": 7}
ODD_S6 = {"hidden_size": 24, "state_size": 5, "expand": 3, "conv_kernel": 3, "time_step_rank": 3}

# name -> (family, changes to its tiny configuration)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "mamba-odd-sizes": ("mamba", {**ODD_S6, "use_bias": True}),
    "mamba-no-conv-bias": ("mamba", {"use_conv_bias": False, "conv_kernel": 2}),
    "falcon_mamba": ("falcon_mamba", {}),
    "falcon_mamba-odd-sizes": ("falcon_mamba", {**ODD_S6, "use_bias": True}),
    "jamba": ("jamba", {}),
    "jamba-odd-sizes": ("jamba", {"mamba_d_state": 5, "mamba_expand": 3, "mamba_d_conv": 3, "mamba_proj_bias": True}),
    "mamba2": ("mamba2", {}),
    "mamba2-one-group": ("mamba2", {"n_groups": 1, "use_bias": True, "chunk_size": 5}),
    "mamba2-many-groups": ("mamba2", {"n_groups": 4, "num_heads": 8, "head_dim": 8, "use_conv_bias": False}),
    "mamba2-dt-limits": ("mamba2", {"time_step_limit": (0.02, 0.06)}),
    "falcon_h1": ("falcon_h1", {}),
    "falcon_h1-gate-first": ("falcon_h1", {"mamba_norm_before_gate": False}),
    "falcon_h1-no-norm": ("falcon_h1", {"mamba_rms_norm": False, "mamba_n_groups": 1}),
    "falcon_h1-no-norm-many-groups": (
        "falcon_h1",
        {"mamba_rms_norm": False, "mamba_n_groups": 4, "mamba_conv_bias": False, "projectors_bias": True},
    ),
    "falcon_h1-dt-limits": ("falcon_h1", {"time_step_limit": (1.2, 1.5)}),
    "bamba": ("bamba", {}),
    "bamba-many-groups": ("bamba", {"mamba_n_groups": 4, "mamba_proj_bias": True, "mamba_d_conv": 3}),
    "bamba-dt-limits": ("bamba", {"time_step_limit": (0.9, 1.5)}),
    "zamba2": ("zamba2", {}),
    "zamba2-adapters": ("zamba2", {"use_shared_attention_adapter": True, "num_mem_blocks": 2}),
    "zamba2-rope": ("zamba2", {"use_mem_rope": True, "mamba_ngroups": 2}),
    "zamba2-dt-floor": ("zamba2", {"time_step_min": 0.03}),
    "nemotron_h": ("nemotron_h", {}),
    "nemotron_h-many-groups": ("nemotron_h", {"n_groups": 4, "use_bias": True, "mamba_proj_bias": True}),
    "nemotron_h-dt-floor": ("nemotron_h", {"time_step_min": 0.03}),
    "granitemoehybrid": ("granitemoehybrid", {}),
    "granitemoehybrid-no-experts": ("granitemoehybrid", {"num_local_experts": 0, "mamba_n_groups": 1}),
    "granitemoehybrid-many-groups": ("granitemoehybrid", {"mamba_n_groups": 4, "mamba_conv_bias": False}),
    "granitemoehybrid-dt-limits": ("granitemoehybrid", {"time_step_limit": (0.9, 1.5)}),
    "qwen3_next": ("qwen3_next", {}),
    "qwen3_next-odd-sizes": ("qwen3_next", ODD_DELTA),
    "qwen3_5_text": ("qwen3_5_text", {}),
    "qwen3_5_text-odd-sizes": ("qwen3_5_text", {**ODD_DELTA, "linear_conv_kernel_dim": 3}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {}),
    "olmo_hybrid": ("olmo_hybrid", {}),
    "olmo_hybrid-odd-sizes": ("olmo_hybrid", {**ODD_DELTA, "linear_conv_kernel_dim": 2}),
    "olmo_hybrid-no-positions": (
        "olmo_hybrid",
        {"linear_allow_neg_eigval": False, "rope_parameters": {"rope_theta": None}},
    ),
    "kimi_linear": ("kimi_linear", {}),
    "kimi_linear-odd-sizes": (
        "kimi_linear",
        {"linear_num_heads": 3, "linear_head_dim": 5, "linear_conv_kernel_dim": 3, "q_lora_rank": 6, "v_head_dim": 7},
    ),
    "lfm2": ("lfm2", {}),
    "lfm2-odd-sizes": ("lfm2", {"hidden_size": 20, "conv_L_cache": 4, "num_attention_heads": 2}),
    "lfm2-bias": ("lfm2", {"conv_bias": True}),
    "lfm2_moe": ("lfm2_moe", {}),
    "lfm3": ("lfm3", {}),
    "lfm3-plain": ("lfm3", {"use_sandwich_norm": False, "use_attention_gate": False}),
    "bailing_hybrid": ("bailing_hybrid", {}),
    "bailing_hybrid-unbounded": ("bailing_hybrid", {"kda_safe_gate": False}),
    "recurrent_gemma": ("recurrent_gemma", {}),
    "recurrent_gemma-odd-sizes": (
        "recurrent_gemma",
        {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "conv1d_width": 3},
    ),
    "rwkv": ("rwkv", {}),
    "rwkv-odd-sizes": ("rwkv", {"hidden_size": 24, "attention_hidden_size": 24, "rescale_every": 0}),
    "xlstm": ("xlstm", {}),
    "xlstm-odd-sizes": ("xlstm", {"num_heads": 2, "v_dim_factor": 1.0, "use_bias": True, "chunk_size": 5}),
}


def plain(variant: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny model of one of the variants, as transformers makes it."""
    family, changes = VARIANTS.get(variant, (variant, {}))
    hf = random_model(ARCHITECTURES[family], **{**changes, **overrides})
    # transformers' grouped matrix product of the experts refuses float64, and odd widths in bfloat16.
    if getattr(hf.config, "_experts_implementation", None) is not None:
        hf.set_experts_implementation("eager")
    return hf.to(dtype)


def load(variant: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> cb.Model:
    """The same model, ready to be traced."""
    return cb.load_model(plain(variant, dtype, **overrides))


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def relative(value: Tensor, expected: Tensor) -> float:
    """Largest error, relative to the largest value."""
    return ((value.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
