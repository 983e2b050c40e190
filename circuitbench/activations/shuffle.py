"""Rows of a stream in random order, from a pool; and how well they are mixed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import BadInput
from .rows import Rows, taken

if TYPE_CHECKING:
    from jaxtyping import Int


class Shuffled:
    """Batches of a stream's rows in random order.

    A pool of `buffer` rows is filled; a batch is drawn from it, and what comes next takes its place. So a batch mixes
    the rows of many sequences: see `mixing`. All sites of a row stay together. Every row is handed out exactly once;
    the last batch may be smaller. The same seed gives the same batches.

    Args:
        stream: What is shuffled: an `ActivationStream`, a store, or any iterable of `Rows`.
        batch_size: Rows of a batch.
        buffer: Rows that are held at once; memory is `buffer` × (numbers of all sites' rows).
        seed: Of the order.

    Raises:
        BadInput: For a buffer that holds less than two batches.
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
        pool: Rows | None = None
        filled = 0
        for rows in self.stream:
            if pool is None:
                pool = rows.empty(self.buffer)
            start = 0
            while start < rows.n:
                stop = min(rows.n, start + self.buffer - filled)
                pool.put(slice(filled, filled + stop - start), rows, slice(start, stop))
                filled += stop - start
                start = stop
                if filled == self.buffer:
                    chosen = torch.randperm(self.buffer, generator=generator)[: self.batch_size]
                    yield taken(pool, chosen)
                    filled -= self.batch_size
                    self.close_gaps(pool, chosen, filled)
        if pool is not None and filled:
            order = torch.randperm(filled, generator=generator)
            yield from (taken(pool, which) for which in order.split(self.batch_size))

    @staticmethod
    def close_gaps(pool: Rows, drawn: Int[Tensor, " b"], left: int) -> None:
        """Move the rows beyond the first `left` places into the places that were drawn."""
        beyond = torch.ones(len(pool.token_ids) - left, dtype=torch.bool)
        beyond[drawn[drawn >= left] - left] = False
        pool.put(drawn[drawn < left], pool, left + beyond.nonzero().flatten())


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
