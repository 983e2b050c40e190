"""Activations with known sparse features: the ground truth that a dictionary should recover.

A row is x = Σᵢ aᵢ dᵢ + b + noise: few features are active (aᵢ > 0), each with a unit direction dᵢ. What makes real
activations hard to decompose can be turned on one by one: more features than dimensions (superposition), rare features
beside frequent ones, features that fire together (correlation), features that fire only where another does (hierarchy:
what makes a dictionary absorb a parent into its children, Chanin et al. 2024, arXiv:2409.14507), and a large mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitbench.dictionaries.comparison import Comparison, compare
from circuitbench.dictionaries.recovery import Scores, score
from circuitbench.errors import BadInput

__all__ = ["NO_PARENT", "Comparison", "Scores", "Stream", "Truth", "compare", "score"]

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

NO_PARENT = -1


class Truth:
    """A distribution of activations whose features are known. The same settings and seed give the same one anywhere.

    Features are in an order: the top of the hierarchy first, then its children level by level, then all others;
    within a level the more frequent ones first.

    Attributes:
        directions: `(n_features, d_in)`, unit rows.
        probability: `(n_features,)`, how often each is active; float64.
        parent: `(n_features,)`, the feature without which it is never active; −1 where there is none.
        group: `(n_features,)`, the group whose members fire together; −1 for children, which follow their parents.
        offset: `(d_in,)`, b.
        settings: what it was made with.
    """

    def __init__(
        self,
        *,
        d_in: int,
        n_features: int,
        l0: float,
        frequency: Literal["uniform", "zipf"] = "uniform",
        exponent: float = 1.0,
        magnitudes: tuple[float, float] = (0.5, 1.5),
        correlation: float = 0.0,
        group_size: int = 8,
        hierarchy: tuple[int, ...] = (),
        child_share: float = 0.8,
        shift: float = 0.0,
        noise: float = 0.0,
        spread_steps: int = 0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """
        Args:
            d_in: size of a row.
            n_features: true features; more than `d_in` is superposition.
            l0: features active on a row, the mean over rows, children included.
            frequency: "uniform": all alike. "zipf": the r-th most frequent one in proportion to r^−exponent.
            exponent: of "zipf".
            magnitudes: (low, high): an active feature's activation is uniform between them.
            correlation: of the normal variables behind any two features of a group, in [0, 1); a feature is active
                where its variable is above its threshold (a Gaussian copula), so frequencies stay what they were.
            group_size: features in a group.
            hierarchy: (8, 4, 3): 8 features have 4 children each, each of which has 3; () is none.
            child_share: how often an active parent has an active child; it never has two, and all are equally likely.
            shift: length of b.
            noise: standard deviation of what is added to every component.
            spread_steps: steps of gradient descent that push the directions apart; 0: random ones.
            seed: of everything that is drawn here.
            dtype: of rows and activations.
            device: of rows and activations.

        Raises:
            BadInput: a setting out of range, or an `l0` that would have a feature active more often than always.
        """
        self.settings: dict[str, Any] = {key: value for key, value in locals().items() if key != "self"}
        _check(**self.settings)
        self.dtype, self.device, self.seed = dtype, torch.device(device), seed
        self.magnitudes, self.noise = magnitudes, noise
        self.correlation, self.child_share = correlation, child_share

        self.levels, n_tree = _levels(hierarchy)
        if n_tree > n_features - (not hierarchy):
            raise BadInput(f"hierarchy={hierarchy} has {n_tree} features, more than n_features={n_features}.")
        self.parent = torch.full((n_features,), NO_PARENT)
        for level in self.levels:
            self.parent[level.children] = level.parents.repeat_interleave(level.siblings)
        self.roots = (self.parent == NO_PARENT).nonzero().squeeze(1)
        n_groups = -(-len(self.roots) // group_size)
        self.group = torch.full((n_features,), -1)
        self.group[self.roots] = torch.arange(len(self.roots)) % n_groups  # frequent and rare ones in every group
        self.probability = self._probabilities(l0, frequency, exponent)

        generator = torch.Generator().manual_seed(_mixed(seed, "directions"))
        directions = F.normalize(torch.randn(n_features, d_in, generator=generator, dtype=torch.float64), dim=1)
        offset = F.normalize(torch.randn(d_in, generator=generator, dtype=torch.float64), dim=0) * shift
        self.directions = _spread(directions, spread_steps).to(self.device, dtype)
        self.offset = offset.to(self.device, dtype)
        # In double precision on the CPU: a rare feature's threshold is far out in the tail.
        self._thresholds = torch.special.ndtri(1 - self.probability[self.roots]).to(self.device, torch.float32)
        self._groups = self.group[self.roots].to(self.device)

    @property
    def d_in(self) -> int:
        """Size of a row."""
        return self.directions.shape[1]

    @property
    def n_features(self) -> int:
        """Number of true features."""
        return len(self.directions)

    def with_seed(self, seed: int) -> Truth:
        """The same settings with another draw of directions and offset."""
        settings: dict[str, Any] = self.settings | {"seed": seed}
        return Truth(**settings)

    def __repr__(self) -> str:
        return f"Truth({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    def sample(self, n: int, seed: int = 0) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_features"]]:
        """`n` rows, and the activations of the true features on them; the same ones for a seed, on one kind of device.

        Raises:
            BadInput: n is less than 1.
        """
        if n < 1:
            raise BadInput(f"n={n} rows were asked for; it must be at least 1.")
        generator = torch.Generator(self.device).manual_seed(_mixed(self.seed, "rows", seed))
        low, high = self.magnitudes
        on = self._on(n, generator)
        activations = torch.rand(n, self.n_features, generator=generator, device=self.device, dtype=self.dtype)
        activations = activations.mul_(high - low).add_(low).mul_(on)
        x = activations @ self.directions + self.offset
        if self.noise:
            x += self.noise * torch.randn(x.shape, generator=generator, device=self.device, dtype=self.dtype)
        return x, activations

    def stream(self, batch_size: int = 4096, *, seed: int = 0, n_batches: int | None = None) -> Stream:
        """Batches of rows without their activations, for training; without end where `n_batches` is not given."""
        if batch_size < 1 or (n_batches is not None and n_batches < 1):
            raise BadInput(f"batch_size={batch_size}, n_batches={n_batches} were given; both must be at least 1.")
        return Stream(self, batch_size, seed, n_batches)

    def _probabilities(self, l0: float, frequency: str, exponent: float) -> Float[Tensor, " n_features"]:
        p = torch.zeros(len(self.parent), dtype=torch.float64)
        ranks = torch.arange(1, len(self.roots) + 1, dtype=torch.float64)
        p[self.roots] = ranks**-exponent if frequency == "zipf" else torch.ones_like(ranks)
        for level in self.levels:
            p[level.children] = (p[level.parents] * self.child_share / level.siblings).repeat_interleave(level.siblings)
        p *= l0 / p.sum()
        if p.max() >= 1:
            raise BadInput(
                f"l0={l0} over {len(p)} features would have the most frequent one active on {p.max():.0%} of the rows; "
                "give a smaller l0 or exponent, or more features."
            )
        return p

    def _on(self, n: int, generator: torch.Generator) -> Bool[Tensor, "n n_features"]:
        """Which features are active."""
        z = torch.randn(n, len(self.roots), generator=generator, device=self.device)
        if self.correlation:
            common = torch.randn(n, int(self._groups.max()) + 1, generator=generator, device=self.device)
            z = (1 - self.correlation) ** 0.5 * z + self.correlation**0.5 * common[:, self._groups]
        on = torch.zeros(n, self.n_features, dtype=torch.bool, device=self.device)
        on[:, self.roots.to(self.device)] = z > self._thresholds
        for level in self.levels:
            # One number for a parent decides which child is active, or that none is.
            share = torch.rand(n, len(level.parents), generator=generator, device=self.device) / self.child_share
            chosen = (share * level.siblings).long().clamp_max(level.siblings)
            picked = F.one_hot(chosen, level.siblings + 1)[..., : level.siblings].bool()
            first, last = int(level.children[0]), int(level.children[-1]) + 1
            above = on[:, int(level.parents[0]) : int(level.parents[-1]) + 1]
            on[:, first:last] = (picked & above.unsqueeze(2)).flatten(1)
        return on


class Stream:
    """Rows of a truth in batches `(batch_size, d_in)`: the same ones every time it is read."""

    def __init__(self, truth: Truth, batch_size: int, seed: int, n_batches: int | None) -> None:
        self.truth, self.batch_size, self.seed, self.n_batches = truth, batch_size, seed, n_batches

    def __iter__(self) -> Iterator[Float[Tensor, "batch_size d_in"]]:
        batch = 0
        while self.n_batches is None or batch < self.n_batches:
            yield self.truth.sample(self.batch_size, _mixed(self.seed, "batch", batch))[0]
            batch += 1


class Level(NamedTuple):
    """Two levels of a hierarchy: `siblings` children for each of the parents, in the parents' order."""

    parents: Tensor
    children: Tensor
    siblings: int


def _levels(hierarchy: tuple[int, ...]) -> tuple[list[Level], int]:
    """The levels of a hierarchy, and how many features it has."""
    levels, first, count = [], 0, hierarchy[0] if hierarchy else 0
    for siblings in hierarchy[1:]:
        below = first + count
        parents, children = torch.arange(first, below), torch.arange(below, below + count * siblings)
        levels.append(Level(parents, children, siblings))
        first, count = below, count * siblings
    return levels, first + count


def _spread(directions: Float[Tensor, "n d"], steps: int) -> Float[Tensor, "n d"]:
    """Unit directions pushed apart: gradient descent on the sum of the fourth powers of their cosines."""
    for _ in range(steps):
        cosines = (directions @ directions.T).fill_diagonal_(0)
        push = cosines.pow(3) @ directions
        push = push - (push * directions).sum(1, keepdim=True) * directions
        longest = push.norm(dim=1).max().clamp_min(torch.finfo(push.dtype).tiny)
        # The cubes are tiny where the cosines are small: the scale of what is left to move is the largest cosine.
        directions = F.normalize(directions - cosines.abs().max() / 4 * push / longest, dim=1)
    return directions


def _mixed(*parts: int | str) -> int:
    """One seed of several."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _check(
    *,
    d_in: int,
    n_features: int,
    l0: float,
    frequency: str,
    exponent: float,
    magnitudes: tuple[float, float],
    correlation: float,
    group_size: int,
    hierarchy: tuple[int, ...],
    child_share: float,
    noise: float,
    shift: float,
    spread_steps: int,
    **_: Any,
) -> None:
    """Refuse what is out of range, naming it."""
    low, high = magnitudes
    for name, value, allowed, meets in [
        ("d_in", d_in, "at least 1", d_in >= 1),
        ("n_features", n_features, "at least 1", n_features >= 1),
        ("l0", l0, "more than 0", l0 > 0),
        ("frequency", frequency, '"uniform" or "zipf"', frequency in ("uniform", "zipf")),
        ("exponent", exponent, "0 or more", exponent >= 0),
        ("magnitudes", magnitudes, "(low, high) with 0 < low <= high", 0 < low <= high),
        ("correlation", correlation, "in [0, 1)", 0 <= correlation < 1),
        ("group_size", group_size, "at least 1", group_size >= 1),
        ("hierarchy", hierarchy, "(parents, children of each, …), all at least 1", all(h >= 1 for h in hierarchy)),
        ("child_share", child_share, "in (0, 1]", 0 < child_share <= 1),
        ("shift", shift, "0 or more", shift >= 0),
        ("noise", noise, "0 or more", noise >= 0),
        ("spread_steps", spread_steps, "0 or more", spread_steps >= 0),
    ]:
        if not meets:
            raise BadInput(f"{name}={value!r} was given; it must be {allowed}.")
