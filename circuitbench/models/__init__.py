"""Models: `load_model`, the `Model` a user holds and its views, the zoo."""

from __future__ import annotations

from .load import load_model
from .model import Model
from .state import State, load_state, run_prefix

__all__ = ["Model", "State", "load_model", "load_state", "run_prefix"]
