"""Where a dictionary's features are active in a text: their strongest contexts, others from all of their range, counts.

Gathered batch by batch, in memory that does not grow with the text. A feature's range is [0, 2ᵉ), with 2ᵉ the power of
two above its largest activation so far: when one outgrows it, the range doubles and neighbouring bins are merged, so
that what is found at the end does not depend on how the text was cut into batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NO_TOKEN = -1
BINS = 64  # of the histogram, over the whole range; at least half of them are used
INTERVALS = 8  # of the range, each with examples of its own
NEVER = -126  # exponent of a feature that was never active


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


class Contexts:
    """A table of examples: for every feature `rows` places, empty where the value is 0."""

    def __init__(self, d_dict: int, rows: int, width: int):
        self.values = torch.zeros(d_dict, rows)
        self.sequences = torch.full((d_dict, rows), -1)
        self.positions = torch.full((d_dict, rows), -1)
        self.tokens = torch.full((d_dict, rows, width), NO_TOKEN, dtype=torch.int32)
        self.activations = torch.zeros(d_dict, rows, width)

    def rearrange(self, source: Int[Tensor, "d_dict rows"]) -> None:
        """Put into each place what stood at `source` of the same feature; where that is negative, nothing."""
        empty, kept = source < 0, source.clamp_min(0)
        for name, blank in (("values", 0.0), ("sequences", -1), ("positions", -1)):
            setattr(self, name, getattr(self, name).gather(1, kept).masked_fill(empty, blank))
        wide = kept.unsqueeze(2).expand_as(self.tokens)
        self.tokens = self.tokens.gather(1, wide).masked_fill(empty.unsqueeze(2), NO_TOKEN)
        self.activations = self.activations.gather(1, wide).masked_fill(empty.unsqueeze(2), 0.0)

    def of(self, feature: int, before: int) -> list[Example | None]:
        """What stands in each place of a feature; nothing where it is empty."""
        columns = (self.values, self.tokens, self.activations, self.sequences, self.positions)
        found: list[Example | None] = []
        for value, tokens, activations, sequence, position in zip(
            *(column[feature].tolist() for column in columns), strict=True
        ):
            real = [i for i, token in enumerate(tokens) if token != NO_TOKEN]
            peak = sum(i < before for i in real)
            kept = [tokens[i] for i in real], [activations[i] for i in real]
            found.append(Example(*kept, peak, sequence, position) if value > 0 else None)
        return found


class FeatureExamples:
    """What is known of every feature of a dictionary from a text.

    Attributes:
        n: Strongest contexts kept for a feature, one a sequence.
        per_interval: Examples kept in each eighth of its range, drawn from all tokens there.
        before: Tokens shown before the one an example is about.
        after: Tokens shown after it.
        n_tokens: Tokens of the text, special ones left out.
        n_sequences: Sequences it was read in.
        active_tokens: `(d_dict,)` how many of them each feature is active on.
        histogram: `(d_dict, 64)` how often the activation lies in each 64th of the range.
        top, spread: The examples.
        promoted, suppressed: (token ids `(d_dict, m)`, changes of their logits); empty if not asked for.
        words: token id -> its text, of all tokens that occur.
        about: What this is of: dictionary, site, model, text; for people.
    """

    def __init__(self, d_dict: int, *, n: int = 10, before: int = 12, after: int = 6, per_interval: int = 2):
        if n < 1 or before < 0 or after < 0 or per_interval < 0:
            raise BadInput(
                f"n={n}, before={before}, after={after}, per_interval={per_interval} were given; n must be at least 1, "
                "the others at least 0."
            )
        self.n, self.before, self.after, self.per_interval = n, before, after, per_interval
        width = before + 1 + after
        self.n_sequences = 0
        self.n_tokens = 0
        self.active_tokens = torch.zeros(d_dict, dtype=torch.int64)
        self.exponents = torch.full((d_dict,), NEVER, dtype=torch.int32)
        self.histogram = torch.zeros(d_dict, BINS, dtype=torch.int64)
        self.top = Contexts(d_dict, n, width)
        self.spread = Contexts(d_dict, INTERVALS * per_interval, width)
        self.ranks = torch.full((d_dict, INTERVALS * per_interval), -1)  # of the spread: what was drawn, larger first
        nothing = (torch.zeros(d_dict, 0, dtype=torch.int32), torch.zeros(d_dict, 0))
        self.promoted: tuple[Tensor, Tensor] = nothing
        self.suppressed: tuple[Tensor, Tensor] = nothing
        self.words: dict[int, str] = {}
        self.about: dict[str, Any] = {}

    @property
    def d_dict(self) -> int:
        """Number of features."""
        return len(self.active_tokens)

    @property
    def density(self) -> Float[Tensor, " d_dict"]:
        """The share of tokens on which each feature is active."""
        return self.active_tokens / max(1, self.n_tokens)

    @property
    def values(self) -> Float[Tensor, "d_dict n"]:
        """The activations of the strongest contexts, largest first, 0 where there are fewer."""
        return self.top.values

    @property
    def positions(self) -> Int[Tensor, "d_dict n"]:
        """Where in its sequence each of them is."""
        return self.top.positions

    @property
    def ranges(self) -> Float[Tensor, " d_dict"]:
        """The end of each feature's range, a power of two above its largest activation; 0 if it was never active."""
        return torch.where(self.exponents > NEVER, torch.exp2(self.exponents.double()), 0.0).float()

    def of(self, feature: int) -> list[Example]:
        """The strongest contexts of a feature, strongest first; fewer than `n` if fewer sequences activate it."""
        self.check(feature)
        return [example for example in self.top.of(feature, self.before) if example is not None]

    def across(self, feature: int) -> list[tuple[float, float, list[Example]]]:
        """Examples from all of a feature's range: (from, to, examples) for each eighth of it, strongest first."""
        self.check(feature)
        step = float(self.ranges[feature]) / INTERVALS
        rows, m, found = self.spread.of(feature, self.before), self.per_interval, []
        for interval in reversed(range(INTERVALS)):
            examples = [row for row in rows[interval * m : (interval + 1) * m] if row is not None]
            if examples:
                found.append((interval * step, (interval + 1) * step, examples))
        return found

    def check(self, feature: int) -> None:
        """Refuse a feature that is not there."""
        if not 0 <= feature < self.d_dict:
            raise BadInput(f"feature {feature} was asked for; there are 0 to {self.d_dict - 1}.")

    def save(self, path: str | Path) -> None:
        """Write `examples.safetensors` and `examples.json` into the folder `path`, made if need be."""
        from .stored import save

        save(self, path)

    def add(
        self,
        activations: Float[Tensor, "b t d_dict"],
        token_ids: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"] | None = None,
        shown: Bool[Tensor, "b t"] | None = None,
    ) -> None:
        """Take in the features' activations on a batch of sequences.

        Args:
            activations: Of all features.
            token_ids: The tokens.
            mask: Where there is a token that counts; default: everywhere.
            shown: Where there is a token that is shown around others and has a position; default: as `mask`. Special
                tokens are, padding is not.
        """
        mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.bool()
        shown = mask if shown is None else shown.bool()
        activations = (activations * mask.unsqueeze(2)).float().cpu()
        if activations.numel() and not activations.min() >= 0:
            raise BadInput(
                "These activations are negative in places, or not numbers; examples are for features that are active "
                'or not, with an activation above 0 (of one of kind "abstopk", give its two_sided()).'
            )
        batch = _Batch(activations, token_ids.cpu(), mask.cpu(), shown.cpu(), self)
        self.active_tokens += (batch.activations > 0).sum((0, 1))
        self.n_tokens += int(batch.mask.sum())
        self._add_strongest(batch)
        self._add_to_range(batch)
        self.n_sequences += len(token_ids)

    def _add_strongest(self, batch: _Batch) -> None:
        peaks, where = batch.activations.max(1)  # (b, d_dict): each sequence's strongest token for each feature
        values, chosen = torch.cat([self.top.values, peaks.T], dim=1).topk(self.n, dim=1)
        new = (chosen >= self.n) & (values > 0)
        self.top.rearrange(torch.where(chosen < self.n, chosen, -1))
        feature, row = new.nonzero(as_tuple=True)
        sequence = chosen[feature, row] - self.n
        batch.write(self.top, feature, row, sequence, where[sequence, feature])

    def _add_to_range(self, batch: _Batch) -> None:
        self._widen(batch.activations.amax((0, 1)))
        sequence, position, feature = (batch.activations > 0).nonzero(as_tuple=True)
        value = batch.activations[sequence, position, feature]
        bins = (value * torch.exp2(6.0 - self.exponents[feature])).long()  # exact: both are powers of two
        self.histogram.view(-1).index_add_(0, feature * BINS + bins, torch.ones_like(bins))
        m = self.per_interval
        if not m:
            return
        interval = bins // (BINS // INTERVALS)
        rank = _drawn(sequence + self.n_sequences, batch.position[sequence, position], feature)
        last = self.ranks.view(-1, m)[:, -1]  # what has to be beaten
        better = rank > last[feature * INTERVALS + interval]
        sequence, position, feature, interval, rank = (
            one[better] for one in (sequence, position, feature, interval, rank)
        )
        old = (self.ranks >= 0).nonzero()
        group = torch.cat([old[:, 0] * INTERVALS + old[:, 1] // m, feature * INTERVALS + interval])
        ranks = torch.cat([self.ranks[old[:, 0], old[:, 1]], rank])
        order = (group * 2**31 + (2**31 - 1 - ranks)).argsort()
        group = group[order]
        first = torch.searchsorted(group, group)
        place = torch.arange(len(group)) - first
        order, group, place = order[place < m], group[place < m], place[place < m]
        home, row = group // INTERVALS, group % INTERVALS * m + place
        kept = order < len(old)
        source = torch.full_like(self.ranks, -1)
        source[home[kept], row[kept]] = old[order[kept], 1]
        self.spread.rearrange(source)
        self.ranks = torch.full_like(self.ranks, -1)
        self.ranks[home, row] = ranks[order]
        new = order[~kept] - len(old)
        batch.write(self.spread, home[~kept], row[~kept], sequence[new], position[new])

    def _widen(self, largest: Float[Tensor, " d_dict"]) -> None:
        """Double ranges until the largest activations are inside, and merge what then is one."""
        needed = torch.where(largest > 0, torch.frexp(largest).exponent, NEVER).int()
        shift = (needed - self.exponents).clamp_min(0)
        outgrown = ((shift > 0) & (self.exponents > NEVER)).nonzero().flatten()
        self.exponents = self.exponents.maximum(needed)
        shift = shift[outgrown].clamp_max(7).long()[:, None]
        merged = torch.zeros(len(outgrown), BINS, dtype=torch.int64)
        merged.scatter_add_(1, torch.arange(BINS) >> shift, self.histogram[outgrown])
        self.histogram[outgrown] = merged
        m = self.per_interval
        if not m or not len(outgrown):
            return
        ranks = self.ranks[outgrown].view(-1, INTERVALS, m)
        interval = torch.arange(INTERVALS)[None, :, None] >> shift[..., None]
        # In every interval the best that were drawn of all that it takes in.
        pool = torch.where(interval[:, None] == torch.arange(INTERVALS)[:, None, None], ranks[:, None], -1)
        best, place = pool.flatten(2).topk(m, dim=2)
        source = torch.arange(INTERVALS * m).expand(self.d_dict, -1).clone()
        source[outgrown] = torch.where(best >= 0, place, -1).flatten(1)
        self.spread.rearrange(source)
        self.ranks[outgrown] = best.flatten(1)


@dataclass
class _Batch:
    """Activations of some sequences, and how their surroundings are written into a table."""

    activations: Float[Tensor, "b t d_dict"]
    token_ids: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    shown: Bool[Tensor, "b t"]
    home: FeatureExamples
    position: Int[Tensor, "b t"] = field(init=False)

    def __post_init__(self) -> None:
        self.position = self.shown.cumsum(1) - 1

    def write(self, table: Contexts, feature: Tensor, row: Tensor, sequence: Tensor, column: Tensor) -> None:
        """Put what is around these tokens into these places."""
        window = column.unsqueeze(1) + torch.arange(-self.home.before, self.home.after + 1)
        inside = (window >= 0) & (window < self.token_ids.shape[1])
        window, line = window.clamp(0, self.token_ids.shape[1] - 1), sequence.unsqueeze(1)
        inside &= self.shown[line, window]
        table.values[feature, row] = self.activations[sequence, column, feature]
        table.sequences[feature, row] = sequence + self.home.n_sequences
        table.positions[feature, row] = self.position[sequence, column]
        table.tokens[feature, row] = self.token_ids[line, window].masked_fill(~inside, NO_TOKEN).int()
        table.activations[feature, row] = self.activations[line, window, feature.unsqueeze(1)] * inside


def _drawn(sequence: Tensor, position: Tensor, feature: Tensor) -> Int[Tensor, " n"]:
    """A number from 0 to 2³¹ − 1 for each token and feature, as good as random and the same in every batch."""
    x = sequence * 0x2545F4914F6CDD1D + position * 0x1B873593CC9E2D51 + feature * 0x5851F42D4C957F2D
    for _ in range(2):
        x = (x ^ (x >> 29)) * 0x369DEA0F31A53F85
    return (x ^ (x >> 32)) & (2**31 - 1)
