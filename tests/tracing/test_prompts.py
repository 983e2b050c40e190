"""Prompts of every form are the same batch; positions count each prompt's own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitbench as cb
from circuitbench.models.prompts import Batch, encode
from circuitbench.tracing.selection import select
from tests.architectures.cases import load

ROWS = [[5, 17, 3, 24, 96], [40, 2]]


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return load("mamba2")


def texts(rows: list[list[int]]) -> list[str]:
    return [" ".join(map(str, row)) for row in rows]


@pytest.mark.parametrize(
    "prompts",
    [
        texts(ROWS),
        tuple(texts(ROWS)),
        ROWS,
        {"input_ids": [[5, 17, 3, 24, 96], [9, 9, 9, 40, 2]], "attention_mask": [[1] * 5, [0, 0, 0, 1, 1]]},
        {"input_ids": torch.tensor([[5, 17, 3, 24, 96], [40, 2, 0, 0, 0]]),
         "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])},
    ],
    ids=["strings", "tuple", "ids", "padded left", "padded right"],
)  # fmt: skip
def test_every_form_of_prompts_is_the_same_batch(model: cb.Model, prompts: Any) -> None:
    batch = encode(model, prompts)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch.input_ids[0].tolist() == ROWS[0]
    assert batch.input_ids[1, 3:].tolist() == ROWS[1]
    assert batch.lengths.tolist() == [5, 2]
    assert batch.index.tolist() == [[0, 1, 2, 3, 4], [-1, -1, -1, 0, 1]]


@pytest.mark.parametrize("prompt", ["5 17 3", [5, 17, 3], torch.tensor([5, 17, 3]), torch.tensor([[5, 17, 3]])])
def test_one_prompt_is_a_batch_of_one(model: cb.Model, prompt: Any) -> None:
    batch = encode(model, prompt)
    assert batch.input_ids.tolist() == [[5, 17, 3]]
    assert not batch.padded


def test_a_models_own_tokenizer_and_its_special_tokens_are_used() -> None:
    model = cb.load_model("zoo:pylm-mamba2")
    assert model.tokenizer is not None
    text = "def f(x):"
    assert encode(model, text).input_ids[0].tolist() == model.tokenizer(text)["input_ids"]


def test_the_tokenizer_of_ids_reads_each_number_as_one_token(model: cb.Model) -> None:
    """Special tokens among them: 0, 1 and 2 are no parts of 10, 12 or 20."""
    assert model.tokenizer is not None
    ids = list(range(97))
    assert model.tokenizer(" ".join(map(str, ids)))["input_ids"] == ids
    assert model.tokenizer.decode([24, 12, 20]) == "24 12 20"
    with torch.no_grad():
        with model.trace("24 12 20"):
            traced = model.logits.save()
    assert torch.equal(traced, model.hf(torch.tensor([[24, 12, 20]])).logits)


def test_rows_of_a_batch_drop_the_padding_they_share() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    batch = Batch(torch.arange(12).reshape(3, 4), mask)
    part = batch.rows(1, 3)
    assert part.input_ids.tolist() == [[5, 6, 7], [9, 10, 11]]
    assert part.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_a_value_per_column_becomes_a_value_per_token() -> None:
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 1]]))
    value = batch.unpadded(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[..., None])[..., 0]
    assert value[0].tolist() == [1, 2, 3]
    assert value[1, 0] == 6
    assert value[1, 1:].isnan().all()


# Positions -----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, False, True, False], [False, True, False, False]])


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (None, [[0, 1, 2, 3], [0, 1]]),
        (0, [[0], [0]]),
        (-1, [[3], [1]]),
        ("last", [[3], [1]]),
        ([0, -1], [[0, 3], [0, 1]]),
        ((1,), [[1], [1]]),
        (torch.tensor([0, 1]), [[0, 1], [0, 1]]),
        (slice(1, None), [[1, 2, 3], [1]]),
        (slice(None, -1), [[0, 1, 2], [0]]),
        (slice(-2, None), [[2, 3], [0, 1]]),
        (slice(0, None, 2), [[0, 2], [0]]),
        (slice(2, 9), [[2, 3], []]),
        (MASK, [[0, 2], [1]]),
        (torch.tensor([True, False, False, True]), [[0, 3], [0]]),
    ],
)
def test_positions_count_each_prompts_own_tokens(positions: Any, expected: list[list[int]]) -> None:
    """As Python counts the elements of a list; a mask is over the prompt's own tokens too."""
    index = torch.tensor([[-1, 0, 1, 2, 3], [-1, -1, -1, 0, 1]])
    chosen = select(positions, index, torch.tensor([4, 2]))
    assert [row[mask].tolist() for row, mask in zip(index, chosen, strict=True)] == expected


@pytest.mark.parametrize(
    "positions", [slice(a, b, c) for a in (None, 0, 2, -3) for b in (None, 3, -1) for c in (None, 2)]
)
def test_slices_are_pythons(positions: slice) -> None:
    index, lengths = torch.tensor([[-1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]), torch.tensor([4, 6])
    chosen = select(positions, index, lengths)
    for row, mask, length in zip(index, chosen, lengths.tolist(), strict=True):
        assert row[mask].tolist() == list(range(length))[positions]


def test_generated_tokens_count_on_from_the_prompt() -> None:
    """Later forwards hold one column each; lengths stay those of the prompts."""
    lengths = torch.tensor([4, 2])
    step = torch.tensor([[5], [3]])
    assert select(None, step, lengths, True).all()
    assert not select("last", step, lengths, True).any()
    assert not select(-1, step, lengths, True).any()
    assert select(5, step, lengths, True).tolist() == [[True], [False]]
    assert select(slice(4, None), step, lengths, True).tolist() == [[True], [False]]
    assert not select(slice(None, -1), step, lengths, True).any()
