"""Hymba (Dong et al. 2024, arXiv:2411.13676) in plain torch, known to transformers' Auto classes.

The published code runs on CUDA alone, with kernels and a transformers of its time. This one loads the same folders.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration import HymbaConfig
from .modeling import HymbaForCausalLM

AutoConfig.register(HymbaConfig.model_type, HymbaConfig, exist_ok=True)
AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM, exist_ok=True)

__all__ = ["HymbaConfig", "HymbaForCausalLM"]
