"""One run at a time and model: nnsight's workers belong to the thread that runs the model."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import Model

_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


def lock_of(model: Model) -> threading.RLock:
    """The lock that our own functions hold while they run this model; several threads take turns."""
    return _LOCKS.setdefault(model.hf, threading.RLock())
