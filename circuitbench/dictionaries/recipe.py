"""Everything that determines a trained dictionary besides its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.building import build, kind_of
from circuitbench.errors import BadInput

DECODER_NORMS = ("unit", "tangent", "free")


@dataclass(frozen=True)
class Recipe:
    """One dictionary to train.

    Attributes:
        reads: names of the tensors of a batch that are read, one after the other in a row; several: a crosscoder.
        writes: the one that is reconstructed; empty: what is read. Given: a transcoder.
        widths: of what is read, by name.
        d_out: of a transcoder.
        settings: of the kind, such as k.
        options: of its training, such as sparsity weights.
    """

    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    widths: Mapping[str, int]
    d_dict: int
    d_out: int | None
    skip: bool
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    steps: int
    batch_size: int
    lr: float
    lr_warmup: float
    lr_decay: float
    seed: int
    dead_after: int
    decoder_norm: str
    dtype: str
    log_every: int
    activations: str = field(default="")

    @property
    def d_in(self) -> int:
        """Size of what is read."""
        return sum(self.widths.values())

    def build(self) -> Dictionary:
        """The dictionary at its beginning."""
        return build(
            self.kind,
            d_in=self.d_in,
            d_dict=self.d_dict,
            d_out=self.d_out,
            skip=self.skip,
            blocks=self.widths if len(self.reads) > 1 else None,
            dtype=getattr(torch, self.dtype),
            seed=self.seed,
            **self.settings,
        )

    def learning_rate(self, step: int) -> float:
        """Of a step: up from 0 over the first `lr_warmup` of the run, down to 0 over the last `lr_decay`."""
        up = (step + 1) / max(1, int(self.steps * self.lr_warmup))
        down = (self.steps - step) / (self.lr_decay * self.steps) if self.lr_decay else 1.0
        return self.lr * min(1.0, up, down)

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it; settings and options beside the rest."""
        found = asdict(self)
        found |= found.pop("settings") | found.pop("options")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def recipe(
    shapes: Mapping[str, int],
    *,
    kind: str = "topk",
    site: str | None = None,
    sites: tuple[str, ...] | list[str] | None = None,
    site_out: str | None = None,
    d_dict: int | None = None,
    expansion: int | None = None,
    k: int | None = None,
    skip: bool = False,
    steps: int,
    batch_size: int,
    lr: float | None = None,
    lr_warmup: float = 0.05,
    lr_decay: float = 0.8,
    seed: int = 0,
    dead_after: int | None = None,
    decoder_norm: str = "unit",
    dtype: torch.dtype = torch.float32,
    log_every: int | None = None,
    activations: str = "",
    **more: Any,
) -> Recipe:
    """A recipe from what a user gives, checked; what is left out is chosen (see `train`).

    Args:
        shapes: name -> width of the tensors that batches have.
        more: settings and training options of the kind.
    """
    cls = kind_of(kind)
    reads, writes = _names(shapes, site, sites, site_out)
    if skip and not writes:
        raise BadInput("skip=True belongs to a transcoder; name what it reconstructs, site_out= (or targets=).")
    if (d_dict is None) == (expansion is None):
        raise BadInput(f"d_dict={d_dict} and expansion={expansion} were given; give one of them, such as expansion=8.")
    widths = {name: shapes[name] for name in reads}
    d_in = sum(widths.values())
    d_dict = d_in * positive("expansion", expansion or 0) if d_dict is None else d_dict
    if dtype not in (torch.float32, torch.float64):
        raise BadInput(f"dtype={dtype} was given; dictionaries train in torch.float32 or torch.float64.")
    if decoder_norm not in DECODER_NORMS:
        raise BadInput(f"decoder_norm={decoder_norm!r} was given; it is one of {', '.join(map(repr, DECODER_NORMS))}.")
    if not 0 <= lr_warmup <= 1 or not 0 <= lr_decay <= 1:
        raise BadInput(f"lr_warmup={lr_warmup} and lr_decay={lr_decay} are shares of the run, from 0 to 1.")
    if "k" in cls.settings_names:
        more["k"] = 32 if k is None else k
    elif k is not None:
        raise BadInput(f"k={k} was given; kind {kind!r} has no k" + _options_said(cls))
    unknown = set(more) - set(cls.settings_names) - set(cls.training_options)
    if unknown:
        raise BadInput(f"{', '.join(sorted(unknown))} is not an argument of kind {kind!r}" + _options_said(cls))
    return Recipe(
        kind=kind,
        reads=reads,
        writes=writes,
        widths=widths,
        d_dict=d_dict,
        d_out=shapes[writes[0]] if writes else None,
        skip=skip,
        settings={name: more[name] for name in cls.settings_names if name in more},
        options={name: more.get(name, default) for name, default in cls.training_options.items()},
        steps=positive("steps", steps),
        batch_size=batch_size,
        lr=0.11 / d_in**0.5 if lr is None else lr,
        lr_warmup=lr_warmup,
        lr_decay=lr_decay,
        seed=seed,
        dead_after=min(10_000_000, steps * batch_size // 100) if dead_after is None else dead_after,
        decoder_norm=decoder_norm,
        dtype=str(dtype).removeprefix("torch."),
        log_every=max(1, steps // 100) if log_every is None else positive("log_every", log_every),
        activations=activations,
    )


def _names(
    shapes: Mapping[str, int], site: str | None, sites: tuple[str, ...] | list[str] | None, site_out: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is read and what is written."""
    if site is not None and sites is not None:
        raise BadInput(f"site={site!r} and sites={list(sites)} were given; give one site, or several for a crosscoder.")
    if "x" in shapes and site is None and sites is None:
        reads: tuple[str, ...] = ("x",)
        writes: tuple[str, ...] = ("target",) if "target" in shapes else ()
    else:
        if site is None and sites is None and len(shapes) > 1:
            raise BadInput(f"the activations have several sites: {', '.join(shapes)}; say which one, site=.")
        reads = tuple(sites) if sites is not None else (site if site is not None else next(iter(shapes)),)
        writes = () if site_out is None else (site_out,)
    absent = [name for name in (*reads, *writes) if name not in shapes]
    if absent or not reads or len(set(reads)) != len(reads):
        raise BadInput(f"{', '.join(absent) or reads} cannot be had; the activations have: {', '.join(shapes)}.")
    return reads, writes


def _options_said(cls: type[Dictionary]) -> str:
    takes = [*cls.settings_names, *cls.training_options]
    return f"; it takes {', '.join(takes) or 'none'} besides what all kinds take."


def positive(name: str, value: int) -> int:
    """The value, if it is at least 1."""
    if value < 1:
        raise BadInput(f"{name}={value} was given; it must be at least 1.")
    return value
