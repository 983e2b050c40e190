"""Interventions: small value objects that say where (site, positions, heads, channels) and what.

They compose as a list, applied in the order the model reaches their sites and, at one site, in the order of the list.
They travel to remote servers by value: plain classes, only torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from ..errors import BadInput
from .selection import restrict, select

if TYPE_CHECKING:
    from torch import Tensor

    from .selection import Positions


@runtime_checkable
class Direction(Protocol):
    """Anything with decoder directions: a dictionary's `W_dec` `(d_dict, d_out)`."""

    W_dec: Tensor


class Intervention:
    """Where an intervention acts; subclasses say what it does.

    Attributes:
        site: Address of the site.
        positions: Indices into each prompt's own tokens (see `selection.select`); ``None``: all, generated ones
            included.
        heads: Heads, for a site that has them; ``None``: all.
        channels: Indices into the last axis; ``None``: all.
    """

    def __init__(self, site: str, positions: Positions = None, heads: Any = None, channels: Any = None) -> None:
        self.site = site
        self.positions = positions
        self.heads = heads
        self.channels = channels

    def apply(self, value: Tensor, real: Tensor, address: str) -> Tensor:
        """What the selected entries become; same shape as `value`. `real` `(b, t)` marks real tokens."""
        raise TypeError("Intervention says only where; use Set, Add, Scale, Ablate or Knockout.")

    def changed(
        self, value: Tensor, index: Tensor, lengths: Tensor, address: str, has_heads: bool, growing: bool
    ) -> Tensor:
        """`value` with this intervention applied where it is meant to be."""
        chosen = select(self.positions, index, lengths, growing)
        mask = restrict(chosen, value, self.heads, self.channels, address, has_heads)
        return torch.where(mask, self.apply(value, index >= 0, address).to(value.dtype), value)

    def __repr__(self) -> str:
        given = {
            k: v for k, v in self.__dict__.items() if v is not None and k != "site" and not isinstance(v, torch.Tensor)
        }
        inside = "".join(f", {key}={value!r}" for key, value in given.items())
        return f"{type(self).__name__}({self.site!r}{inside})"


def broadcast(given: Any, value: Tensor, address: str, what: str) -> Tensor:
    """A number or tensor as a tensor that broadcasts over `value`."""
    given = torch.as_tensor(given).to(value.device, value.dtype)
    try:
        return given.expand_as(value)
    except RuntimeError:
        raise BadInput(
            f"{address} is {tuple(value.shape)} here; the {what} given is {tuple(given.shape)}, which does not "
            "broadcast over it (its last axes have to fit)."
        ) from None


class Set(Intervention):
    """Replace entries by a value: a number, or a tensor that broadcasts over the site's `(b, t, ...)`."""

    def __init__(
        self, site: str, value: Any, positions: Positions = None, heads: Any = None, channels: Any = None
    ) -> None:
        Intervention.__init__(self, site, positions, heads, channels)
        self.value = value

    def apply(self, value: Tensor, real: Tensor, address: str) -> Tensor:
        return broadcast(self.value, value, address, "value")


class Add(Intervention):
    """Add `strength` times a vector: a number or a tensor that broadcasts over the site's `(b, t, ...)`."""

    def __init__(
        self,
        site: str,
        vector: Any,
        strength: float = 1.0,
        positions: Positions = None,
        heads: Any = None,
        channels: Any = None,
    ) -> None:
        Intervention.__init__(self, site, positions, heads, channels)
        self.vector = vector
        self.strength = strength

    def apply(self, value: Tensor, real: Tensor, address: str) -> Tensor:
        return value + self.strength * broadcast(self.vector, value, address, "vector")


class Scale(Intervention):
    """Multiply entries by a factor: a number, or a tensor that broadcasts over the site's `(b, t, ...)`."""

    def __init__(
        self, site: str, factor: Any, positions: Positions = None, heads: Any = None, channels: Any = None
    ) -> None:
        Intervention.__init__(self, site, positions, heads, channels)
        self.factor = factor

    def apply(self, value: Tensor, real: Tensor, address: str) -> Tensor:
        return value * broadcast(self.factor, value, address, "factor")


class Ablate(Intervention):
    """Remove what a site carries.

    Args:
        mode: ``"zero"``: zeros. ``"mean"``: the mean over real tokens of `reference`, or of the prompts in this run.
            ``"resample"``: what another real token has, drawn with `seed` from `reference`, or from this run.
        reference: Activations of the site, `(n, t, ...)` or `(n_tokens, ...)`; needed for mean and resample while
            generating, where a run has one token at a time. NaN rows (padding in captured activations) are left out.
    """

    def __init__(
        self,
        site: str,
        mode: str = "zero",
        positions: Positions = None,
        heads: Any = None,
        channels: Any = None,
        reference: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        Intervention.__init__(self, site, positions, heads, channels)
        if mode not in ("zero", "mean", "resample"):
            raise BadInput(f'Ablate mode is "zero", "mean" or "resample", not {mode!r}.')
        self.mode = mode
        self.reference = reference
        self.seed = seed

    def apply(self, value: Tensor, real: Tensor, address: str) -> Tensor:
        if self.mode == "zero":
            return torch.zeros_like(value)
        pool = value[real] if self.reference is None else self.pooled(value, address)
        if self.mode == "mean":
            return pool.mean(0).expand_as(value)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(len(pool), value.shape[:2], generator=generator).to(value.device)
        return pool[drawn]

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
        return pool[~pool.isnan().flatten(1).any(1)]


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

    def __init__(self, site: str, sources: Positions, destinations: Positions = None, heads: Any = None) -> None:
        self.site = site
        self.sources = sources
        self.destinations = destinations
        self.heads = heads
        self.positions = destinations

    def __repr__(self) -> str:
        pairs = f"sources={self.sources!r}, destinations={self.destinations!r}"
        return f"Knockout({self.site!r}, {pairs}, heads={self.heads!r})"
