"""RWKV-7 "Goose" (Peng et al. 2025, arXiv:2503.14456) in plain torch, known to transformers' Auto classes.

transformers has RWKV-4 alone, and flash-linear-attention's RWKV-7 runs on CUDA alone. This one has the latter's names
for configuration and weights, so that the same folders load, and reads the authors' ``.pth`` files.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .configuration import RWKV7Config
from .modeling import RWKV7ForCausalLM
from .tokenizer import RwkvTokenizer

AutoConfig.register(RWKV7Config.model_type, RWKV7Config, exist_ok=True)
AutoModelForCausalLM.register(RWKV7Config, RWKV7ForCausalLM, exist_ok=True)
AutoTokenizer.register(RWKV7Config, slow_tokenizer_class=RwkvTokenizer, exist_ok=True)

__all__ = ["RWKV7Config", "RWKV7ForCausalLM", "RwkvTokenizer"]
