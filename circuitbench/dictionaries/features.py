"""What a feature responds to and what it says: its strongest contexts, its density, its effect on the logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitbench.dictionaries.base import Dictionary
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NO_TOKEN = -1


@dataclass(frozen=True)
class Example:
    """A stretch of text on which a feature is active.

    Attributes:
        token_ids: of the stretch, padding left out.
        activations: of the feature, one for each of them.
        peak: index in the stretch of the token the example is about.
        sequence: which sequence of the text, counted from 0 over all batches.
        position: of the peak in its sequence, counted over real tokens from 0.
    """

    token_ids: list[int]
    activations: list[float]
    peak: int
    sequence: int
    position: int

    @property
    def value(self) -> float:
        """The activation at the peak."""
        return self.activations[self.peak]


class FeatureExamples:
    """The strongest examples of every feature, one a sequence, gathered in memory that does not grow with the text."""

    def __init__(self, d_dict: int, *, n: int = 10, before: int = 12, after: int = 6):
        """Keep `n` examples a feature, with `before` and `after` tokens around the peak."""
        if n < 1 or before < 0 or after < 0:
            raise BadInput(
                f"n={n}, before={before}, after={after} were given; n must be at least 1, the others at least 0."
            )
        self.n, self.before, self.after = n, before, after
        width = before + 1 + after
        self.n_sequences = 0
        self.n_tokens = 0
        self.active_tokens = torch.zeros(d_dict, dtype=torch.int64)
        self.values = torch.zeros(d_dict, n)
        self.sequences = torch.full((d_dict, n), -1)
        self.positions = torch.full((d_dict, n), -1)
        self.tokens = torch.full((d_dict, n, width), NO_TOKEN, dtype=torch.int32)
        self.activations = torch.zeros(d_dict, n, width)

    @property
    def density(self) -> Float[Tensor, " d_dict"]:
        """The share of tokens on which each feature is active."""
        return self.active_tokens / max(1, self.n_tokens)

    def of(self, feature: int) -> list[Example]:
        """The examples of a feature, strongest first; fewer than `n` if fewer sequences activate it."""
        d_dict = len(self.values)
        if not 0 <= feature < d_dict:
            raise BadInput(f"feature {feature} was asked for; there are 0 to {d_dict - 1}.")
        return [self._example(feature, rank) for rank in range(self.n) if self.values[feature, rank] > 0]

    def _example(self, feature: int, rank: int) -> Example:
        tokens = self.tokens[feature, rank]
        real = tokens != NO_TOKEN
        return Example(
            token_ids=tokens[real].tolist(),
            activations=self.activations[feature, rank][real].tolist(),
            peak=int(real[: self.before].sum()),
            sequence=int(self.sequences[feature, rank]),
            position=int(self.positions[feature, rank]),
        )

    def add(
        self,
        activations: Float[Tensor, "b t d_dict"],
        token_ids: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"] | None = None,
    ) -> None:
        """Take in the features' activations on a batch of sequences; where the mask is false there is no token."""
        b, t, _ = activations.shape
        mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.bool()
        activations = (activations * mask.unsqueeze(2)).float().cpu()
        token_ids, mask = token_ids.cpu(), mask.cpu()
        self.active_tokens += (activations > 0).sum((0, 1))
        self.n_tokens += int(mask.sum())

        peaks, where = activations.max(1)  # (b, d_dict): each sequence's strongest token for each feature
        candidates = torch.cat([self.values, peaks.T], dim=1)
        self.values, chosen = candidates.topk(self.n, dim=1)
        feature, rank = ((chosen >= self.n) & (self.values > 0)).nonzero(
            as_tuple=True
        )  # those that come from this batch
        sequence = chosen[feature, rank] - self.n
        kept = chosen.clamp_max(self.n - 1)
        self.sequences = self.sequences.gather(1, kept)
        self.positions = self.positions.gather(1, kept)
        wide = kept.unsqueeze(2).expand_as(self.tokens)
        self.tokens = self.tokens.gather(1, wide)
        self.activations = self.activations.gather(1, wide)

        position = where[sequence, feature]
        self.sequences[feature, rank] = sequence + self.n_sequences
        self.positions[feature, rank] = mask.cumsum(1)[sequence, position] - 1
        window = position.unsqueeze(1) + torch.arange(-self.before, self.after + 1)
        inside = (window >= 0) & (window < t)
        window, row = window.clamp(0, t - 1), sequence.unsqueeze(1)
        inside &= mask[row, window]
        self.tokens[feature, rank] = token_ids[row, window].masked_fill(~inside, NO_TOKEN).int()
        self.activations[feature, rank] = activations[row, window, feature.unsqueeze(1)] * inside
        self.n_sequences += b


@torch.no_grad()
def top_examples(
    dictionary: Dictionary,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    n: int = 10,
    before: int = 12,
    after: int = 6,
) -> FeatureExamples:
    """Each feature's strongest contexts in a text, at most one a sequence, in one pass.

    Args:
        batches: (activations `(b, t, d_in)` of the dictionary's site, token ids `(b, t)`, mask `(b, t)`, true at real
            tokens).
        n: contexts a feature.
        before: tokens shown before the peak.
        after: tokens shown after it.
    """
    examples = FeatureExamples(dictionary.d_dict, n=n, before=before, after=after)
    for activations, token_ids, mask in batches:
        # A few sequences at a time: the code of a whole batch, zeros included, may be larger than everything else.
        at_once = max(1, 2**24 // (activations.shape[1] * dictionary.d_dict))
        for x, ids, real in zip(activations.split(at_once), token_ids.split(at_once), mask.split(at_once), strict=True):
            examples.add(dictionary.encode(x), ids, real)
    return examples


def logit_effects(
    dictionary: Dictionary, to_logits: Float[Tensor, "vocab d_out"], features: Iterable[int], *, n: int = 10
) -> list[tuple[list[tuple[int, float]], list[tuple[int, float]]]]:
    """The tokens whose logits each feature's direction raises and lowers most, through `to_logits` alone.

    Args:
        to_logits: the linear map from the dictionary's site to the logits: `unembedding.weight`, times
            `out_proj.weight` for a site before it.
        features: which.
        n: tokens a side.

    Returns:
        For each feature (promoted, suppressed): lists of (token id, change of its logit, less the mean change of all
        tokens, for an activation of 1), strongest first. What layers in between make of the direction is not in it.
    """
    if to_logits.shape[1] != dictionary.d_out:
        raise BadInput(
            f"to_logits has shape {tuple(to_logits.shape)}; it must be (vocab, d_out) with d_out = {dictionary.d_out}."
        )
    effects = dictionary.W_dec.detach()[list(features)].to(to_logits.dtype) @ to_logits.detach().T
    effects = effects - effects.mean(1, keepdim=True)
    n = min(n, effects.shape[1])
    sides = []
    for sign in (1, -1):
        values, ids = (sign * effects).topk(n, dim=1)
        sides.append(
            [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), (sign * values).tolist(), strict=True)]
        )
    return list(zip(*sides, strict=True))
