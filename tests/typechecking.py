"""Makes the run-time shape checks (`--jaxtyping-packages` in pyproject.toml) hold in traces and in travelling code."""

from __future__ import annotations

import builtins
import contextvars
import types

import jaxtyping
import torch
from jaxtyping import _decorator, _storage
from nnsight.intervention.serialization import CustomCloudPickler


class _StackPerGreenlet:
    """jaxtyping binds axis names per thread, but each invoke of a trace is a greenlet, and they share one thread."""

    _stack: contextvars.ContextVar[list] = contextvars.ContextVar("memo_stack")

    @property
    def memo_stack(self) -> list:
        try:
            return self._stack.get()
        except LookupError:
            raise AttributeError("memo_stack") from None

    @memo_stack.setter
    def memo_stack(self, stack: list) -> None:
        self._stack.set(stack)


def fit_to_nnsight() -> None:
    """Install the three adaptations: once, after nnsight is imported and before any module of the package is."""
    _storage._shape_storage = _StackPerGreenlet()

    # Travelling modules may import these names under TYPE_CHECKING only, and jaxtyping skips an annotation it cannot
    # resolve without a word: so the names resolve everywhere. (That none is used at run time is ruff's TC004.)
    for name, kind in vars(jaxtyping).items():
        if isinstance(kind, type) and issubclass(kind, jaxtyping.AbstractDtype):
            setattr(builtins, name, kind)
    builtins.Tensor = torch.Tensor

    # The check wraps each function, and nnsight ships the source of what is wrapped with the globals of the wrapper.
    reduce = CustomCloudPickler._dynamic_function_reduce

    def reduce_the_function_itself(self: CustomCloudPickler, function: types.FunctionType) -> tuple:
        if function.__code__.co_filename == _decorator.__file__:
            function = function.__wrapped__
        return reduce(self, function)

    CustomCloudPickler._dynamic_function_reduce = reduce_the_function_itself
