"""Training batches of a model's activations: held in memory where they fit, else from a shuffled stream of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..models.marks import config_mark, weights_mark
from ..tracing.addresses import resolve
from .rows import Rows, joined, recut, taken
from .shards import StoredActivations
from .shuffle import Shuffled
from .stream import NO_TOKENS, ActivationStream, dtype_of, name_of

if TYPE_CHECKING:
    from ..models import Model
    from .text import Text

GIB = 2**30
SAMPLE = 16_384  # rows that are looked at before training, where they come as a stream


def source_of(
    model: Model, sites: str | Sequence[str], text: Text | ActivationStream | StoredActivations, **reading: Any
) -> ActivationStream | StoredActivations:
    """Where the rows of some sites come from: what was given, if it has them; or a stream of a text.

    Args:
        model: The model.
        sites: Addresses, as for `capture`.
        text: A text, as for `ActivationStream`; a stream; or a store.
        **reading: Arguments of `ActivationStream`, for a text; those that are None are left to it.

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: For a stream or store of another model or without these sites, or arguments that it settles itself.
    """
    given = {name: value for name, value in reading.items() if value is not None}
    if not isinstance(text, (ActivationStream, StoredActivations)):
        return ActivationStream(model, sites, text, **given)
    what = "the store" if isinstance(text, StoredActivations) else "the stream"
    given.pop("progress", None)
    if given:
        raise BadInput(f"{', '.join(given)}: {what} that was given has its own; leave it out here, or give a text.")
    if isinstance(text, StoredActivations):
        check_model(text, model)
        return text.of(resolve(model, sites))
    if text.model is not model:
        raise BadInput(f"The stream is of another model than the {name_of(model)} given here; give its own.")
    return text.of(sites)


def check_model(stored: StoredActivations, model: Model) -> None:
    """Refuse a store of another model: of another configuration, or of other weights of the same type."""
    record = stored.record
    now = {"config": config_mark(model), "weights": weights_mark(model), "model_dtype": dtype_of(model)}
    same_type = record["model_dtype"] == now["model_dtype"] and record["weights"] and now["weights"]
    if record["config"] != now["config"] or (same_type and record["weights"] != now["weights"]):
        raise BadInput(
            f"{stored.folder} is of {record['model']}, with a configuration or weights that this {name_of(model)} does "
            "not have; give the model that it was stored from."
        )


class RowBatches:
    """Batches of rows in random order, from any step on, without end: what training takes.

    Activations that fit into `memory_gib` are computed (or read) once, held, and shuffled anew for each pass. More than
    that goes through a pool of this size (`Shuffled`), and the model runs (or the store is read) again in each pass.
    Either way a pass has every row once, the order depends on the seed alone, and a batch may reach into the next pass.

    Args:
        source: Where rows come from.
        batch_size: Rows of a batch.
        seed: Of the order.
        memory_gib: GiB of activations that may be held.

    Attributes:
        held: All rows, if they fit.
        n_rows: Rows of a pass; None where that is not known before the end of one.
        widths: Address -> numbers in a row.
        shapes: Address -> shape of what the site holds for one token.
        fingerprint: Of the rows: what a run that is resumed compares.

    Raises:
        BadInput: For sizes out of range, or a text without tokens.
    """

    def __init__(
        self,
        source: ActivationStream | StoredActivations,
        *,
        batch_size: int = 1024,
        seed: int = 0,
        memory_gib: float = 2.0,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.shapes = source.shapes()
        self.widths = source.widths()
        limit = int(memory_gib * GIB / source.row_bytes())
        if batch_size < 1 or limit < 2 * batch_size:
            raise BadInput(
                f"batch_size={batch_size}, memory_gib={memory_gib}; a batch has at least 1 row, and two of them (rows "
                f"of {source.row_bytes()} bytes) have to fit into the memory."
            )
        self.buffer = limit
        self.n_rows, first = beginning(source, limit, self.seed_of(0))
        self.held: Rows | None = None
        self._begun: Iterator[Rows] | None = None
        if self.n_rows is not None and self.n_rows <= limit:
            self.held = collected(first, self.n_rows)
        if self.held is None:
            # The first pass is begun here, for `sample`, and goes on in `from_step`: the text may be an iterator.
            drawn, looked_at = iter(self.shuffled(first, 0)), []
            while sum(rows.n for rows in looked_at) < SAMPLE and (rows := next(drawn, None)) is not None:
                looked_at.append(rows)
            self._sample = joined(looked_at)
            self._begun = chain(looked_at, drawn)
        self.fingerprint = ", ".join(f"{name} {tuple(x.shape)} {crc(x):08x}" for name, x in self.sample().items())

    def sample(self) -> Rows:
        """Rows from which means and variances are taken: all that are held, or the first of the shuffled stream."""
        return self._sample if self.held is None else self.held

    def from_step(self, step: int) -> Iterator[Rows]:
        """The batches of training steps `step`, `step + 1`, …; rows before them that are not held are read again."""
        skip = step * self.batch_size
        number = 0
        if self.n_rows is not None:
            number, skip = divmod(skip, self.n_rows)
        return recut(self.rows_from(number, skip), self.batch_size)

    def __iter__(self) -> Iterator[Rows]:
        return self.from_step(0)

    def rows_from(self, number: int, skip: int) -> Iterator[Rows]:
        """Pass `number` without its first rows, and all later passes."""
        while True:
            for rows in self.one_pass(number):
                skipped = min(skip, rows.n)
                skip -= skipped
                if skipped < rows.n:
                    yield taken(rows, slice(skipped, None)) if skipped else rows
            number += 1

    def one_pass(self, number: int) -> Iterator[Rows]:
        """All rows once, in random order."""
        if self.held is not None:
            order = torch.randperm(self.held.n, generator=torch.Generator().manual_seed(self.seed_of(number)))
            return (taken(self.held, which) for which in order.split(self.batch_size))
        if number == 0 and self._begun is not None:
            begun, self._begun = self._begun, None
            return begun
        return iter(self.shuffled(in_some_order(self.source, self.seed_of(number)), number))

    def shuffled(self, rows: Iterable[Rows], number: int) -> Shuffled:
        """A pass through the pool."""
        return Shuffled(rows, batch_size=self.batch_size, buffer=self.buffer, seed=self.seed_of(number))

    def seed_of(self, number: int) -> int:
        """The seed of one pass."""
        return self.seed * 1_000_003 + number


def beginning(source: ActivationStream | StoredActivations, limit: int, seed: int) -> tuple[int | None, Iterable[Rows]]:
    """How many rows there are, where that is known or not above the limit; and all of them.

    A text is tokenised up to the limit, and the model then runs on what has been read: an iterator is read once.
    """
    if isinstance(source, StoredActivations):
        n_rows = source.n_rows
        return n_rows, source if n_rows <= limit else source.in_random_order(seed)
    read: list[tuple[int, list[int]]] = []
    n_rows = 0
    sequences = source.sequences()
    for number, ids in sequences:
        read.append((number, ids))
        n_rows += int(source.kept(torch.tensor(ids)).sum())
        if n_rows > limit:
            return None, source.rows_of(chain(read, sequences))
    return n_rows, source.rows_of(read)


def in_some_order(source: ActivationStream | StoredActivations, seed: int) -> Iterable[Rows]:
    """Another pass: a store's shards come in random order, a text in its own."""
    return source.in_random_order(seed) if isinstance(source, StoredActivations) else source


def collected(parts: Iterable[Rows], n_rows: int) -> Rows:
    """All rows in tensors of their own."""
    out: Rows | None = None
    filled = 0
    for rows in parts:
        out = rows.empty(n_rows) if out is None else out
        out.put(slice(filled, filled + rows.n), rows, slice(None))
        filled += rows.n
    if out is None or not filled:
        raise BadInput(NO_TOKENS)
    return out


def crc(x: Tensor) -> int:
    """A checksum of some of the rows."""
    return zlib.crc32(x[:: max(1, len(x) // 64)].float().cpu().contiguous().numpy().tobytes())
