"""Synthetic tasks whose right answers are known: associative recall and induction.

Every sampler returns `(ids, labels)`, both `(n, t)`. `labels[i, t]` is the token the model must predict *from*
position t, that is the token at t + 1 (labels are not shifted, unlike those transformers computes a loss from);
positions that are not scored hold −100. Token 0 is padding in every task. The same seed gives the same samples on
every machine.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from circuitbench.errors import BadInput
from circuitbench.models.zoo.scores import IGNORED

PAD = "<pad>"


def mqar(
    n: int, seed: int | torch.Generator, pairs: int = 4, keys: int = 16, values: int = 16, gap: int = 0
) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
    """Samples multi-query associative recall (Arora et al. 2023, arXiv 2312.04927).

    A prompt is `k v` for every pair, then `gap` padding tokens, then every key once more in another order, each with
    its value: `k3 v7 k9 v2 | k9 v2 k3 v7`. The value is asked for at each repeated key. Keys of a prompt are
    distinct, values need not be. Tokens: 1 … keys are keys, keys + 1 … keys + values are values.

    Args:
        n: Number of prompts.
        seed: A number, or a generator that goes on from where it stands.
        pairs: Number of pairs in a prompt; t is 4 · pairs + gap.
        keys: Number of different keys.
        values: Number of different values.
        gap: Number of padding tokens between the pairs and the questions.

    Raises:
        BadInput: More pairs than keys.
    """
    if pairs > keys:
        raise BadInput(
            f"mqar was asked for {pairs} pairs of {keys} keys, but keys of a prompt are distinct: give pairs <= keys."
        )
    generator = _generator(seed)
    key = _choose(n, keys, pairs, generator) + 1
    value = torch.randint(values, (n, pairs), generator=generator) + 1 + keys
    order = _choose(n, pairs, pairs, generator)
    asked, answer = key.gather(1, order), value.gather(1, order)
    told = torch.stack([key, value], -1).flatten(1)
    ids = torch.cat([told, torch.zeros(n, gap, dtype=torch.long), torch.stack([asked, answer], -1).flatten(1)], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, 2 * pairs + gap :: 2] = answer
    return ids, labels


def induction(
    n: int, seed: int | torch.Generator, length: int = 16, repeated: int = 12, vocabulary: int = 32
) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
    """Samples induction with a varying offset: `length` distinct tokens, then a contiguous piece of them again.

    The piece has `repeated` tokens and starts anywhere in the first part, so the distance between a token and its
    repetition differs from prompt to prompt. With a fixed distance (the usual 'same sequence twice') a model can copy
    from a constant relative position and never compare tokens; here it cannot. Scored from the first token of the
    piece on: each but the last names its successor.

    Args:
        n: Number of prompts.
        seed: A number, or a generator that goes on from where it stands.
        length: Number of tokens read first; t is length + repeated.
        repeated: Number of tokens of the piece.
        vocabulary: Number of tokens, the padding token 0 included.

    Raises:
        BadInput: More distinct tokens than the vocabulary has, or a piece longer than the whole.
    """
    if length > vocabulary - 1 or not 2 <= repeated <= length:
        raise BadInput(
            f"induction was asked for {length} distinct tokens out of {vocabulary - 1} and a piece of {repeated}: "
            "give length <= vocabulary - 1 and 2 <= repeated <= length."
        )
    generator = _generator(seed)
    whole = _choose(n, vocabulary - 1, length, generator) + 1
    start = torch.randint(length - repeated + 1, (n, 1), generator=generator)
    piece = whole.gather(1, start + torch.arange(repeated))
    ids = torch.cat([whole, piece], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, length:-1] = piece[:, 1:]
    return ids, labels


def mqar_tokenizer(keys: int = 16, values: int = 16) -> PreTrainedTokenizerFast:
    """Returns a tokenizer for prompts such as "k3 v7 k9 v2 k9"; a word that is no token is an error."""
    return _word_tokenizer([PAD, *(f"k{i}" for i in range(keys)), *(f"v{i}" for i in range(values))])


def induction_tokenizer(vocabulary: int = 32) -> PreTrainedTokenizerFast:
    """Returns a tokenizer for prompts such as "t4 t9 t1 t4"; a word that is no token is an error."""
    return _word_tokenizer([PAD, *(f"t{i}" for i in range(1, vocabulary))])


def _generator(seed: int | torch.Generator) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def _choose(n: int, population: int, k: int, generator: torch.Generator) -> Int[Tensor, "n k"]:
    """Draws, n times, k different numbers below `population`, in random order."""
    return torch.rand(n, population, generator=generator, dtype=torch.float64).argsort(1)[:, :k]


def _word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # one token serves as all three: nothing begins or ends in these tasks, but padding and generation ask for the ids
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=PAD,
        eos_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
