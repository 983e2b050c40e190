"""Interventions: small value objects that say where (site, positions, heads, channels) and what.

They compose as a list, applied in the order the model reaches their sites and, at one site, in the order of the list.
They travel to remote servers by value: plain classes, only torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from ..errors import BadInput
from .features import Feature
from .selection import aligned, restrict

if TYPE_CHECKING:
    from torch import Tensor

    from .selection import Columns, Positions


@runtime_checkable
class Direction(Protocol):
    """Anything with decoder directions: a dictionary's `W_dec` `(d_dict, d_out)`."""

    W_dec: Tensor


class Intervention:
    """Where an intervention acts; subclasses say what it does.

    Attributes:
        site: Address of the site.
        feature: The features of a dictionary that it is about, where one was given as the site (see
            `features.Feature`); ``None``: it is about the site itself.
        positions: Indices into each prompt's own tokens (see `selection.select`); ``None``: all, generated ones
            included.
        heads: Heads, for a site that has them; ``None``: all.
        channels: Indices into the last axis; ``None``: all.
    """

    def __init__(
        self, site: str | Feature, positions: Positions = None, heads: Any = None, channels: Any = None
    ) -> None:
        self.feature = site if isinstance(site, Feature) else None
        self.single = self.feature is not None and self.feature.single
        if self.feature is not None and (heads is not None or channels is not None):
            raise BadInput(
                f"{self.feature!r} is a direction over the whole site, so heads= and channels= say nothing here; leave "
                "them out, or intervene on the site itself."
            )
        self.site: str = site.site if isinstance(site, Feature) else site
        self.positions = positions
        self.heads = heads
        self.channels = channels

    def apply(self, value: Tensor, columns: Columns, address: str, axes: list[str]) -> Tensor:
        """What the selected entries become; same shape as `value`, which is in the site's canonical layout."""
        raise BadInput("Intervention says only where; use Set, Add, Scale, Ablate or Knockout.")

    def changed(self, value: Tensor, columns: Columns, address: str, axes: list[str]) -> Tensor:
        """`value` with this intervention applied where it is meant to be."""
        mask = restrict(columns, self.positions, value, self.heads, self.channels, address, axes)
        return torch.where(mask, self.apply(value, columns, address, axes).to(value.dtype), value)

    def fitted(self, given: Any, value: Tensor, columns: Columns, address: str, axes: list[str], what: str) -> Tensor:
        """A number or tensor that came with the intervention, over the whole site (see `selection.aligned`)."""
        given = torch.as_tensor(given)
        given = given[..., None] if self.single and given.dim() else given  # one feature has no axis of features
        return aligned(given, value, columns, columns.chosen(self.positions), address, axes, what)

    @property
    def counts(self) -> bool:
        """Whether it asks which token a column holds, rather than doing the same to every one."""
        return self.positions is not None

    def spans(self, given: Any) -> bool:
        """Whether what was given may have an axis of positions: a number or a vector over channels has none."""
        return torch.as_tensor(given).dim() > (0 if self.single else 1)

    def __repr__(self) -> str:
        hidden = ("site", "feature", "single")
        given = {k: v for k, v in self.__dict__.items() if v is not None and k not in hidden and not torch.is_tensor(v)}
        inside = "".join(f", {key}={value!r}" for key, value in given.items())
        where = self.site if self.feature is None else self.feature
        return f"{type(self).__name__}({where!r}{inside})"


def checked(given: Any, what: str) -> Any:
    """What was given, if it is numbers."""
    try:
        torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(f"The {what} of an intervention is a number or a tensor, not {given!r}.") from None
    return given


class Set(Intervention):
    """Replace entries by a value: a number, or a tensor that broadcasts over the site's shape.

    Its axes of positions, if it has any, count each prompt's own tokens, as what `capture` returns: setting a site to
    its own captured value changes nothing. So in `Add` and `Scale`.
    """

    def __init__(
        self, site: str | Feature, value: Any, positions: Positions = None, heads: Any = None, channels: Any = None
    ) -> None:
        Intervention.__init__(self, site, positions, heads, channels)
        self.value = checked(value, "value")

    def apply(self, value: Tensor, columns: Columns, address: str, axes: list[str]) -> Tensor:
        return self.fitted(self.value, value, columns, address, axes, "value")

    @property
    def counts(self) -> bool:
        """As in `Intervention`."""
        return self.positions is not None or self.spans(self.value)


class Add(Intervention):
    """Add `strength` times a vector: a number or a tensor that broadcasts over the site's shape."""

    def __init__(
        self,
        site: str | Feature,
        vector: Any,
        strength: Any = 1.0,
        positions: Positions = None,
        heads: Any = None,
        channels: Any = None,
    ) -> None:
        Intervention.__init__(self, site, positions, heads, channels)
        self.vector = checked(vector, "vector")
        self.strength = checked(strength, "strength")

    def apply(self, value: Tensor, columns: Columns, address: str, axes: list[str]) -> Tensor:
        return value + self.strength * self.fitted(self.vector, value, columns, address, axes, "vector")

    @property
    def counts(self) -> bool:
        """As in `Intervention`."""
        return self.positions is not None or self.spans(self.vector)


class Scale(Intervention):
    """Multiply entries by a factor: a number, or a tensor that broadcasts over the site's shape."""

    def __init__(
        self, site: str | Feature, factor: Any, positions: Positions = None, heads: Any = None, channels: Any = None
    ) -> None:
        Intervention.__init__(self, site, positions, heads, channels)
        self.factor = checked(factor, "factor")

    def apply(self, value: Tensor, columns: Columns, address: str, axes: list[str]) -> Tensor:
        return value * self.fitted(self.factor, value, columns, address, axes, "factor")

    @property
    def counts(self) -> bool:
        """As in `Intervention`."""
        return self.positions is not None or self.spans(self.factor)


class Ablate(Intervention):
    """Remove what a site carries.

    Args:
        mode: ``"zero"``: zeros. ``"mean"``: the mean over real tokens of `reference`, or of the prompts in this run.
            ``"resample"``: what another real token has, drawn with `seed` from `reference`, or from this run.
        strength: Share of the way to there; 1 is all of it, 2 goes as far again.
        reference: Activations of the site (for a feature too), `(n, t, ...)` or `(n_tokens, ...)`; needed for mean and
            resample while generating, where a run has one token at a time. NaN rows (padding in captured activations)
            are left out.
    """

    def __init__(
        self,
        site: str | Feature,
        mode: str = "zero",
        positions: Positions = None,
        heads: Any = None,
        channels: Any = None,
        reference: Tensor | None = None,
        seed: int = 0,
        strength: Any = 1.0,
    ) -> None:
        Intervention.__init__(self, site, positions, heads, channels)
        if mode not in ("zero", "mean", "resample"):
            raise BadInput(f'Ablate mode is "zero", "mean" or "resample", not {mode!r}.')
        self.mode = mode
        self.reference = reference
        self.seed = seed
        self.strength = checked(strength, "strength")

    @property
    def counts(self) -> bool:
        """As in `Intervention`: what is drawn for a token depends on which one it is."""
        return self.positions is not None or self.mode == "resample"

    @property
    def pools(self) -> bool:
        """Whether it is made of the activations of this run."""
        return self.mode != "zero" and self.reference is None

    def apply(self, value: Tensor, columns: Columns, address: str, axes: list[str]) -> Tensor:
        instead = self.instead(value, columns, address, axes)
        whole = not isinstance(self.strength, torch.Tensor) and self.strength == 1
        return instead if whole else value + self.strength * (instead - value)

    def instead(self, value: Tensor, columns: Columns, address: str, axes: list[str]) -> Tensor:
        """What would stand there if it were removed altogether."""
        if self.mode == "zero":
            return torch.zeros_like(value)
        if axes.count("t") == 2:
            raise BadInput(
                f"{address} is a matrix over positions, and prompts of different length have no {self.mode} of those "
                'in common; take mode="zero", or Set it to a matrix.'
            )
        pool = value[columns.real] if self.reference is None else self.pooled(value, address)
        return pool.mean(0).expand_as(value) if self.mode == "mean" else pool[self.draw(len(pool), columns)]

    def draw(self, count: int, columns: Columns) -> Tensor:
        """Which of `count` tokens each column gets: the same for a prompt's token whatever forward it comes in."""
        generator = torch.Generator().manual_seed(self.seed)
        # Drawn token by token, so that a longer table begins with the shorter one.
        table = torch.randint(count, (int(columns.index.max()) + 1, len(columns.index)), generator=generator)
        return table.T.to(columns.index.device).gather(1, columns.index.clamp(min=0))

    def pooled(self, value: Tensor, address: str) -> Tensor:
        """The reference as `(n_tokens, ...)`, padding left out."""
        assert self.reference is not None  # `apply` looked
        pool = self.reference.to(value.device, value.dtype)
        if pool.dim() == value.dim():
            pool = pool.flatten(0, 1)
        if pool.shape[1:] != value.shape[2:]:
            raise BadInput(
                f"{address} is {tuple(value.shape)} here; the reference, {tuple(self.reference.shape)}, has to end in "
                f"{tuple(value.shape[2:])}."
            )
        pool = pool[~pool.isnan().flatten(1).any(1)]
        if not len(pool):
            raise BadInput(f"{address}: the reference of {self!r} holds no token without NaN.")
        return pool

    def referring(self, reference: Tensor) -> Ablate:
        """The same with another reference."""
        where = (self.site, self.mode, self.positions, self.heads, self.channels)
        return Ablate(*where, reference, self.seed, self.strength)


class Knockout:
    """Remove what some source positions contribute to a scan's output at some destinations, exactly.

    y_t = Σ_s mixing[t, s]·x_s: the chosen terms are left out, by replaying the scan; the state itself, and the D skip,
    keep going. The counterpart of attention knockout.

    Args:
        site: Address of the mixer (``"layers.2.ssm"``) or of its y or mixing.
        sources: Positions whose contribution is removed.
        destinations: Positions it is removed from; ``None``: all.
        heads: Heads, where the scan has them; ``None``: all.
    """

    def __init__(
        self, site: str | Feature, sources: Positions, destinations: Positions = None, heads: Any = None
    ) -> None:
        if not isinstance(site, str):
            raise BadInput(
                f"A Knockout is about a scan's positions, named by its address, like 'layers.2.ssm', not by {site!r}."
            )
        self.site = site
        self.sources = sources
        self.destinations = destinations
        self.heads = heads
        self.positions = destinations
        self.counts = True  # as in `Intervention`

    def __repr__(self) -> str:
        pairs = f"sources={self.sources!r}, destinations={self.destinations!r}"
        return f"Knockout({self.site!r}, {pairs}, heads={self.heads!r})"
