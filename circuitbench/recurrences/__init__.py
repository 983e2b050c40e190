"""Scans as pure functions on tensors; the same verbs in every module, and in a `Stepwise` of one's own."""

from __future__ import annotations

from typing import Any

from circuitbench.errors import BadInput, UnsupportedModel
from circuitbench.recurrences import gated_delta, kda, mlstm, rg_lru, rwkv7, s6, ssd, wkv4
from circuitbench.recurrences.stepwise import Stepwise

RECURRENCES = {
    "s6": s6,
    "ssd": ssd,
    "gated_delta": gated_delta,
    "kda": kda,
    "rwkv7": rwkv7,
    "rg_lru": rg_lru,
    "wkv4": wkv4,
    "mlstm": mlstm,
}
SHIPPED = frozenset(RECURRENCES)
VERBS = ("forward", "states", "iter_states", "decay_of", "write_of", "adjoint", "mixing", "knockout", "frozen")


def register(name: str, recurrence: Any) -> Any:
    """Add a recurrence (or replace one of your own), so that a `Scan` can name it.

    Args:
        name: What a `Scan` calls it.
        recurrence: A `Stepwise`, or a module with the same verbs.

    Returns:
        The recurrence.

    Raises:
        BadInput: For a name that the package uses, or a recurrence that lacks a verb.
    """
    if name in SHIPPED:
        raise BadInput(f"{name!r} is a recurrence of circuitbench; give yours another name.")
    lacking = [verb for verb in VERBS if not callable(getattr(recurrence, verb, None))]
    if lacking:
        raise BadInput(f"The recurrence {name!r} has no {', '.join(lacking)}; write its step and let Stepwise do it.")
    RECURRENCES[name] = recurrence
    return recurrence


def recurrence_of(name: str) -> Any:
    """The recurrence that a `Scan` names.

    Raises:
        UnsupportedModel: If there is none of this name.
    """
    if name not in RECURRENCES:
        raise UnsupportedModel(
            f"There is no recurrence {name!r}; there are {', '.join(RECURRENCES)}. Add yours with "
            "circuitbench.recurrences.register(name, Stepwise(...))."
        )
    return RECURRENCES[name]


__all__ = [
    "RECURRENCES",
    "Stepwise",
    "gated_delta",
    "kda",
    "mlstm",
    "recurrence_of",
    "register",
    "rg_lru",
    "rwkv7",
    "s6",
    "ssd",
    "wkv4",
]
