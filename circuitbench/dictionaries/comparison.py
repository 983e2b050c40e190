"""Kinds of dictionaries compared on a known truth; what is here is handed on by `dictionaries.synthetic`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from circuitbench.dictionaries.building import kind_of
from circuitbench.dictionaries.recovery import Scores, score
from circuitbench.dictionaries.training import train_many
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from circuitbench.dictionaries.synthetic import Truth

_SHOWN = ("mmcs", "recovered", "f1", "fvu", "l0", "dead_share", "shrinkage", "absorption")


@dataclass(frozen=True)
class Comparison:
    """Scores by label, one for each seed.

    Attributes:
        scores: label -> the scores of its dictionaries, in the order of `seeds`.
        seeds: of the truths, and of the training on them.
    """

    scores: Mapping[str, Sequence[Scores]]
    seeds: Sequence[int]

    def values(self, label: str, name: str) -> list[float]:
        """One score of all seeds, such as `values("topk", "mmcs")`."""
        return [getattr(scores, name) for scores in self.scores[label]]

    def mean(self, label: str, name: str) -> float:
        """The mean over seeds."""
        values = self.values(label, name)
        return sum(values) / len(values)

    def spread(self, label: str, name: str) -> float:
        """The standard deviation over seeds (n − 1); NaN for one seed."""
        values, mean = self.values(label, name), self.mean(label, name)
        if len(values) < 2:
            return float("nan")
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))

    def to_dict(self) -> dict[str, Any]:
        """Every score of every seed, as JSON takes it; NaN becomes None."""
        return {
            "seeds": list(self.seeds),
            "scores": {
                label: [{k: None if v != v else v for k, v in asdict(one).items()} for one in scores]
                for label, scores in self.scores.items()
            },
        }

    def table(self, names: Iterable[str] = _SHOWN) -> str:
        """A Markdown table: mean ± spread, one line a label; scores that nobody has are left out."""
        shown = [name for name in names if any(v == v for label in self.scores for v in self.values(label, name))]
        lines = ["| | " + " | ".join(shown) + " |", "|" + "---|" * (len(shown) + 1)]
        lines += [
            f"| {label} | " + " | ".join(self._cell(label, name) for name in shown) + " |" for label in self.scores
        ]
        return "\n".join(lines)

    def _cell(self, label: str, name: str) -> str:
        mean, spread = self.mean(label, name), self.spread(label, name)
        if mean != mean:
            return "–"
        digits = 1 if abs(mean) >= 10 else 3
        return f"{mean:.{digits}f}" + ("" if spread != spread else f" ± {spread:.{digits}f}")

    def __str__(self) -> str:
        return self.table()


def compare(
    kinds: Sequence[str] | Mapping[str, Mapping[str, Any]],
    truth: Truth,
    *,
    d_dict: int,
    l0: float | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 1000,
    batch_size: int = 1024,
    n: int = 16_384,
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Train each kind on the same rows, at the same sparsity, and score it; once for each seed.

    A seed draws new directions of the truth, new rows and new initial dictionaries: the spread is over all three.
    Within a seed all kinds see the same rows in the same order.

    Args:
        kinds: names of kinds; or label -> what `train` takes for that one, `kind` being the label where it is not
            given: `{"topk": {}, "topk, no AuxK": {"kind": "topk", "auxk_weight": 0.0}}`.
        truth: the truth.
        d_dict: features of each dictionary.
        l0: features active on a row; that of the truth if not given. Kinds with k take the nearest integer, the others
            steer their sparsity weight to it; what came out is among the scores.
        seeds: at least one.
        steps: optimizer steps.
        batch_size: rows a step; every row is fresh.
        n: rows that are scored.
        progress: show progress bars.
        **settings: for all kinds: what `train` takes, such as `lr`.

    Raises:
        BadInput: no kind, no seed, a seed twice, or what `train` refuses.
    """
    given: Mapping[str, Mapping[str, Any]] = kinds if isinstance(kinds, Mapping) else {kind: {} for kind in kinds}
    if not given or not seeds or len(set(seeds)) != len(seeds):
        raise BadInput(
            f"kinds={list(given)} and seeds={list(seeds)} were given; give at least one of each, none twice."
        )
    target = truth.settings["l0"] if l0 is None else l0
    recipes = []
    for label, own in given.items():
        recipe = {"kind": label, "d_dict": d_dict, **settings, **own}
        has_k = "k" in kind_of(recipe["kind"]).settings_names
        if not {"k", "l0", "sparsity"} & set(recipe):
            recipe |= {"k": max(1, round(target))} if has_k else {"l0": float(target)}
        recipes.append(recipe)
    scores: dict[str, list[Scores]] = {label: [] for label in given}
    for seed in seeds:
        drawn = truth.with_seed(seed)
        results = train_many(
            drawn.stream(batch_size, seed=seed),
            recipes,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
        for label, result in zip(given, results, strict=True):
            scores[label].append(score(result.dictionary, drawn, n=n))
    return Comparison(scores, list(seeds))
