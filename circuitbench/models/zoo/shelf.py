"""The zoo's models as folders that transformers loads."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from circuitbench.errors import BadInput
from circuitbench.models.zoo.compiled import Truth

_WEIGHTS = pathlib.Path(__file__).with_name("weights")


def names() -> list[str]:
    """Returns the names of the models, as in `load_model("zoo:<name>")`."""
    return sorted(folder.parent.name for folder in _WEIGHTS.glob("*/zoo.json"))


def path(name: str) -> pathlib.Path:
    """Returns the folder of a model: its configuration, float16 weights, tokenizer, and `zoo.json` (see `record`).

    Raises:
        BadInput: No model of this name.
    """
    if name not in names():
        raise BadInput(f"There is no zoo model {name!r}; there are: {', '.join(names())}.")
    return _WEIGHTS / name


def record(name: str) -> dict[str, Any]:
    """Returns what is known about a model: data, recipe, scores, seconds of training, licence.

    Raises:
        BadInput: No model of this name.
    """
    return json.loads((path(name) / "zoo.json").read_text())


def truth(name: str) -> Truth:
    """Returns the circuit of a model whose weights were set by code.

    Raises:
        BadInput: No model of this name, or one that was trained, whose circuit nobody has written down.
    """
    circuit = record(name).get("truth")
    if circuit is None:
        known = [other for other in names() if "truth" in record(other)]
        raise BadInput(
            f"The circuit of {name!r} is not known, for it was trained; known are those of: {', '.join(known)}."
        )
    return Truth(**circuit | {key: tuple(value) for key, value in circuit.items() if isinstance(value, list)})
