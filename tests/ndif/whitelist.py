"""NDIF's whitelist: what a request may import, by a reference in its pickle or by a statement in its code."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from nnsight.intervention.serialization import CustomCloudUnpickler

ALLOWED = frozenset(
    ("builtins", "collections", "einops", "enum", "math", "nnsight", "numpy")
    + ("operator", "pandas", "sympy", "time", "torch", "typing")
)
REBUILDING = frozenset({"_operator", "cloudpickle", "copyreg", "pickle"})  # allowed to the pickle alone

_serving = threading.local()
_import = builtins.__import__


def refuse(name: str, how: str, allowed: frozenset[str] = ALLOWED) -> None:
    """Raise unless the module is allowed."""
    if name.partition(".")[0] not in allowed:
        names = ", ".join(sorted(ALLOWED))
        raise ImportError(f"the request {how} {name!r}, which is not allowed here; allowed are {names}", name=name)


def _checked_import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    if getattr(_serving, "request", False):
        scope = sys._getframe(1).f_globals
        module = sys.modules.get(scope.get("__name__", ""))
        # A library's code runs in the namespace of its module, what came with the request in dictionaries of its own.
        if module is None or vars(module) is not scope:
            refuse(name or "." * level, "imports")
    return _import(name, globals, locals, fromlist, level)


builtins.__import__ = _checked_import


@contextlib.contextmanager
def request_code() -> Iterator[None]:
    """Refuse what is not allowed to code of the request that runs in this thread."""
    _serving.request = True
    try:
        yield
    finally:
        _serving.request = False


def _checked_subimport(name: str) -> Any:
    """cloudpickle's reference to a module."""
    refuse(name, "refers to module")
    return importlib.import_module(name)


class Unpickler(CustomCloudUnpickler):
    """nnsight's own, with every reference to a module checked."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("cloudpickle.cloudpickle", "subimport"):
            return _checked_subimport
        refuse(module, f"refers to {name!r} of module", ALLOWED | REBUILDING)
        return super().find_class(module, name)
