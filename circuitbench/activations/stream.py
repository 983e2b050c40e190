"""What sites hold while the model reads a text, forward by forward: many sites in one pass, one row a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import BadInput
from ..models.id_tokenizer import NAME as IDS_ONLY
from ..tracing.addresses import axes_by_address, resolve
from ..tracing.run import capture
from .rows import Rows
from .text import Documents, packed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from ..models import Model
    from .text import Text


NO_TOKENS = "The text has no tokens (special ones do not count, unless keep_special=True); give some text."


class ActivationStream:
    """The activations of a text, as an iterable of `Rows`, one for each forward of the model.

    Every token of the text is read once and in order. The model stops after the last of the sites. Special tokens are
    read by the model but have no row, unless they are asked for. A site with several axes (heads, a state: h_t as a
    vector) gives its numbers as one row, in the order of `flatten`; `shapes` says what they were.

    Args:
        model: The model.
        sites: Addresses, as for `capture`.
        text: A string, the path of a text file, token ids, or an iterable of such, or of a data set's rows.
        context: Tokens of a sequence, which the model reads from its beginning.
        sequences_per_forward: Sequences that are run together.
        keep_special: Whether special tokens have rows, too.
        column: The data set's column with the text.
        max_sequences: Stop after so many.
        device: Where the rows go.
        remote: As for `capture`.
        progress: Show a bar.

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: For a site without positions, or sizes out of range; when it is read: for a text without tokens.
    """

    def __init__(
        self,
        model: Model,
        sites: str | Sequence[str],
        text: Text,
        *,
        context: int = 256,
        sequences_per_forward: int = 16,
        keep_special: bool = False,
        column: str = "text",
        max_sequences: int | None = None,
        device: str | torch.device = "cpu",
        remote: bool | str = False,
        progress: bool = False,
    ) -> None:
        if context < 2 or sequences_per_forward < 1 or (max_sequences is not None and max_sequences < 1):
            raise BadInput(
                f"context={context}, sequences_per_forward={sequences_per_forward}, max_sequences={max_sequences}; "
                "give at least 2 tokens and 1 sequence."
            )
        self.model = model
        self.sites = resolve(model, sites)
        for address in self.sites:
            if axes_by_address(model, address)[:2] != ["b", "t"]:
                axes = ", ".join(axes_by_address(model, address))
                raise BadInput(f"{address} is ({axes}): it has no row for each token. Give another site.")
        self.documents = Documents(model, text, column)
        self.context = context
        self.sequences_per_forward = sequences_per_forward
        self.keep_special = keep_special
        self.max_sequences = max_sequences
        self.device = device
        self.remote = remote
        self.progress = progress
        tokenizer = model.tokenizer
        assert tokenizer is not None  # `load_model` gives every model one
        only_ids = tokenizer.name_or_path == IDS_ONLY  # there, ids are marked special for padding alone
        self.special = torch.tensor([] if only_ids else tokenizer.all_special_ids, dtype=torch.long)
        self.separator: Any = tokenizer.eos_token_id
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._itemsizes: dict[str, int] = {}

    def sequences(self, every: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, list[int]]]:
        """(number, token ids) of the text's sequences, without running the model.

        Args:
            every: (which, of how many): only the numbers that leave this rest.
        """
        found = enumerate(packed(self.documents, self.context, self.separator))
        return islice(islice(found, self.max_sequences), every[0], None, every[1])

    def __iter__(self) -> Iterator[Rows]:
        return self.rows_of(self.sequences())

    def rows_of(self, sequences: Iterable[tuple[int, list[int]]]) -> Iterator[Rows]:
        """The rows of some sequences, of which there has to be one at least; with the bar."""
        n = 0
        with tqdm(disable=not self.progress, desc="activations", unit="row", unit_scale=True) as bar:
            for rows in self.run(sequences):
                n += rows.n
                bar.update(rows.n)
                yield rows
        if not n:
            raise BadInput(NO_TOKENS)

    def run(self, sequences: Iterable[tuple[int, list[int]]]) -> Iterator[Rows]:
        """The rows of some sequences, in order, one `Rows` a forward."""
        for ids, numbers in self.forwards(sequences):
            keep = self.kept(ids)
            # Chosen rows are copies: a site may be a part of a larger tensor, which would stay in memory with it.
            values = {address: value[keep] for address, value in self.read(ids).items()}
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            yield Rows(values, ids[keep], numbers[:, None].expand_as(ids)[keep], positions[keep])

    def read(self, ids: Int[Tensor, "b t"]) -> dict[str, Float[Tensor, "b t _"]]:
        """What the sites hold for some sequences, one row a token."""
        found = capture(self.model, ids, self.sites, batch_size=len(ids), device=self.device, remote=self.remote)
        return {address: found[address].reshape(*ids.shape, -1) for address in self.sites}

    def forwards(
        self, sequences: Iterable[tuple[int, list[int]]] | None = None
    ) -> Iterator[tuple[Int[Tensor, "b t"], Int[Tensor, " b"]]]:
        """(token ids, numbers of the sequences) of each forward, without running the model.

        Args:
            sequences: Of these; default: of the whole text.
        """
        for group in self.grouped(self.sequences() if sequences is None else sequences):
            yield torch.tensor([ids for _, ids in group]), torch.tensor([number for number, _ in group])

    def counts(self) -> Counts:
        """How much text there is, without running the model. The text is read to its end."""
        n_sequences = n_tokens = n_rows = 0
        for ids, _ in self.forwards():
            n_sequences += len(ids)
            n_tokens += ids.numel()
            n_rows += int(self.kept(ids).sum())
        return Counts(n_sequences, n_tokens, n_rows)

    def grouped(self, sequences: Iterable[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
        """Sequences of one length, as many as run together."""
        group: list[tuple[int, list[int]]] = []
        for number, ids in sequences:
            if group and (len(group) == self.sequences_per_forward or len(ids) != len(group[0][1])):
                yield group
                group = []
            group.append((number, ids))
        if group:
            yield group

    def kept(self, ids: Int[Tensor, "*b t"]) -> Bool[Tensor, "*b t"]:
        """Tokens that have a row."""
        return torch.ones_like(ids, dtype=torch.bool) if self.keep_special else ~torch.isin(ids, self.special)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Address -> shape of what the site holds for one token; its product is the width of a row."""
        if self._shapes is None:
            probe = capture(self.model, torch.zeros(1, 2, dtype=torch.long), self.sites, remote=self.remote)
            self._shapes = {address: tuple(value.shape[2:]) for address, value in probe.items()}
            self._itemsizes = {address: value.element_size() for address, value in probe.items()}
        return self._shapes

    def widths(self) -> dict[str, int]:
        """Address -> numbers in a row."""
        return {address: prod(shape) for address, shape in self.shapes().items()}

    def row_bytes(self) -> int:
        """Memory of one row of all sites."""
        widths = self.widths()
        return sum(widths[address] * size for address, size in self._itemsizes.items())

    def of(self, sites: str | Sequence[str]) -> ActivationStream:
        """The same stream, of these sites alone.

        Raises:
            BadInput: For sites that it does not read.
        """
        wanted = resolve(self.model, sites)
        if wanted == self.sites:
            return self
        check_among(wanted, self.sites)
        other = copy(self)
        other.sites, other._shapes = wanted, None
        return other

    def site(self, address: str | None = None) -> SiteRows:
        """One site's activations as plain tensors, as `dictionaries.train` takes them."""
        return SiteRows(self, only(self.sites, address))


class Counts(NamedTuple):
    """How much text there is: sequences, tokens that the model reads, tokens that have a row."""

    sequences: int
    tokens: int
    rows: int


class SiteRows:
    """One site of a stream or of a store: an iterable of `(n, d)`."""

    def __init__(self, source: Iterable[Rows], address: str) -> None:
        self.source = source
        self.address = address

    def __iter__(self) -> Iterator[Float[Tensor, "n d"]]:
        for rows in self.source:
            yield rows[self.address]


def only(sites: Sequence[str], address: str | None) -> str:
    """The site that was asked for, or the only one there is."""
    if address is None and len(sites) != 1:
        raise BadInput(f"There are {len(sites)} sites; name one of {', '.join(sites)}.")
    wanted = sites[0] if address is None else address
    check_among([wanted], sites)
    return wanted


def check_among(wanted: Sequence[str], sites: Sequence[str]) -> None:
    """Refuse sites that are not here."""
    missing = [address for address in wanted if address not in sites]
    if missing:
        raise BadInput(f"{', '.join(missing)}: not one of the sites here; there are: {', '.join(sites)}.")


def name_of(model: Model) -> str:
    """The model's name: its Hub id, or the last part of the folder it came from."""
    name = model.hf.name_or_path or model.hf.config.model_type
    return Path(name).name if Path(name).is_dir() else name


def dtype_of(model: Model) -> str:
    """The floating-point type of the model's weights."""
    return str(next(model.hf.parameters()).dtype).removeprefix("torch.")
