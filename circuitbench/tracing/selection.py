"""Positions, heads and channels: from what a user names to masks over a tensor.

`select` and `restrict` travel to remote servers by value: only torch here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

Positions = Any  # None, "last", int, slice, a sequence of ints, or a boolean mask (b, n) over each prompt's own tokens


def select(
    positions: Positions, index: Int[Tensor, "b t"], lengths: Int[Tensor, " b"], growing: bool = False
) -> Bool[Tensor, "b t"]:
    """Which columns of this forward are meant.

    Args:
        positions: ``None``: every real token. An int, a sequence of ints or a slice: indices into each prompt's own
            tokens, negative ones from its end. ``"last"``: its last token. A boolean mask `(b, n)`.
        index: Token index of every column, -1 for padding. Tokens generated after the prompt count on from it.
        lengths: Tokens of each prompt.
        growing: Whether tokens may be generated after the prompt, so that an index past its end may still come.

    Raises:
        BadInput: For an index past a prompt's end, a mask of another size, or another type.
    """
    real = index >= 0
    lengths = lengths.to(index.device)
    if positions is None:
        return real
    if isinstance(positions, str):
        if positions != "last":
            raise BadInput(f'positions={positions!r}; the only name is "last".')
        return real & (index == lengths[:, None] - 1)
    if isinstance(positions, torch.Tensor) and positions.dtype == torch.bool:
        return selected_by_mask(positions, index, real)
    if isinstance(positions, slice):
        return selected_by_slice(positions, index, lengths, real)
    if isinstance(positions, torch.Tensor):
        positions = positions.tolist()
    wanted = [positions] if isinstance(positions, int) else list(positions)
    chosen = torch.zeros_like(real)
    for position in wanted:
        if not isinstance(position, int) or isinstance(position, bool):
            raise BadInput(f"positions holds {position!r}; give ints, a slice, a boolean mask, or 'last'.")
        shortest = int(lengths.min())
        if position < -shortest or (position >= shortest and not growing):
            raise BadInput(
                f"Position {position} is out of range: the shortest prompt has {shortest} tokens, so positions run "
                f"from {-shortest} to {shortest - 1}."
            )
        chosen |= real & (index == (position if position >= 0 else lengths[:, None] + position))
    return chosen


def selected_by_mask(mask: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """Columns that a boolean mask over each prompt's own tokens names."""
    if mask.dim() == 1:
        mask = mask[None].expand(index.shape[0], -1)
    if mask.dim() != 2 or mask.shape[0] != index.shape[0]:
        raise BadInput(f"A position mask is (b, n) with b={index.shape[0]} prompts; this one is {tuple(mask.shape)}.")
    mask = mask.to(index.device)
    inside = real & (index < mask.shape[1])
    return inside & mask.gather(1, index.clamp(0, mask.shape[1] - 1))


def selected_by_slice(positions: slice, index: Tensor, lengths: Tensor, real: Tensor) -> Tensor:
    """Columns in a slice; an open end goes on through generated tokens."""
    step = positions.step or 1
    if step < 1:
        raise BadInput(f"positions={positions!r}: the step of a slice of positions is 1 or more.")
    start = positions.start or 0
    first = lengths[:, None] + start if start < 0 else torch.full_like(lengths, start)[:, None]
    chosen = real & (index >= first) & ((index - first) % step == 0)
    if positions.stop is not None:
        stop = lengths[:, None] + positions.stop if positions.stop < 0 else positions.stop
        chosen &= index < stop
    return chosen


def restrict(
    chosen: Bool[Tensor, "b t"], value: Tensor, heads: Any, channels: Any, address: str, has_heads: bool
) -> Tensor:
    """The mask over `value` `(b, t, ...)` for some positions, heads and channels.

    Args:
        chosen: Positions, `(b, t)`.
        value: The site's tensor.
        heads: Heads (axis 2), or ``None`` for all.
        channels: Channels (last axis), or ``None`` for all.
        address: The site, for errors.
        has_heads: Whether axis 2 counts heads.
    """
    mask = chosen.reshape(*chosen.shape, *[1] * (value.dim() - 2)).to(value.device)
    if heads is not None:
        if not has_heads:
            raise BadInput(
                f"{address} has no heads (its shape is {tuple(value.shape)}); leave heads= out, or use channels=."
            )
        mask = mask & along(heads, value, 2, "heads", address)
    if channels is not None:
        mask = mask & along(channels, value, value.dim() - 1, "channels", address)
    return mask.expand(value.shape)


def along(wanted: Any, value: Tensor, axis: int, name: str, address: str) -> Tensor:
    """A mask over one axis, shaped to broadcast over `value`."""
    size = value.shape[axis]
    mask = torch.zeros(size, dtype=torch.bool, device=value.device)
    indices = [wanted] if isinstance(wanted, int) else wanted
    if isinstance(indices, (list, tuple)):
        for index in indices:
            if not isinstance(index, int) or not -size <= index < size:
                raise BadInput(f"{address} has {name} 0 to {size - 1}; {name}={wanted!r} is out of range.")
        indices = list(indices)
    mask[indices] = True
    shape = [1] * value.dim()
    shape[axis] = size
    return mask.reshape(shape)
