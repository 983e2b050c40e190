"""Rows: activations of several sites at the same tokens; and how rows are joined, chosen and cut into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int


class Rows(dict):
    """Address -> activations `(n, d)`, one row a token, the same tokens at every address.

    Attributes:
        token_ids: `(n,)`.
        sequence: Number of the sequence that each row comes from, `(n,)`.
        position: Of each row in its sequence, `(n,)`.
    """

    def __init__(self, values: dict[str, Tensor], token_ids: Tensor, sequence: Tensor, position: Tensor) -> None:
        super().__init__(values)
        self.token_ids: Int[Tensor, " n"] = token_ids
        self.sequence: Int[Tensor, " n"] = sequence
        self.position: Int[Tensor, " n"] = position

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.token_ids)

    def columns(self) -> list[Tensor]:
        """Everything that has a line for each row."""
        return [*self.values(), self.token_ids, self.sequence, self.position]

    def empty(self, n: int) -> Rows:
        """Room for `n` rows like these."""
        *values, ids, sequence, position = (column.new_empty(n, *column.shape[1:]) for column in self.columns())
        return Rows(dict(zip(self, values, strict=True)), ids, sequence, position)

    def put(self, where: slice | Tensor, rows: Rows, which: slice | Tensor) -> None:
        """Copy some of other rows into places of these."""
        for mine, theirs in zip(self.columns(), rows.columns(), strict=True):
            mine[where] = theirs[which]


def taken(rows: Rows, which: slice | Tensor) -> Rows:
    """Some of the rows."""
    values = {address: value[which] for address, value in rows.items()}
    return Rows(values, rows.token_ids[which], rows.sequence[which], rows.position[which])


def joined(parts: list[Rows]) -> Rows:
    """Rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    values = {address: torch.cat([part[address] for part in parts]) for address in parts[0]}
    columns = zip(*((part.token_ids, part.sequence, part.position) for part in parts), strict=True)
    return Rows(values, *(torch.cat(column) for column in columns))


def cut(rows: Rows, batch_size: int) -> Iterator[Rows]:
    """Batches of the rows; the last one may be smaller."""
    for start in range(0, rows.n, batch_size):
        yield taken(rows, slice(start, start + batch_size))


def recut(parts: Iterable[Rows], batch_size: int) -> Iterator[Rows]:
    """The same rows in batches of one size; the last one may be smaller."""
    held: list[Rows] = []
    n = 0
    for rows in parts:
        held.append(rows)
        n += rows.n
        if n >= batch_size:
            *whole, rest = cut(joined(held), batch_size)
            yield from whole
            held, n = [rest], rest.n
            if n == batch_size:
                yield rest
                held, n = [], 0
    if n:
        yield joined(held)
