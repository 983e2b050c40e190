"""From text to activations: streams of many sites in one pass, shuffled, in training batches, or stored in shards."""

from __future__ import annotations

from .batches import RowBatches, source_of
from .numbers import FORMATS
from .rows import Rows
from .shards import StoredActivations
from .shuffle import Shuffled, mixing
from .stream import ActivationStream, Counts, name_of
from .text import Documents, packed
from .writing import store

__all__ = [
    "FORMATS",
    "ActivationStream",
    "Counts",
    "Documents",
    "RowBatches",
    "Rows",
    "Shuffled",
    "StoredActivations",
    "mixing",
    "name_of",
    "packed",
    "source_of",
    "store",
]
