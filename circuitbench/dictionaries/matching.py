"""Which features of two dictionaries, or of a dictionary and a known truth, belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_ROWS = 2048  # of a matrix of cosines at once


def max_cosines(
    directions: Float[Tensor, "n d"], among: Float[Tensor, "m d_among"]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """For each direction the largest cosine with one of `among`, sign kept, and which one that is; blockwise."""
    _check_directions(directions, among)
    units = F.normalize(among.double(), dim=1)
    best = [(F.normalize(rows.double(), dim=1) @ units.T).max(1) for rows in directions.split(_ROWS)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def mmcs(directions: Float[Tensor, "n d"], among: Float[Tensor, "m d_among"]) -> float:
    """Mean max cosine similarity: for each direction the largest cosine with one of `among`, the mean over directions.

    Not symmetric: `mmcs(truth, decoder)` asks whether everything true was found, the other way round whether
    everything found is true. (Sharkey et al. 2022; of two dictionaries' decoders, how far they agree.)

    Raises:
        BadInput: directions of different sizes, or none.
    """
    return max_cosines(directions.detach(), among.detach())[0].mean().item()


def _check_directions(directions: Tensor, among: Tensor) -> None:
    if directions.shape[1] != among.shape[1] or not len(directions) or not len(among):
        raise BadInput(
            f"directions of shapes {tuple(directions.shape)} and {tuple(among.shape)} were given; both must be "
            "(features, d) with the same d and at least one feature."
        )


def assign(scores: Float[Tensor, "n m"]) -> Int[Tensor, " n"]:
    """The one-to-one assignment of rows to columns with the largest sum of scores; −1 for a row that gets none.

    All rows get a column where n ≤ m, all columns a row otherwise. Exact: the shortest augmenting paths of Jonker and
    Volgenant (1987), O(n² m).

    Raises:
        BadInput: scores that are not finite.
    """
    if not torch.isfinite(scores).all():
        raise BadInput("an assignment needs finite scores; these hold NaN or infinite ones.")
    n, m = scores.shape
    if n > m:
        row_of = assign(scores.T)
        chosen = torch.full((n,), -1, dtype=torch.int64, device=scores.device)
        chosen[row_of] = torch.arange(m, device=scores.device)
        return chosen
    return torch.from_numpy(_shortest_paths(-scores.detach().double().cpu().numpy())).to(scores.device)


def _shortest_paths(cost: np.ndarray) -> np.ndarray:
    """The assignment of rows to columns of least cost, n ≤ m, by duals u, v with cost − u − v ≥ 0, 0 where assigned."""
    n, m = cost.shape
    column_of, row_of = np.full(n, -1), np.full(m, -1)
    u, v = cost.min(1), np.zeros(m)
    for row, column in enumerate(cost.argmin(1)):  # rows whose favourite is free need no path
        if row_of[column] < 0:
            column_of[row], row_of[column] = column, row
    for start in np.flatnonzero(column_of < 0):
        # Dijkstra over columns, in reduced costs, until a free one is reached.
        distance, before = np.full(m, np.inf), np.full(m, -1)
        done, reached = np.zeros(m, dtype=bool), np.zeros(n, dtype=bool)
        row, length = start, 0.0
        while True:
            reached[row] = True
            through = length + cost[row] - u[row] - v
            shorter = (through < distance) & ~done
            distance[shorter], before[shorter] = through[shorter], row
            column = int(np.where(done, np.inf, distance).argmin())
            length = distance[column]
            if row_of[column] < 0:
                break
            done[column] = True
            row = row_of[column]
        others = np.flatnonzero(reached)
        others = others[others != start]
        u[start] += length
        u[others] += length - distance[column_of[others]]
        v[done] -= length - distance[done]
        while True:  # along the path, every row takes the column through which it was left
            row = before[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
            if row == start:
                break
    return column_of
