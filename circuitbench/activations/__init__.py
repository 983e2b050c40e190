"""From text to activations: streams of many sites in one pass, shuffled, or stored in shards."""

from __future__ import annotations

from .shards import StoredActivations, store
from .shuffle import Shuffled, mixing
from .stream import ActivationStream, Rows
from .text import Documents, packed

__all__ = ["ActivationStream", "Documents", "Rows", "Shuffled", "StoredActivations", "mixing", "packed", "store"]
