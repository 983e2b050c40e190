"""What every reader does: look before it takes. A dictionary comes of a file whole, or one sentence says why not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.building import build
from circuitbench.errors import BadInput

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not path.is_file():
        raise BadInput(f"{path} is missing.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON ({error}); save the dictionary again.") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds a JSON {type(found).__name__}; a dictionary is described by an object {{…}}.")
    return found


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a file, and the text beside them."""
    if not path.is_file():
        raise BadInput(f"{path} is missing; weights are read from safetensors only, never from a pickle.")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise BadInput(f"{path} is truncated or not a safetensors file ({error}); copy it again.") from error


def integer(config: Mapping[str, Any], name: str, path: Path) -> int:
    """A size that the configuration must hold."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadInput(f"{path} says {name} = {value!r}; it must be a whole number, at least 1.")
    return value


def dtype_of(config: Mapping[str, Any], path: Path) -> torch.dtype:
    """The dtype to compute in; float32 where none is named."""
    name = str(config.get("dtype", "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise BadInput(f"{path} says dtype = {config['dtype']!r}; known are {', '.join(DTYPES)}.")
    return DTYPES[name]


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str, path: Path) -> None:
    """That a file holds exactly these tensors, in floating-point numbers that are finite.

    Args:
        what: the kind of dictionary, as the message names it.
    """
    if set(tensors) != set(shapes):
        raise BadInput(
            f"{path} holds the tensors {', '.join(sorted(tensors)) or 'none'}; "
            f"a {what} dictionary has {', '.join(sorted(shapes))}."
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise BadInput(
                f"{path} holds {name} with shape {tuple(tensor.shape)}; the sizes beside it ask for {shape}."
            )
        if tensor.dtype not in DTYPES.values():
            raise BadInput(f"{path} holds {name} in {tensor.dtype}; weights are one of {', '.join(DTYPES)}.")
        if not torch.isfinite(tensor).all():
            raise BadInput(f"{path} holds {name} with values that are not finite; the training that made it failed.")


def assemble(
    kind: str,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    path: Path,
    fold: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    **arguments: Any,
) -> Dictionary:
    """A dictionary of the weights in a file, which go by our names and lie as ours do.

    Args:
        kind: of the dictionary.
        tensors: its parameters and buffers.
        dtype: to compute in.
        path: the file, for messages.
        fold: brings options of the file into the weights, once these were looked at; in float32 or wider.
        **arguments: of `build`: sizes and settings. What it refuses is said of the file.
    """
    try:
        dictionary = build(kind, dtype=dtype, **arguments)
    except BadInput as error:
        raise BadInput(f"{path.parent} does not describe a {kind!r} dictionary: {error}") from error
    own = dictionary.state_dict()
    check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in own.items()}, repr(kind), path)
    wide = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()}
    folded = fold(wide)
    for name, tensor in own.items():
        tensor.copy_(folded[name])
    return dictionary
