"""Examples gathered batch by batch are those a full sort over the whole text finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries import features
from circuitbench.errors import BadInput

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
    got = features.top_examples(dictionary, zip(*(t.split(batch) for t in text), strict=True), n=5, before=4, after=2)
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
    examples = features.FeatureExamples(1, n=2, before=1, after=1)
    activations = torch.tensor([[9.0, 8.0, 1.0, 2.0]]).unsqueeze(2)
    examples.add(activations, torch.tensor([[50, 51, 52, 53]]), torch.tensor([[False, False, True, True]]))
    (example,) = examples.of(0)
    assert (example.token_ids, example.activations, example.peak, example.position) == ([52, 53], [1.0, 2.0], 1, 1)
    assert examples.density.item() == 1


def test_memory_does_not_grow_with_the_text(text: tuple[Tensor, Tensor, Tensor]) -> None:
    dictionary = dictionaries.build("topk", d_in=D_IN, d_dict=D_DICT, k=3)

    def held(times: int) -> int:
        examples = features.top_examples(dictionary, [text] * times, n=5)
        return sum(t.numel() * t.element_size() for t in vars(examples).values() if isinstance(t, Tensor))

    assert held(1) == held(20)


def test_logit_effects_are_the_largest_changes_of_the_logits() -> None:
    dictionary = dictionaries.build("topk", d_in=D_IN, d_dict=D_DICT, k=3)
    unembedding = torch.randn(50, D_IN)
    (promoted, suppressed), _ = features.logit_effects(dictionary, unembedding, [7, 2], n=4)
    x = torch.randn(D_IN)
    change = unembedding @ (x + dictionary.W_dec[7]) - unembedding @ x
    change -= change.mean()
    order = change.argsort(descending=True).tolist()
    assert [token for token, _ in promoted] == order[:4]
    assert [token for token, _ in suppressed] == order[::-1][:4]
    assert [value for _, value in promoted] == pytest.approx(change[order[:4]].tolist(), abs=1e-5)
    assert [value for _, value in suppressed] == pytest.approx(change[order[::-1][:4]].tolist(), abs=1e-5)


def test_wrong_requests_are_refused() -> None:
    dictionary = dictionaries.build("topk", d_in=D_IN, d_dict=D_DICT, k=3)
    with pytest.raises(BadInput, match="n must be at least 1"):
        features.FeatureExamples(4, n=0)
    with pytest.raises(BadInput, match="feature 4 was asked for; there are 0 to 3"):
        features.FeatureExamples(4).of(4)
    with pytest.raises(BadInput, match=r"must be \(vocab, d_out\) with d_out = 8"):
        features.logit_effects(dictionary, torch.ones(50, 9), [0])
