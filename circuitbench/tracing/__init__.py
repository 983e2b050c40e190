"""Running a model with every tensor in reach: capture, interventions, generation, local and remote."""

from __future__ import annotations

from ..models.jobs import Pending
from .addresses import resolve
from .check import check
from .continued import Continued, continue_from
from .features import Feature
from .generation import generate_text
from .hold import ablate, hold, steer
from .interventions import Ablate, Add, Intervention, Knockout, Scale, Set
from .run import Activations, Result, capture, intervene

__all__ = [
    "Ablate",
    "Activations",
    "Add",
    "Continued",
    "Feature",
    "Intervention",
    "Knockout",
    "Pending",
    "Result",
    "Scale",
    "Set",
    "ablate",
    "capture",
    "check",
    "continue_from",
    "generate_text",
    "hold",
    "intervene",
    "resolve",
    "steer",
]
