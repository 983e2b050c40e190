"""Positions, heads and channels: from what a user names to masks over a tensor.

All of this travels to remote servers by value: only torch here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

Positions = Any  # None, "last", int, slice, a sequence of ints, or a boolean mask (b, n) over each prompt's own tokens


class Columns:
    """Which of each prompt's own tokens the columns of one forward hold.

    Attributes:
        index: Token index of every column, -1 for padding and meta tokens.
        lengths: Tokens of each prompt.
        growing: Whether tokens may be generated after the prompt, so that an index past its end may still come.
        keys: Token index of everything that can be attended to, cached columns included.
        key_lengths: Tokens of each prompt that `keys` counts: more than `lengths` where a run goes on from a state.
    """

    def __init__(
        self,
        index: Int[Tensor, "b t"],
        lengths: Int[Tensor, " b"],
        growing: bool = False,
        keys: Int[Tensor, "b keys"] | None = None,
        key_lengths: Int[Tensor, " b"] | None = None,
    ) -> None:
        self.index = index
        self.lengths = lengths
        self.growing = growing
        self.keys = index if keys is None else keys
        self.key_lengths = lengths if key_lengths is None else key_lengths

    @property
    def real(self) -> Bool[Tensor, "b t"]:
        """Columns that hold a prompt's own token."""
        return self.index >= 0

    def last(self, count: int) -> Columns:
        """The last columns alone (``generate`` asks for no logits but those)."""
        return self.among(slice(self.index.shape[1] - count, None))

    def only(self, column: int) -> Columns:
        """One column alone."""
        return self.among(slice(column, column + 1))

    def among(self, columns: slice) -> Columns:
        """Some of the columns."""
        return Columns(self.index[:, columns], self.lengths, self.growing, self.keys, self.key_lengths)

    def kept(self, count: int) -> Int[Tensor, "b keys"]:
        """`keys`, of the last `count` columns: a sliding window has forgotten those before."""
        return self.keys[:, self.keys.shape[1] - count :]

    def chosen(self, positions: Positions) -> Bool[Tensor, "b t"]:
        """Which columns `positions` means (see `select`)."""
        return select(positions, self.index, self.lengths, self.growing)


def select(
    positions: Positions, index: Int[Tensor, "b t"], lengths: Int[Tensor, " b"], growing: bool = False
) -> Bool[Tensor, "b t"]:
    """Which columns of a forward are meant.

    Args:
        positions: ``None``: every real token. An int, a sequence of ints or a slice: indices into each prompt's own
            tokens, as in Python: negative ones from its end, slices cut off at its ends. ``"last"``: its last token. A
            boolean mask `(b, n)` or `(n,)`, as wide as the longest prompt has tokens.
        index: Token index of every column, -1 for padding. Tokens generated after the prompt count on from it.
        lengths: Tokens of each prompt.
        growing: Whether tokens may be generated after the prompt, so that an index past its end may still come.

    Raises:
        BadInput: For an index past a prompt's end, a mask of another size, another type, or nothing selected at all.
    """
    real = index >= 0
    lengths = lengths.to(index.device)
    chosen = selected(positions, index, lengths, real, growing)
    if not growing and not chosen.any():
        raise BadInput(
            f"positions={positions!r} selects no token: the longest prompt has {int(lengths.max())}, so positions run "
            f"from 0 to {int(lengths.max()) - 1}."
        )
    return chosen


def selected(positions: Positions, index: Tensor, lengths: Tensor, real: Tensor, growing: bool) -> Tensor:
    """`select`, which may be nothing."""
    if positions is None:
        return real
    if isinstance(positions, str):
        if positions != "last":
            raise BadInput(f'positions={positions!r}; the only name is "last".')
        return real & (index == lengths[:, None] - 1)
    if isinstance(positions, torch.Tensor) and positions.dtype == torch.bool:
        return selected_by_mask(positions, index, lengths, real)
    if isinstance(positions, slice):
        return selected_by_slice(positions, index, lengths, real)
    chosen = torch.zeros_like(real)
    for position in listed(positions, lengths, growing):
        chosen |= real & (index == (position if position >= 0 else lengths[:, None] + position))
    return chosen


def listed(positions: Positions, lengths: Tensor, growing: bool = False) -> list[int]:
    """Positions given one by one, as a list, if every prompt has them."""
    if isinstance(positions, torch.Tensor):
        positions = positions.tolist()
    if not hasattr(positions, "__iter__") and not isinstance(positions, int):
        raise BadInput(f"positions={positions!r}; give ints, a slice, a boolean mask, or 'last'.")
    wanted = [positions] if isinstance(positions, int) else list(positions)
    shortest = int(lengths.min())
    for position in wanted:
        if not isinstance(position, int) or isinstance(position, bool):
            raise BadInput(f"positions holds {position!r}; give ints, a slice, a boolean mask, or 'last'.")
        if position < -shortest or (position >= shortest and not growing):
            raise BadInput(
                f"Position {position} is out of range: the shortest prompt has {shortest} tokens, so positions run "
                f"from {-shortest} to {shortest - 1}."
            )
    return wanted


def selected_by_mask(mask: Tensor, index: Tensor, lengths: Tensor, real: Tensor) -> Tensor:
    """Columns that a boolean mask over each prompt's own tokens names."""
    if mask.dim() == 1:
        mask = mask[None].expand(index.shape[0], -1)
    longest = int(lengths.max())
    if mask.dim() != 2 or mask.shape[0] != index.shape[0] or mask.shape[1] < longest:
        raise BadInput(
            f"A position mask is (b, n) with b={index.shape[0]} prompts and n={longest}, the tokens of the longest; "
            f"this one is {tuple(mask.shape)}."
        )
    mask = mask.to(index.device)
    inside = real & (index < mask.shape[1])
    return inside & mask.gather(1, index.clamp(0, mask.shape[1] - 1))


def selected_by_slice(positions: slice, index: Tensor, lengths: Tensor, real: Tensor) -> Tensor:
    """Columns in a slice; an open end goes on through generated tokens."""
    step = 1 if positions.step is None else positions.step
    if step < 1:
        raise BadInput(f"positions={positions!r}: the step of a slice of positions is 1 or more.")
    first = from_start(positions.start or 0, lengths)
    chosen = real & (index >= first) & ((index - first) % step == 0)
    return chosen if positions.stop is None else chosen & (index < from_start(positions.stop, lengths))


def from_start(bound: int, lengths: Tensor) -> Int[Tensor, "b 1"]:
    """One end of a slice in each prompt, counted from its start; a negative one that lies before it is cut off."""
    ends = lengths[:, None]
    return (ends + bound).clamp(min=0) if bound < 0 else torch.full_like(ends, bound)


def restrict(
    columns: Columns,
    positions: Positions,
    value: Tensor,
    heads: Any,
    channels: Any,
    address: str,
    axes: list[str],
) -> Tensor:
    """The mask over a site's tensor for some positions, heads and channels.

    Args:
        columns: What the forward's columns hold.
        positions: Positions; the queries, where a site has two position axes.
        value: The site's tensor, in its canonical layout.
        heads: Heads, or ``None`` for all.
        channels: Indices into the last axis, or ``None`` for all; where that axis counts positions (keys), they are
            positions in each prompt's own tokens.
        address: The site, for errors.
        axes: Names of its axes.
    """
    mask = spread(columns.chosen(positions), value, axes.index("t"))
    if heads is not None:
        counted = [axis for axis, name in enumerate(axes) if name in ("h", "kv")]
        if not counted:
            raise BadInput(
                f"{address} has no heads (its shape is {tuple(value.shape)}); leave heads= out, or use channels=."
            )
        mask = mask & along(heads, value, counted[0], "heads", address)
    if axes.count("t") == 2:
        keys = select(channels, columns.kept(value.shape[-1]), columns.key_lengths, columns.growing)
        mask = mask & spread(keys, value, len(axes) - 1)
    elif channels is not None:
        mask = mask & along(channels, value, value.dim() - 1, "channels", address)
    return mask.expand(value.shape)


def spread(mask: Bool[Tensor, "b n"], value: Tensor, axis: int) -> Tensor:
    """A mask over prompts and one axis, shaped to broadcast over `value`."""
    shape = [1] * value.dim()
    shape[0], shape[axis] = mask.shape
    return mask.reshape(shape).to(value.device)


def along(wanted: Any, value: Tensor, axis: int, name: str, address: str) -> Tensor:
    """A mask over one axis, shaped to broadcast over `value`."""
    size = value.shape[axis]
    if isinstance(wanted, torch.Tensor) and wanted.dtype == torch.bool:
        wanted = wanted.nonzero().flatten() if wanted.shape == (size,) else [size]  # a mask of another size is an error
    indices = wanted.tolist() if isinstance(wanted, torch.Tensor) else wanted
    indices = range(size)[indices] if isinstance(indices, slice) else indices
    indices = [indices] if isinstance(indices, int) else list(indices)
    if not indices or not all(isinstance(index, int) and -size <= index < size for index in indices):
        raise BadInput(f"{address} has {name} 0 to {size - 1}; {name}={wanted!r} is not among them.")
    mask = torch.zeros(size, dtype=torch.bool, device=value.device)
    mask[indices] = True
    shape = [1] * value.dim()
    shape[axis] = size
    return mask.reshape(shape)


def aligned(
    given: Any, value: Tensor, columns: Columns, chosen: Tensor, address: str, axes: list[str], what: str
) -> Tensor:
    """A number or tensor as a tensor over the site, each prompt's own tokens put into the columns that hold them.

    Args:
        given: What broadcasts over the site's canonical shape, its position axes counted in each prompt's own tokens
            (as `capture` returns them).
        value: The site's tensor.
        columns: What the forward's columns hold.
        chosen: The columns that are asked for, `(b, t)`.
        address: The site, for errors.
        axes: Names of its axes.
        what: Name of `given`, for errors.
    """
    given = torch.as_tensor(given).to(value.device, value.dtype)
    whole = given[(None,) * (value.dim() - given.dim())]
    longest = int(columns.lengths.max())
    for axis, name in enumerate(axes):
        if name != "t" or whole.dim() != value.dim() or whole.shape[axis] == 1:
            continue
        queries = axis == axes.index("t")
        longest = int((columns.lengths if queries else columns.key_lengths).max())
        places = columns.index if queries else columns.kept(value.shape[axis])
        size = whole.shape[axis]
        if (size < longest if columns.growing else size != longest) or whole.shape[0] not in (1, len(places)):
            raise unfit(given, value, address, what, longest)
        if queries and (chosen & (places >= size)).any():
            raise BadInput(
                f"{address}: the {what} given has {size} positions, and the tokens generated after them are asked for "
                f"too; give positions=slice(0, {size}), or a {what} without an axis of positions."
            )
        rows = torch.arange(len(places), device=value.device)[:, None] % whole.shape[0]
        whole = whole.movedim(axis, 1)[rows, places.to(value.device).clamp(0, size - 1)].movedim(1, axis)
    if whole.dim() != value.dim() or any(n not in (1, m) for n, m in zip(whole.shape, value.shape, strict=True)):
        raise unfit(given, value, address, what, longest)
    return whole.expand_as(value)


def unfit(given: Tensor, value: Tensor, address: str, what: str, longest: int) -> BadInput:
    """The error for a tensor that does not broadcast over a site."""
    return BadInput(
        f"{address} is {tuple(value.shape)} here; the {what} given is {tuple(given.shape)}, which does not broadcast "
        f"over it (its last axes have to fit, and an axis of positions counts the {longest} tokens of the longest "
        "prompt)."
    )
