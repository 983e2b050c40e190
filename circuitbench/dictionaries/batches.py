"""Training batches of one size, in an order that depends on nothing but the seed, from any step on."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_SAMPLE = 16_384  # rows from which the mean and variance of the activations are estimated, where they come as a stream


def batches_of(activations: Tensor | Iterable[Tensor], batch_size: int, seed: int) -> ShuffledRows | Stream:
    """Batches of a tensor `(n, d_in)`, shuffled anew for every pass, or of an iterable of such, in its order."""
    if batch_size < 1:
        raise BadInput(f"batch_size={batch_size} was given; it must be at least 1.")
    if isinstance(activations, Tensor):
        return ShuffledRows(activations, batch_size, seed)
    if not isinstance(activations, Iterable):
        raise BadInput(
            f"activations are a {type(activations).__name__}; give a tensor (n, d_in) or an iterable of them."
        )
    return Stream(activations, batch_size)


def _check(rows: Tensor) -> Tensor:
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
        got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise BadInput(
            "activations must be floating-point tensors (n, d_in), one row a token "
            f"(`.flatten(0, -2)` makes them so); given: {got}."
        )
    return rows


class ShuffledRows:
    """One tensor: a random permutation of its rows, then another, … without a break at the end of a pass."""

    def __init__(self, activations: Tensor, batch_size: int, seed: int):
        self.rows = _check(activations)
        if len(activations) == 0:
            raise BadInput("activations have no rows; a dictionary needs at least one.")
        self.batch_size = batch_size
        self.seed = seed
        self.d_in = activations.shape[1]
        probe = activations[:: max(1, len(activations) // 64)].float().cpu().contiguous()
        self.fingerprint = f"{tuple(activations.shape)} {zlib.crc32(probe.numpy().tobytes()):08x}"

    def sample(self) -> Float[Tensor, "n d_in"]:
        """Rows from which the mean and the variance are taken."""
        return self.rows

    def _permutation(self, epoch: int) -> Int[Tensor, " n"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator)

    def from_step(self, step: int) -> Iterator[Float[Tensor, "batch_size d_in"]]:
        """The batches of training steps `step`, `step + 1`, …, without end."""
        epoch, start = divmod(step * self.batch_size, len(self.rows))
        order = self._permutation(epoch)[start:]
        while True:
            while len(order) < self.batch_size:
                epoch += 1
                order = torch.cat([order, self._permutation(epoch)])
            chosen, order = order[: self.batch_size], order[self.batch_size :]
            yield self.rows[chosen.to(self.rows.device)]


class Stream:
    """An iterable of `(n_i, d_in)`, cut into batches of one size, no row lost or doubled; begun anew when it ends."""

    def __init__(self, activations: Iterable[Tensor], batch_size: int):
        self.activations = activations
        self.batch_size = batch_size
        # An iterator can be read once: what is read here to see its beginning is put back before the rest.
        self.once = iter(activations) is activations
        first: list[Tensor] = []
        source = iter(activations)
        for rows in source:
            first.append(self._same_size(rows, first))
            if sum(map(len, first)) >= _SAMPLE:
                break
        if sum(map(len, first)) == 0:
            raise BadInput(
                "the iterable of activations has no rows; if it is an iterator, it may have been read before."
            )
        self._first = first
        self._rest = source
        self.d_in = first[0].shape[1]
        self.fingerprint = f"stream of {self.d_in}"

    @staticmethod
    def _same_size(rows: Tensor, first: list[Tensor]) -> Tensor:
        _check(rows)
        if first and rows.shape[1] != first[0].shape[1]:
            raise BadInput(f"a batch of activations has d_in = {rows.shape[1]}, the first one had {first[0].shape[1]}.")
        return rows

    def sample(self) -> Float[Tensor, "n d_in"]:
        """Rows from which the mean and the variance are taken."""
        return torch.cat(self._first)[:_SAMPLE]

    def _passes(self) -> Iterator[Tensor]:
        yield from self._first
        yield from self._rest
        if self.once:
            raise BadInput(
                "the iterator of activations ended before training did; "
                "give fewer steps, or an iterable that can be read again."
            )
        while True:
            n_rows = 0
            for rows in self.activations:
                n_rows += len(rows)
                yield rows
            if n_rows == 0:
                raise BadInput("the iterable of activations had rows in its first pass and none in its second.")

    def from_step(self, step: int) -> Iterator[Float[Tensor, "batch_size d_in"]]:
        """The batches of training steps `step`, `step + 1`, …; the rows before them are read and left out."""
        skip = step * self.batch_size
        held = self._first[0][:0]
        for rows in self._passes():
            self._same_size(rows, self._first)
            skipped = min(skip, len(rows))
            skip -= skipped
            held = torch.cat([held, rows[skipped:]])
            while len(held) >= self.batch_size:
                yield held[: self.batch_size]
                held = held[self.batch_size :]
