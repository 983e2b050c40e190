"""What sites hold while the model reads a text, forward by forward: many sites in one pass, one row a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import BadInput
from ..models.id_tokenizer import NAME as IDS_ONLY
from ..tracing.addresses import axes_by_address, resolve
from ..tracing.run import capture
from .text import Documents, packed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from ..models import Model
    from .text import Text


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


class ActivationStream:
    """The activations of a text, as an iterable of `Rows`, one for each forward of the model.

    Every token of the text is read once and in order. The model stops after the last of the sites. Special tokens are
    read by the model but have no row, unless they are asked for; a site with several axes (heads, a state) gives its
    numbers as one row.

    Args:
        model: The model.
        sites: Addresses, as for `capture`.
        text: A string, the path of a text file, token ids, or an iterable of such, or of a data set's rows.
        context: Tokens of a sequence, which the model reads from its beginning.
        sequences_per_forward: Sequences that are run together.
        keep_special: Whether special tokens have rows, too.
        column: The data set's column with the text.
        max_sequences: Stop after so many.
        remote: As for `capture`.
        progress: Show a bar.

    Raises:
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
        remote: bool | str = False,
        progress: bool = False,
    ) -> None:
        if context < 2 or sequences_per_forward < 1:
            raise BadInput(
                f"context={context}, sequences_per_forward={sequences_per_forward}; give at least 2 tokens and 1 "
                "sequence."
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
        self.remote = remote
        self.progress = progress
        tokenizer = model.tokenizer
        assert tokenizer is not None  # `load_model` gives every model one
        only_ids = tokenizer.name_or_path == IDS_ONLY  # there, ids are marked special for padding alone
        self.special = torch.tensor([] if only_ids else tokenizer.all_special_ids, dtype=torch.long)
        self.separator: Any = tokenizer.eos_token_id

    def sequences(self, start: int = 0, every: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, list[int]]]:
        """(number, token ids) of the text's sequences, without running the model.

        Args:
            start: The first number.
            every: (which, of how many): only the numbers that leave this rest.
        """
        found = enumerate(packed(self.documents, self.context, self.separator))
        for number, ids in islice(found, self.max_sequences):
            if number >= start and number % every[1] == every[0]:
                yield number, ids

    def __iter__(self) -> Iterator[Rows]:
        return self.run(self.sequences())

    def run(self, sequences: Iterator[tuple[int, list[int]]]) -> Iterator[Rows]:
        """The rows of some sequences, in order."""
        n_tokens = 0
        bar = tqdm(disable=not self.progress, desc="activations", unit="token", unit_scale=True)
        for group in self.grouped(sequences):
            ids = torch.tensor([ids for _, ids in group])
            found = capture(self.model, ids, self.sites, batch_size=len(ids), remote=self.remote)
            keep = self.kept(ids)
            numbers = torch.tensor([number for number, _ in group])[:, None].expand_as(ids)
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            values = {address: found[address].flatten(2)[keep] for address in self.sites}
            n_tokens += ids.numel()
            bar.update(ids.numel())
            yield Rows(values, ids[keep], numbers[keep], positions[keep])
        bar.close()
        if not n_tokens:
            raise BadInput("The text has no tokens; give some text.")

    def grouped(self, sequences: Iterator[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
        """Sequences of one length, as many as run together."""
        group: list[tuple[int, list[int]]] = []
        for number, ids in sequences:
            if group and (len(group) == self.sequences_per_forward or len(ids) != len(group[0][1])):
                yield group
                group = []
            group.append((number, ids))
        if group:
            yield group

    def kept(self, ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """Tokens that have a row."""
        return torch.ones_like(ids, dtype=torch.bool) if self.keep_special else ~torch.isin(ids, self.special)

    def widths(self) -> dict[str, int]:
        """Address -> numbers in a row."""
        probe = capture(self.model, torch.zeros(1, 2, dtype=torch.long), self.sites, remote=self.remote)
        return {address: value.shape[2:].numel() for address, value in probe.items()}

    def site(self, address: str | None = None) -> SiteStream:
        """One site's activations, as `dictionaries.train` takes them."""
        return SiteStream(self, only(self.sites, address))


class SiteStream:
    """One site of a stream (or of a store): an iterable of `(n, d)`."""

    def __init__(self, stream: ActivationStream, address: str) -> None:
        self.stream = stream
        self.address = address

    def __iter__(self) -> Iterator[Float[Tensor, "n d"]]:
        for rows in self.stream:
            yield rows[self.address]


def only(sites: Sequence[str], address: str | None) -> str:
    """The site that was asked for, or the only one there is."""
    if address is None and len(sites) == 1:
        return sites[0]
    if address not in sites:
        raise BadInput(f"{address!r} is not one of the sites here; there are: {', '.join(sites)}.")
    return str(address)
