"""How activations are stored: as floats, or as small integers with a scale for every channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float, Int8, UInt8

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEVELS = {"int8": 127, "int4": 7}  # symmetric: −levels … levels
FORMATS = (*FLOATS, *LEVELS)


def check_format(name: str) -> str:
    """A format's name, if there is one."""
    if name not in FORMATS:
        raise BadInput(f"dtype={name!r} is not a way to store activations; there are {', '.join(map(repr, FORMATS))}.")
    return name


def suffixes(name: str) -> tuple[str, ...]:
    """Of the names of the tensors that `encoded` makes."""
    return ("",) if name in FLOATS else ("", ".scale")


def encoded(x: Float[Tensor, "n d"], name: str, address: str = "activations") -> dict[str, Tensor]:
    """The tensors to store. Integers are off by at most half a step, and a step is a channel's largest value / levels.

    Args:
        x: Activations.
        name: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"`` (two numbers a byte).
        address: What they are, for the error.

    Raises:
        BadInput: For activations that are not finite, as integers: a scale cannot hold them.
    """
    if name in FLOATS:
        return {"": x.to(FLOATS[name]).contiguous()}
    levels = LEVELS[name]
    if not x.isfinite().all():
        raise BadInput(f"{address} holds values that are not finite, which {name} cannot store; store it as float32.")
    x = x.float()
    largest = x.abs().amax(0) if len(x) else x.new_zeros(x.shape[1])
    scale = (largest / levels).clamp_min(torch.finfo(torch.float32).tiny)
    steps = (x / scale).round().clamp(-levels, levels).to(torch.int8)
    return {"": steps if name == "int8" else two_in_a_byte(steps), ".scale": scale}


def decoded(stored: dict[str, Tensor], name: str, width: int) -> Float[Tensor, "n d"]:
    """Activations from what `encoded` stored, in float32 (bfloat16 as it is).

    Args:
        stored: The tensors.
        name: The format.
        width: Numbers in a row.
    """
    if name in FLOATS:
        return stored[""]
    steps = stored[""] if name == "int8" else from_two_in_a_byte(stored[""], width)
    return steps.float() * stored[".scale"]


def two_in_a_byte(steps: Int8[Tensor, "n d"]) -> UInt8[Tensor, "n half"]:
    """Numbers from −8 to 7, two neighbours in a byte, the first in its low half."""
    unsigned = (steps + 8).to(torch.uint8)
    if unsigned.shape[1] % 2:
        unsigned = torch.nn.functional.pad(unsigned, (0, 1))
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def from_two_in_a_byte(packed: UInt8[Tensor, "n half"], width: int) -> Int8[Tensor, "n d"]:
    """The numbers again."""
    both = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    return both[:, :width].to(torch.int8) - 8
