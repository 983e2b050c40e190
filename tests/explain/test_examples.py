"""Examples gathered batch by batch are those a full sort over the whole text finds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries, explain
from circuitbench.errors import BadInput
from circuitbench.explain.examples import BINS, INTERVALS, FeatureExamples, _drawn

D_IN, D_DICT, SEQUENCES, LENGTH = 8, 30, 23, 15


@pytest.fixture
def text() -> tuple[Tensor, Tensor, Tensor]:
    activations = torch.randn(SEQUENCES, LENGTH, D_IN)
    ids = torch.randint(100, (SEQUENCES, LENGTH))
    lengths = torch.randint(3, LENGTH + 1, (SEQUENCES,))
    mask = torch.arange(LENGTH) >= LENGTH - lengths.unsqueeze(1)  # padded on the left
    return activations, ids, mask


@pytest.mark.parametrize("batch", [1, 4, SEQUENCES])
def test_examples_are_those_of_a_full_sort(text: tuple[Tensor, Tensor, Tensor], batch: int) -> None:
    dictionary = dictionaries.build("topk", d_in=D_IN, d_dict=D_DICT, k=3)
    activations, ids, mask = text
    got = FeatureExamples(D_DICT, n=5, before=4, after=2)
    explain.gather(dictionary, zip(*(t.split(batch) for t in text), strict=True), got)
    code = dictionary.encode(activations) * mask.unsqueeze(2)
    for feature in range(D_DICT):
        best = sorted(((code[s, :, feature].max().item(), s) for s in range(SEQUENCES)), reverse=True)
        best = [(value, s) for value, s in best if value > 0][:5]
        examples = got.of(feature)
        assert [e.sequence for e in examples] == [s for _, s in best]
        for example, (value, s) in zip(examples, best, strict=True):
            column = int(code[s, :, feature].argmax())
            first_real = int(mask[s].long().argmax())
            window = range(max(first_real, column - 4), min(LENGTH, column + 3))
            assert example.value == pytest.approx(value)
            assert example.position == column - first_real
            assert example.token_ids == [ids[s, c].item() for c in window]
            assert example.activations == pytest.approx([code[s, c, feature].item() for c in window])
            assert example.token_ids[example.peak] == ids[s, column]
    torch.testing.assert_close(got.density, (code > 0).sum((0, 1)) / mask.sum())
    assert got.n_sequences == SEQUENCES


def test_padding_is_never_active() -> None:
    """A feature that fires everywhere must not show, or count, what stands at padding."""
    examples = FeatureExamples(1, n=2, before=1, after=1)
    activations = torch.tensor([[9.0, 8.0, 1.0, 2.0]]).unsqueeze(2)
    examples.add(activations, torch.tensor([[50, 51, 52, 53]]), torch.tensor([[False, False, True, True]]))
    (example,) = examples.of(0)
    assert (example.token_ids, example.activations, example.peak, example.position) == ([52, 53], [1.0, 2.0], 1, 1)
    assert examples.density.item() == 1


def test_special_tokens_are_shown_and_never_active() -> None:
    examples = FeatureExamples(1, n=2, before=2, after=1)
    activations = torch.tensor([[1.0, 9.0, 3.0, 2.0]]).unsqueeze(2)
    special = torch.tensor([[False, True, False, False]])
    examples.add(activations, torch.tensor([[50, 51, 52, 53]]), ~special, torch.ones_like(special))
    (example,) = examples.of(0)
    assert (example.token_ids, example.activations) == ([50, 51, 52, 53], [1.0, 0.0, 3.0, 2.0])
    assert (example.peak, example.position, examples.n_tokens) == (2, 2, 3)


def test_memory_does_not_grow_with_the_text(text: tuple[Tensor, Tensor, Tensor]) -> None:
    dictionary = dictionaries.build("topk", d_in=D_IN, d_dict=D_DICT, k=3)

    def held(times: int) -> int:
        examples = explain.gather(dictionary, [text] * times, FeatureExamples(D_DICT, n=5))
        tables = [vars(examples), vars(examples.top), vars(examples.spread)]
        return sum(t.numel() * t.element_size() for one in tables for t in one.values() if isinstance(t, Tensor))

    assert held(1) == held(20)


@pytest.mark.parametrize("batch", [1, 5, SEQUENCES])
def test_the_range_is_counted_and_drawn_from_as_over_the_whole_text(
    text: tuple[Tensor, Tensor, Tensor], batch: int
) -> None:
    """Ranges double as the text goes on (its later half is louder), and nothing is seen of that at the end."""
    dictionary = dictionaries.build("topk", d_in=D_IN, d_dict=D_DICT, k=3)
    activations, ids, mask = text
    activations = activations * torch.linspace(0.05, 9, SEQUENCES)[:, None, None]
    got = FeatureExamples(D_DICT, n=2, before=3, after=3, per_interval=2)
    explain.gather(dictionary, zip(*(t.split(batch) for t in (activations, ids, mask)), strict=True), got)
    code = dictionary.encode(activations).detach() * mask.unsqueeze(2)
    position = mask.cumsum(1) - 1
    n_full = 0
    for feature in range(D_DICT):
        found = code[..., feature]
        end = 2.0 ** math.floor(math.log2(found.max()) + 1)
        assert got.ranges[feature] == end
        active = found[found > 0]
        counts = torch.bincount((active / end * BINS).long(), minlength=BINS)
        assert got.histogram[feature].tolist() == counts.tolist()
        assert counts.sum() == got.active_tokens[feature]
        by_interval = {low: examples for low, _, examples in got.across(feature)}
        for interval in range(INTERVALS):
            low, high = (end * i / INTERVALS for i in (interval, interval + 1))
            s, c = ((found >= low) & (found < high) & (found > 0)).nonzero(as_tuple=True)
            drawn = _drawn(s, position[s, c], torch.full_like(s, feature))
            best = drawn.argsort(descending=True)[:2]
            expected = [(int(s[i]), int(position[s[i], c[i]]), found[s[i], c[i]].item()) for i in best]
            examples = by_interval.get(low, [])
            assert [(e.sequence, e.position) for e in examples] == [(a, b) for a, b, _ in expected]
            assert [e.value for e in examples] == pytest.approx([v for _, _, v in expected])
            n_full += len(s) > 2
    assert n_full > 30


def test_draws_are_even() -> None:
    """Every token of a range has the same chance: of 4 000 tokens, the mean rank and the share of large ones."""
    drawn = _drawn(torch.arange(4000) // 50, torch.arange(4000) % 50, torch.full((4000,), 3)).double() / 2**31
    assert abs(drawn.mean() - 0.5) < 4 / (12 * 4000) ** 0.5
    assert abs((drawn > 0.9).double().mean() - 0.1) < 0.02
    assert abs(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]) < 0.07


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(BadInput, match="n must be at least 1"):
        FeatureExamples(4, n=0)
    with pytest.raises(BadInput, match="negative in places"):
        FeatureExamples(4).add(-torch.ones(1, 3, 4), torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(BadInput, match="feature 4 was asked for; there are 0 to 3"):
        FeatureExamples(4).of(4)
