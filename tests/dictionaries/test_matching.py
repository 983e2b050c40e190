"""Which features belong together: against all permutations, and against all pairs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from circuitbench.dictionaries import matching
from circuitbench.errors import BadInput


def test_an_assignment_is_as_good_as_the_best_of_all_permutations() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        n, m = torch.randint(1, 7, (2,), generator=generator).tolist()
        scores = torch.randn(n, m, generator=generator)
        if trial % 3 == 0:
            scores = scores.round()  # ties
        columns = matching.assign(scores).tolist()
        rows = [row for row, column in enumerate(columns) if column >= 0]
        assert len(rows) == len({columns[row] for row in rows}) == min(n, m)
        small = scores if n <= m else scores.T
        best = max(
            sum(small[row, column].item() for row, column in enumerate(order))
            for order in itertools.permutations(range(small.shape[1]), small.shape[0])
        )
        assert sum(scores[row, columns[row]].item() for row in rows) == pytest.approx(best, abs=1e-5)
    with pytest.raises(BadInput, match="finite scores"):
        matching.assign(torch.tensor([[float("nan")]]))


def test_mmcs_is_the_mean_of_the_largest_cosines() -> None:
    a, b = torch.randn(30, 8), torch.randn(50, 8)
    cosines = F.cosine_similarity(a.double()[:, None], b.double()[None], dim=2)
    assert matching.mmcs(a, b) == pytest.approx(cosines.amax(1).mean().item(), abs=1e-12)
    assert matching.mmcs(a, 3 * a[torch.randperm(30)]) == pytest.approx(1)
    assert matching.mmcs(torch.eye(4), -torch.eye(4)) == 0  # an opposite direction is not the same one
    with pytest.raises(BadInput, match=r"\(30, 8\) and \(50, 7\)"):
        matching.mmcs(a, b[:, 1:])
