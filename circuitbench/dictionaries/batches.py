"""Training batches of one size, in an order that depends on nothing but the seed, from any step on.

A batch is a mapping from names to tensors `(batch_size, d)` with the same rows: addresses of sites, where activations
of a model come in, or `x` and, for transcoders, `target`, where plain tensors do.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Int

Batch = Mapping[str, Tensor]

X, TARGET = "x", "target"
_SAMPLE = 16_384  # rows from which the mean and variance of the activations are estimated, where they come as a stream


@runtime_checkable
class Batches(Protocol):
    """Where batches come from.

    Attributes:
        fingerprint: of the data: a run that is resumed must find the same.
    """

    fingerprint: str

    def sample(self) -> Batch:
        """Rows from which means and variances are taken."""
        ...

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches of training steps `step`, `step + 1`, …, without end."""
        ...


def batches_of(activations: Any, targets: Any, batch_size: int, seed: int) -> Batches:
    """Batches of tensors, shuffled anew for every pass, or of an iterable of such, in its order.

    Args:
        activations: `(n, d_in)`; a mapping from names to such; an iterable of either; or `Batches`, as they are.
        targets: of a transcoder: `(n, d_out)`, the same rows. Only beside a tensor.
        batch_size: rows.
        seed: of the order.

    Raises:
        BadInput: for anything else.
    """
    if batch_size < 1:
        raise BadInput(f"batch_size={batch_size} was given; it must be at least 1.")
    if targets is not None and not isinstance(activations, Tensor):
        raise BadInput("targets= goes beside one tensor of activations; give a mapping of names to tensors instead.")
    if isinstance(activations, (Tensor, Mapping)):
        return ShuffledRows(named(activations, targets), batch_size, seed)
    if isinstance(activations, Batches):
        return activations
    if not isinstance(activations, Iterable):
        raise BadInput(
            f"activations are a {type(activations).__name__}; give a tensor (n, d_in) or an iterable of them."
        )
    return Stream(activations, batch_size)


def named(rows: Any, targets: Any = None) -> Batch:
    """Rows as a mapping from names to tensors, checked."""
    if not isinstance(rows, Mapping):
        rows = {X: rows} if targets is None else {X: rows, TARGET: targets}
    for tensor in rows.values():
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or not tensor.is_floating_point():
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise BadInput(
                "activations must be floating-point tensors (n, d_in), one row a token "
                f"(`.flatten(0, -2)` makes them so); given: {got}."
            )
    if len({len(tensor) for tensor in rows.values()}) != 1:
        sizes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in rows.items())
        raise BadInput(f"activations of several names must have the same rows; given: {sizes or 'none'}.")
    return rows


def rows_of(batch: Batch) -> int:
    """Rows of a batch."""
    return len(next(iter(batch.values())))


def taken(batch: Batch, which: Any) -> dict[str, Tensor]:
    """Some of the rows."""
    return {name: tensor[which] for name, tensor in batch.items()}


class ShuffledRows:
    """Tensors in memory: a random permutation of their rows, then another, … without a break at the end of a pass."""

    def __init__(self, activations: Batch, batch_size: int, seed: int):
        self.activations = activations
        self.n = rows_of(activations)
        if self.n == 0:
            raise BadInput("activations have no rows; a dictionary needs at least one.")
        self.batch_size = batch_size
        self.seed = seed
        self.fingerprint = ", ".join(
            f"{name} {tuple(rows.shape)} {_crc(rows):08x}" for name, rows in activations.items()
        )

    def sample(self) -> Batch:
        """Rows from which means and variances are taken: all."""
        return self.activations

    def _permutation(self, epoch: int) -> Int[Tensor, " n"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.n, generator=generator)

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches of training steps `step`, `step + 1`, …, without end."""
        epoch, start = divmod(step * self.batch_size, self.n)
        order = self._permutation(epoch)[start:]
        while True:
            while len(order) < self.batch_size:
                epoch += 1
                order = torch.cat([order, self._permutation(epoch)])
            chosen, order = order[: self.batch_size], order[self.batch_size :]
            yield {name: rows[chosen.to(rows.device)] for name, rows in self.activations.items()}


def _crc(rows: Tensor) -> int:
    probe = rows[:: max(1, len(rows) // 64)].float().cpu().contiguous()
    return zlib.crc32(probe.numpy().tobytes())


class Stream:
    """An iterable of rows, cut into batches of one size, no row lost or doubled; begun anew when it ends."""

    def __init__(self, activations: Iterable[Any], batch_size: int):
        self.activations = activations
        self.batch_size = batch_size
        # An iterator can be read once: what is read here to see its beginning is put back before the rest.
        self.once = iter(activations) is activations
        first: list[Batch] = []
        source = iter(activations)
        for rows in source:
            first.append(self._same_size(rows, first))
            if sum(map(rows_of, first)) >= _SAMPLE:
                break
        if sum(map(rows_of, first)) == 0:
            raise BadInput(
                "the iterable of activations has no rows; if it is an iterator, it may have been read before."
            )
        self._first = first
        self._rest = source
        self.fingerprint = "stream of " + ", ".join(f"{name} {rows.shape[1]}" for name, rows in first[0].items())

    @staticmethod
    def _same_size(rows: Any, first: list[Batch]) -> Batch:
        rows = named(rows)
        if first:
            widths, expected = ({name: x.shape[1] for name, x in batch.items()} for batch in (rows, first[0]))
            if widths != expected:
                raise BadInput(
                    f"a batch of activations has d_in = {_said(widths)}, the first one had {_said(expected)}."
                )
        return rows

    def sample(self) -> Batch:
        """Rows from which means and variances are taken: the first ones."""
        return taken(_joined(self._first), slice(_SAMPLE))

    def _passes(self) -> Iterator[Any]:
        yield from self._first
        yield from self._rest
        if self.once:
            raise BadInput(
                "the iterator of activations ended before training did; "
                "give fewer steps, or an iterable that can be read again."
            )
        while True:
            n_rows = 0
            for given in self.activations:
                n_rows += rows_of(named(given))
                yield given
            if n_rows == 0:
                raise BadInput("the iterable of activations had rows in its first pass and none in its second.")

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches of training steps `step`, `step + 1`, …; the rows before them are read and left out."""
        skip = step * self.batch_size
        held: Batch = taken(self._first[0], slice(0))
        for given in self._passes():
            rows = self._same_size(given, self._first)
            skipped = min(skip, rows_of(rows))
            skip -= skipped
            held = _joined([held, taken(rows, slice(skipped, None))])
            while rows_of(held) >= self.batch_size:
                yield taken(held, slice(self.batch_size))
                held = taken(held, slice(self.batch_size, None))


def _joined(parts: list[Batch]) -> Batch:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _said(widths: Mapping[str, int]) -> str:
    return ", ".join(str(width) if name == X else f"{name} {width}" for name, width in widths.items())
