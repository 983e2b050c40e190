"""Models: `load_model`, the `Model` a user holds and its views, the zoo."""

from __future__ import annotations

from .load import load_model
from .model import Model

__all__ = ["Model", "load_model"]
