"""Prompts in, one left-padded batch out; and back from padded positions to each prompt's own tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..errors import BadInput
from .id_tokenizer import NAME as IDS_ONLY

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from .model import Model

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | torch.Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Prompts as the model takes them.

    Attributes:
        input_ids: `(b, t)`, padded on the left.
        attention_mask: `(b, t)`, 1 for a real token.
    """

    input_ids: Int[Tensor, "b t"]
    attention_mask: Int[Tensor, "b t"]

    @property
    def lengths(self) -> Int[Tensor, " b"]:
        """Real tokens of each prompt."""
        return self.attention_mask.sum(1)

    @property
    def padded(self) -> bool:
        """Whether any prompt is shorter than the longest."""
        return bool((self.attention_mask == 0).any())

    @property
    def index(self) -> Int[Tensor, "b t"]:
        """Each column's token index in its own prompt, -1 for padding."""
        return token_index(self.attention_mask)

    def columns(self, model: Model) -> Int[Tensor, "b columns"]:
        """Each column's token index inside the model's layers: as `index`, after the columns of meta tokens (-1)."""
        return F.pad(self.index, (model.meta_tokens, 0), value=-1)

    def inputs(self, model: Model) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        check_padding(model, self)
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        # A learned or rotary position belongs to a prompt's own token, not to the column it was padded into.
        if self.padded and takes_position_ids(model):
            given["position_ids"] = self.index.clamp(min=0)
        return given

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the prompts, without columns that are padding in all of them."""
        mask = self.attention_mask[start:stop]
        first = int(mask.shape[1] - mask.sum(1).max())
        return Batch(self.input_ids[start:stop, first:], mask[:, first:])

    def unpadded(self, value: Float[Tensor, "b t *rest"]) -> Float[Tensor, "b t *rest"]:
        """Move every prompt's tokens to the front: `[i, j]` is token j of prompt i, NaN past its end."""
        if not self.padded:
            return value
        out = torch.full_like(value, torch.nan)
        for row, length in enumerate(self.lengths.tolist()):
            out[row, :length] = value[row, value.shape[1] - length :]
        return out


# Their forward ignores the mask, in what is recurrent at least.
UNMASKED = ("rwkv", "xlstm", "recurrent_gemma")


def check_padding(model: Model, batch: Batch) -> None:
    """Refuse to pad where padding is not inert, and prompts that transformers would mix.

    Raises:
        BadInput: For a padded batch on such a model, and for several prompts of one token of RWKV-4.
    """
    rows, length = batch.input_ids.shape
    if length == 1 and rows > 1 and model.hf.config.model_type == "rwkv":
        raise BadInput(
            f"These are {rows} prompts of one token, and transformers mixes such prompts of rwkv into each other; run "
            "them one by one (for capture: batch_size=1)."
        )
    leak = padding_leak(model) if batch.padded else ""
    if leak:
        raise BadInput(f"{leak}; give it prompts of one length at a time (for capture: batch_size=1).")


def padding_leak(model: Model) -> str:
    """How padding reaches a prompt's own tokens, where it does; else empty.

    transformers masks what enters a mixer, so that a bias of its input projection still leaks from padded columns into
    the short convolution of a prompt's first tokens. (No published checkpoint has such a bias.)
    """
    if any(name.endswith("in_proj.bias") for name, _ in model.hf.named_parameters()):
        return "This model's mixers have an in_proj with a bias, which leaks from padding into a prompt's first tokens"
    if model.hf.config.model_type in UNMASKED:
        return f"{type(model.hf).__name__} runs its recurrence through padding, whatever the attention_mask says"
    return ""


def token_index(mask: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Each column's token index in its own prompt, -1 for padding."""
    return torch.where(mask.bool(), mask.cumsum(1) - 1, -1)


def takes_position_ids(model: Model) -> bool:
    """Whether positions enter the model other than by the order of its tokens."""
    return "position_ids" in inspect.signature(type(model.hf).forward).parameters


def encode(model: Model, prompts: Prompts, special_tokens: bool = True) -> Batch:
    """Prompts of any accepted form as a left-padded batch.

    Args:
        model: The model, for its tokenizer and its limits.
        prompts: A string, a list of strings, token ids (one list, a list of lists, a tensor `(b, t)` or `(t,)`), or a
            mapping with `input_ids` and `attention_mask`, padded on either side.
        special_tokens: Whether text gets the special tokens that the tokenizer adds (to the beginning, mostly).

    Raises:
        BadInput: For an empty prompt, one longer than the model takes, ids outside the vocabulary, or another type.
    """
    rows = as_rows(model, prompts, special_tokens)
    if not rows:
        raise BadInput("There are no prompts; give a string, a list of strings, or token ids of shape (b, t).")
    vocabulary = model.hf.config.get_text_config().vocab_size
    for number, row in enumerate(rows):
        where = f"Prompt {number}" if len(rows) > 1 else "The prompt"
        if not row:
            raise BadInput(f"{where} has no tokens; give at least one token.")
        check_length(model, len(row), f"{where} has")
        if min(row) < 0 or max(row) >= vocabulary:
            raise BadInput(
                f"{where} has token ids from {min(row)} to {max(row)}; the vocabulary is 0 to {vocabulary - 1}."
            )
    longest = max(len(row) for row in rows)
    pad = pad_id(model)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return Batch(ids, mask)


def check_length(model: Model, length: int, what: str) -> None:
    """Refuse more tokens than the model has positions for, or than it runs in one piece."""
    config = model.hf.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and takes_position_ids(model) and length > limit:
        raise BadInput(f"{what} {length} tokens, and this model takes {limit} (max_position_embeddings).")
    piece = getattr(config, "max_inference_chunksize", None)  # xLSTM, on a server
    if piece is not None and length > piece:
        raise BadInput(
            f"{what} {length} tokens, and this model runs more than {piece} (max_inference_chunksize) in pieces, of "
            "which only one would be seen; load the model here."
        )


def pad_id(model: Model) -> int:
    """The token that padding is filled with; masked, so any will do."""
    for holder in (model.tokenizer, model.hf.config):
        index = getattr(holder, "pad_token_id", None)
        if isinstance(index, int) and index >= 0:
            return index
    return 0


def as_rows(model: Model, prompts: Prompts, special_tokens: bool) -> list[list[int]]:
    """Prompts as lists of token ids."""
    if isinstance(prompts, Mapping):
        return masked_rows(prompts)
    if isinstance(prompts, torch.Tensor):
        if prompts.dim() not in (1, 2) or prompts.is_floating_point():
            raise BadInput(
                f"Token ids are integers of shape (b, t), not {prompts.dtype} of shape {tuple(prompts.shape)}."
            )
        return (prompts if prompts.dim() == 2 else prompts[None]).tolist()
    if isinstance(prompts, str):
        return [tokenize(model, prompts, special_tokens)]
    if isinstance(prompts, Sequence):
        items: Sequence[Any] = prompts
        if all(isinstance(prompt, str) for prompt in items):
            return [tokenize(model, prompt, special_tokens) for prompt in items]
        if all(isinstance(token, int) for token in items):
            return [list(items)]
        if all(isinstance(row, Sequence) and all(isinstance(token, int) for token in row) for row in items):
            return [list(row) for row in items]
    raise BadInput(f"Prompts are strings, token ids, or a mapping with input_ids, not a {type(prompts).__name__}.")


def masked_rows(prompts: Mapping[str, Any]) -> list[list[int]]:
    """The real tokens of a batch encoding."""
    if "input_ids" not in prompts:
        raise BadInput(f"A batch encoding holds input_ids (and attention_mask); this one holds {', '.join(prompts)}.")
    ids = torch.as_tensor(prompts["input_ids"])
    mask = torch.as_tensor(prompts.get("attention_mask", torch.ones_like(ids)))
    if ids.shape != mask.shape or ids.dim() != 2:
        raise BadInput(
            f"input_ids and attention_mask are both (b, t); these are {tuple(ids.shape)} and {tuple(mask.shape)}."
        )
    rows = []
    for row, real in zip(ids, mask.bool(), strict=True):
        places = real.nonzero().flatten()
        if len(places) and int(places[-1] - places[0]) + 1 != len(places):
            raise BadInput("attention_mask has a hole between real tokens; padding belongs on one side.")
        rows.append(row[real].tolist())
    return rows


def tokenize(model: Model, prompt: str, special_tokens: bool = True) -> list[int]:
    """One prompt's token ids, with the special tokens that the tokenizer adds, if they are wanted."""
    if model.tokenizer is None or model.tokenizer.name_or_path == IDS_ONLY:
        if not prompt.strip() or prompt.replace(" ", "").isdigit():
            return [int(word) for word in prompt.split()]
        raise BadInput(
            "This model has no tokenizer, so prompts are token ids: a tensor (b, t), a list, a string like '5 17 3'. "
            "Give it one with load_model(..., tokenizer=...)."
        )
    return list(model.tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"])
