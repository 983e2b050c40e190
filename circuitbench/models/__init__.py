"""Models: `load_model`, the `Model` a user holds and its views, the zoo."""

from __future__ import annotations

from .load import load_model
from .model import Model
from .prefix import run_prefix
from .state import State, load_state

__all__ = ["Model", "State", "load_model", "load_state", "run_prefix"]
