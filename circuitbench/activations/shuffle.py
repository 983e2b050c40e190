"""Rows of a stream in random order, from a buffer; and how well they are mixed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import BadInput
from .stream import Rows

if TYPE_CHECKING:
    from jaxtyping import Int


class Shuffled:
    """Batches of a stream's rows in random order.

    A buffer is filled, shuffled, and emptied by half before it is filled again, so that a batch mixes many sequences.
    All sites of a row stay together. Every row is handed out exactly once; the last batch may be smaller. The same seed
    gives the same batches.

    Args:
        stream: What is shuffled: an `ActivationStream`, a store, or any iterable of `Rows`.
        batch_size: Rows of a batch.
        buffer: Rows that are held at once; memory is `buffer` × (numbers of all sites' rows).
        seed: Of the order.
    """

    def __init__(self, stream: Iterable[Rows], *, batch_size: int = 2048, buffer: int = 65_536, seed: int = 0) -> None:
        if batch_size < 1 or buffer < 2 * batch_size:
            raise BadInput(
                f"batch_size={batch_size}, buffer={buffer}; a batch has at least 1 row and the buffer at least two "
                "batches."
            )
        self.stream = stream
        self.batch_size = batch_size
        self.buffer = buffer
        self.seed = seed

    def __iter__(self) -> Iterator[Rows]:
        generator = torch.Generator().manual_seed(self.seed)
        held: list[Rows] = []
        for rows in self.stream:
            held.append(rows)
            if sum(len(one.token_ids) for one in held) >= self.buffer:
                mixed = permuted(joined(held), generator)
                # Half of what is there, in whole batches: the other half is mixed with what comes next.
                n = max(1, self.buffer // 2 // self.batch_size) * self.batch_size
                while len(mixed.token_ids) - n >= self.buffer:  # one forward may bring more than the buffer holds
                    n += self.batch_size
                yield from cut(taken(mixed, slice(0, n)), self.batch_size)
                held = [taken(mixed, slice(n, None))]
        if held and len(joined(held).token_ids):
            yield from cut(permuted(joined(held), generator), self.batch_size)


def joined(parts: list[Rows]) -> Rows:
    """Rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        {address: torch.cat([part[address] for part in parts]) for address in parts[0]},
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.sequence for part in parts]),
        torch.cat([part.position for part in parts]),
    )


def taken(rows: Rows, which: slice | Tensor) -> Rows:
    """Some of the rows."""
    return Rows(
        {address: value[which] for address, value in rows.items()},
        rows.token_ids[which],
        rows.sequence[which],
        rows.position[which],
    )


def permuted(rows: Rows, generator: torch.Generator) -> Rows:
    """The rows in random order."""
    return taken(rows, torch.randperm(len(rows.token_ids), generator=generator))


def cut(rows: Rows, batch_size: int) -> Iterator[Rows]:
    """Batches of the rows; the last one may be smaller."""
    for start in range(0, len(rows.token_ids), batch_size):
        yield taken(rows, slice(start, start + batch_size))


def mixing(batches: Iterable[Int[Tensor, " n"]]) -> float:
    """How well batches are mixed: 1 if two rows of a batch share a sequence as rarely as in a full shuffle.

    Args:
        batches: The sequence of every row, batch by batch (`Rows.sequence`).

    Returns:
        (pairs that share a sequence in a full shuffle) / (pairs that do so here), both as shares of all pairs in
        batches; 1 is perfect, and unshuffled text is near the number of batches that a sequence reaches over the
        number of batches.
    """
    batches = list(batches)
    everything = torch.cat(batches)
    n = len(everything)
    counts = everything.unique(return_counts=True)[1].double()
    expected = float((counts * (counts - 1)).sum() / (n * (n - 1)))
    same, pairs = 0.0, 0.0
    for batch in batches:
        inside = batch.unique(return_counts=True)[1].double()
        same += float((inside * (inside - 1)).sum())
        pairs += len(batch) * (len(batch) - 1)
    return expected / (same / pairs) if same else 1.0
