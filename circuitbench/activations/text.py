"""Any source of text as token ids, packed into sequences without losing or doubling a token."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..models.id_tokenizer import NAME as IDS_ONLY
from ..models.prompts import tokenize

if TYPE_CHECKING:
    from ..models import Model

# One document: a string, a text file, token ids, or a row of a data set.
Document = str | os.PathLike[str] | Sequence[int] | Tensor | Mapping[str, Any]
Text = Document | Iterable[Document]


class Documents:
    """The documents of a text, as token ids; can be read again unless the text is an iterator.

    Args:
        model: The model, whose tokenizer is used.
        text: A string, the path of a text file, ids `(n,)` or `(documents, n)`, or an iterable of any of these, or of
            rows of a data set (``datasets``, streaming or not).
        column: Where a row of a data set has its text, or its token ids.
    """

    def __init__(self, model: Model, text: Text, column: str = "text") -> None:
        self.model = model
        self.column = column
        self.once = isinstance(text, Iterator)
        self.begun = False
        self.text = text

    def __iter__(self) -> Iterator[list[int]]:
        if self.once and self.begun:
            raise BadInput(
                "The text is an iterator, and has been read; give something that can be read again (a list, a data "
                "set, a file), or store its activations."
            )
        self.begun = True
        text = self.text
        if isinstance(text, (str, os.PathLike, Mapping)) or is_ids(text):
            yield self.ids(text)
        elif isinstance(text, Iterable):  # a tensor of several documents, too
            for document in text:
                yield self.ids(document)
        else:
            raise BadInput(f"Text is a string, a path, token ids, or an iterable of them, not {type(text).__name__}.")

    def ids(self, document: Any) -> list[int]:
        """One document's token ids, as its tokenizer makes them."""
        if isinstance(document, Mapping):
            if self.column not in document:
                raise BadInput(
                    f"A row of the data set has no column {self.column!r}; it has {', '.join(map(str, document))}. "
                    "Name the one with the text, or with token ids: column=."
                )
            document = document[self.column]
        if isinstance(document, os.PathLike):
            path = Path(document)
            if not path.is_file():
                raise BadInput(f"{path} is not a file; give the path of a text file, or a text.")
            document = path.read_text(encoding="utf-8")
        if isinstance(document, str):
            return self.tokens(document)
        if is_ids(document):
            return checked(self.model, torch.as_tensor(document).tolist())
        raise BadInput(f"A document is a string, a path, token ids or a row, not {type(document).__name__}.")

    def tokens(self, text: str) -> list[int]:
        """A text's token ids."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None  # `load_model` gives every model one
        if not text:
            return []
        if tokenizer.name_or_path == IDS_ONLY:
            return tokenize(self.model, text)
        return tokenizer(text, verbose=False)["input_ids"]  # longer than a context is no warning


def is_ids(value: Any) -> bool:
    """Whether this is one document's token ids."""
    if isinstance(value, Tensor):
        return value.dim() == 1 and not value.is_floating_point()
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(one, int) for one in value[:8])
        and len(value) > 0
    )


def checked(model: Model, ids: list[int]) -> list[int]:
    """Token ids that the model knows."""
    size = model.hf.config.get_text_config().vocab_size
    wrong = next((one for one in ids if not 0 <= one < size), None)
    if wrong is not None:
        raise BadInput(f"Token id {wrong} is not one of the model's: its vocabulary is 0 to {size - 1}.")
    return ids


def packed(documents: Iterable[list[int]], context: int, separator: int | None) -> Iterator[list[int]]:
    """All documents one after the other, cut into sequences of `context` tokens; the last one may be shorter.

    Args:
        documents: Token ids of each.
        context: Tokens of a sequence.
        separator: Token put between two documents, where neither has one there already.
    """
    held: list[int] = []
    last: int | None = None
    for ids in documents:
        if not ids:
            continue
        if last is not None and separator is not None and last != separator and ids[0] != separator:
            held.append(separator)
        held.extend(ids)
        last = ids[-1]
        start = 0
        while len(held) - start >= context:
            yield held[start : start + context]
            start += context
        held = held[start:]
    if held:
        yield held
