"""Maps from site names to where the tensors live in Hugging Face's code: one small file a family."""

from __future__ import annotations

from .base import Architecture, Part, Site
from .registry import ARCHITECTURES, architecture_of, language_model_type, register

__all__ = ["ARCHITECTURES", "Architecture", "Part", "Site", "architecture_of", "language_model_type", "register"]
