"""Positions select what Python's indexing of each prompt's own tokens selects."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import circuitbench as cb
from circuitbench.errors import BadInput
from circuitbench.models.prompts import token_index
from circuitbench.tracing import capture
from circuitbench.tracing.selection import select

MASK = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
LENGTHS = [6, 3, 5]


def tokens_selected(positions: Any, growing: bool = False) -> list[list[int]]:
    """Token indices that are selected, prompt by prompt."""
    index = token_index(MASK)
    chosen = select(positions, index, MASK.sum(1), growing)
    return [row[kept].tolist() for row, kept in zip(index, chosen, strict=True)]


@pytest.mark.parametrize("step", [None, 1, 2, 3])
def test_slices_are_pythons(step: int | None) -> None:
    ends = [None, -9, -6, -4, -3, -1, 0, 1, 2, 4, 6, 9]
    for start, stop in product(ends, ends):
        positions = slice(start, stop, step)
        wanted = [list(range(length))[positions] for length in LENGTHS]
        if any(wanted):
            assert tokens_selected(positions) == wanted, positions
        else:
            with pytest.raises(BadInput, match="selects no token"):
                tokens_selected(positions)
        assert tokens_selected(positions, growing=True) == wanted, positions


@pytest.mark.parametrize("positions", [[], torch.zeros(3, 6, dtype=torch.bool), slice(6, None)], ids=str)
def test_an_empty_selection_is_refused_unless_tokens_may_follow(positions: Any) -> None:
    with pytest.raises(BadInput, match="selects no token"):
        tokens_selected(positions)
    assert tokens_selected(positions, growing=True) == [[], [], []]


@pytest.mark.parametrize("step", [0, -1])
def test_slices_go_forward(step: int) -> None:
    with pytest.raises(BadInput, match="step"):
        tokens_selected(slice(None, None, step))


@pytest.mark.parametrize("shape", [(3, 5), (2, 6), (4,), (3, 6, 1)])
def test_a_mask_is_as_wide_as_the_longest_prompt(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="n=6"):
        tokens_selected(torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("width", [6, 8])
def test_a_mask_counts_each_prompts_own_tokens(width: int) -> None:
    mask = torch.zeros(3, width, dtype=torch.bool)
    mask[0, 5] = mask[1, 0] = mask[1, 2] = mask[2, 4] = True
    assert tokens_selected(mask) == [[5], [0, 2], [4]]


@pytest.mark.parametrize("positions", [[-1, 0], [2, 2, -3], torch.tensor([1, 0]), range(2, -1, -1), -2], ids=str)
def test_capture_keeps_the_order_and_the_repetitions_asked_for(positions: Any) -> None:
    model, site = cb.load_model("random:mamba2"), "layers.1.ssm.y"
    prompts = [[5, 17, 3, 44, 9, 21], [7, 8, 9]]
    full, found = capture(model, prompts, site)[site], capture(model, prompts, site, positions=positions)
    order = list(positions) if not isinstance(positions, int) else [positions]
    for number, length in enumerate((6, 3)):
        torch.testing.assert_close(found[site][number], full[number, :length][torch.as_tensor(order)])
    assert torch.equal(found.tokens(site), found[site].flatten(0, 1))
