"""The scores stated for the zoo's models, each as one function of a plain transformers model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

IGNORED = -100
"""The label of a position that is not scored."""


class InductionScore(NamedTuple):
    """How much better a model predicts a random sequence the second time it reads it.

    Attributes:
        gain: Mean loss over the first reading minus mean loss over the second, in nats a token. 0 without induction.
        first: Mean loss over the first reading, nats a token.
        second: Mean loss over the second reading without its first token (which nothing announces), nats a token.
        top1: Share of those tokens of the second reading that the model ranks first.
    """

    gain: float
    first: float
    second: float
    top1: float


def join(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Int[Tensor, " tokens"]:
    """Encodes texts as one sequence: end-of-text, text, end-of-text, text, …, end-of-text."""
    ids = [tokenizer.eos_token_id]
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids += [*encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    context: int = 256,
    batch: int = 16,
) -> float:
    """Returns the model's loss on texts, in bits for each byte of their UTF-8 form; less is better.

    The joined texts (see `join`) are cut into windows of `context` tokens that do not overlap, so a token is
    predicted from 0 to `context - 1` tokens of its own window, half of that on average. The ends of texts are
    predicted too; they add bits and no bytes.
    """
    texts = list(texts)
    ids = join(tokenizer, texts).to(model.device)
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(0, len(ids) - 1, context).split(batch):
        windows = [ids[start : start + context + 1] for start in rows.tolist()]
        padded = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=IGNORED)
        inputs, labels = padded[:, :-1].clamp(min=0), padded[:, 1:]  # what is clamped lies after the last scored token
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        total += loss.double().cpu()
    return total.item() / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.no_grad()
def induction_score(
    model: PreTrainedModel, pool: Int[Tensor, " tokens"], length: int = 32, samples: int = 256, seed: int = 0
) -> InductionScore:
    """Measures induction: 'beginning of text, `length` random tokens, the same tokens again', predicted token by token.

    Tokens are drawn from `pool` with replacement and independently, so the first reading cannot be predicted from
    context and the second only by looking it up. The measure is that of Olsson et al. 2022 (arXiv 2209.11895),
    averaged over the whole repetition.
    """
    generator = torch.Generator().manual_seed(seed)
    once = pool.cpu()[torch.randint(len(pool), (samples, length), generator=generator)]
    start = torch.full((samples, 1), model.config.bos_token_id)
    losses, hits = [], []
    for ids in torch.cat([start, once, once], 1).to(model.device).split(64):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))
        hits.append(logits.argmax(-1) == ids[:, 1:])
    loss, hit = torch.cat(losses), torch.cat(hits).float()
    first, second = loss[:, :length].mean().item(), loss[:, length + 1 :].mean().item()
    return InductionScore(gain=first - second, first=first, second=second, top1=hit[:, length + 1 :].mean().item())


@torch.no_grad()
def accuracy(model: PreTrainedModel, ids: Int[Tensor, "b t"], labels: Int[Tensor, "b t"]) -> float:
    """Returns the share of scored positions where the largest logit is the label (`tasks` says where labels stand)."""
    scored = labels != IGNORED
    predicted = model(input_ids=ids.to(model.device), use_cache=False).logits.argmax(-1).cpu()
    return (predicted == labels)[scored].float().mean().item()
