"""Maps from site names to where the tensors live in Hugging Face's code: one small file a family."""

from __future__ import annotations

from .base import Architecture, Part, Site
from .function_scan import FunctionScan
from .registry import ARCHITECTURES, architecture_of, families_like, language_model_type, register

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "FunctionScan",
    "Part",
    "Site",
    "architecture_of",
    "families_like",
    "language_model_type",
    "register",
]
