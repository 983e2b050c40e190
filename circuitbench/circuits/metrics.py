"""Metrics: one number a prompt, from the model's logits.

A metric is any callable ``(logits (b, t, vocab), batch) -> (b,)``; columns are padded on the left, so ``logits[:, -1]``
is the prediction after each prompt's last token. Those here name tokens by their text, which takes a tokenizer: `bound`
makes them fit a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn import functional as F

from ..errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    from ..models import Model
    from ..models.prompts import Batch

    Metric = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class LogitDiff:
    """See `logit_diff`."""

    answer: str | int
    wrong: str | int

    def bind(self, model: Model) -> LogitDiff:
        """The same metric with token ids for token texts."""
        return LogitDiff(token_id(model, self.answer), token_id(model, self.wrong))

    def __call__(self, logits: Float[Tensor, "b t vocab"], batch: Batch) -> Float[Tensor, " b"]:
        return logits[:, -1, known(self.answer)] - logits[:, -1, known(self.wrong)]

    def __str__(self) -> str:
        return f"logit of {self.answer!r} less logit of {self.wrong!r}"


@dataclass(frozen=True)
class Prob:
    """See `prob`."""

    token: str | int

    def bind(self, model: Model) -> Prob:
        """The same metric with a token id for the token's text."""
        return Prob(token_id(model, self.token))

    def __call__(self, logits: Float[Tensor, "b t vocab"], batch: Batch) -> Float[Tensor, " b"]:
        return logits[:, -1].float().softmax(-1)[:, known(self.token)]

    def __str__(self) -> str:
        return f"probability of {self.token!r}"


def logit_diff(answer: str | int, wrong: str | int) -> LogitDiff:
    """How much the model prefers one next token to another: the difference of their logits after the prompt.

    Args:
        answer: A token id, or a text that is one token of the model's tokenizer (usually with its leading space).
        wrong: The same, for the token it is compared with.
    """
    return LogitDiff(answer, wrong)


def prob(token: str | int) -> Prob:
    """The probability of one next token after the prompt; an id, or a text that is one token."""
    return Prob(token)


def loss(logits: Float[Tensor, "b t vocab"], batch: Batch) -> Float[Tensor, " b"]:
    """The mean of −log p(token | tokens before) over each prompt's tokens but the first, in nats."""
    real = batch.attention_mask.to(logits.device).bool()
    predicted = real[:, 1:] & real[:, :-1]
    if not predicted.any(1).all():
        raise BadInput("The loss needs prompts of at least two tokens; a single token is predicted from nothing.")
    ids = batch.input_ids.to(logits.device)[:, 1:]
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids, reduction="none")
    return (each * predicted).sum(1) / predicted.sum(1)


def bound(metric: Metric, model: Model) -> Metric:
    """The metric as it applies to a model: token texts become ids.

    Raises:
        BadInput: For a text that is not one token, an id outside the vocabulary, or something that is no metric.
    """
    if not callable(metric):
        raise BadInput(
            f"metric is a {type(metric).__name__}; give cb.logit_diff(answer, wrong), cb.prob(token), or a function "
            "(logits (b, t, vocab), batch) -> (b,)."
        )
    return metric.bind(model) if isinstance(metric, (LogitDiff, Prob)) else metric


def known(token: str | int) -> int:
    """A token's id, where it is one already."""
    if isinstance(token, str):
        raise BadInput(
            f"{token!r} is a token's text, and this metric knows no tokenizer; give the id, or `bind(model)`."
        )
    return token


def token_id(model: Model, token: str | int) -> int:
    """The id of one token, given as its text or its id."""
    vocabulary = model.hf.config.get_text_config().vocab_size
    if isinstance(token, int):
        if not 0 <= token < vocabulary:
            raise BadInput(f"Token id {token} is outside the vocabulary, 0 to {vocabulary - 1}.")
        return token
    assert model.tokenizer is not None  # `load_model` gives every model one
    ids = model.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [model.tokenizer.decode([index]) for index in ids]
        raise BadInput(
            f"{token!r} is {len(ids)} tokens of this model ({', '.join(map(repr, pieces))}); a metric compares single "
            "tokens: mind the leading space, or give a token id."
        )
    return ids[0]
