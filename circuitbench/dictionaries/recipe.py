"""Everything that determines a trained dictionary besides its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.building import build, kind_of
from circuitbench.dictionaries.schedules import LR_SCHEDULES, annealed_k, learning_rate
from circuitbench.errors import BadInput

DECODER_NORMS = ("unit", "tangent", "free")
PRECISIONS = ("float32", "bfloat16")


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
        k_start: k at the first step, where it moves.

    The rest is as in `recipe` below.
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
    lr_schedule: str
    lr_warmup: float
    lr_decay: float
    k_start: int | None
    k_anneal: float
    seed: int
    dead_after: int
    resample_every: int | None
    resample_scale: float | None
    max_grad_norm: float | None
    decoder_norm: str
    dtype: str
    precision: str
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
        """Of a step: see `schedules.learning_rate`."""
        share = learning_rate(self.lr_schedule, step, self.steps, warmup=self.lr_warmup, decay=self.lr_decay)
        return self.lr * share

    def k_at(self, step: int) -> int | None:
        """k of a step; None for kinds without one."""
        k = self.settings.get("k")
        if self.k_start is None or k is None:
            return k
        return annealed_k(step, self.steps, start=self.k_start, end=k, share=self.k_anneal)

    def resamples_after(self, step: int) -> bool:
        """Whether dead features begin anew when `step` steps are done: every so often, while as many are left."""
        every = self.resample_every
        return every is not None and step % every == 0 and step + every <= self.steps

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
    lr_schedule: str = "linear",
    lr_warmup: float = 0.05,
    lr_decay: float | None = None,
    k_start: int | None = None,
    k_anneal: float = 0.5,
    seed: int = 0,
    dead_after: int | None = None,
    resample_every: int | None = None,
    resample_scale: float | None = None,
    max_grad_norm: float | None = None,
    decoder_norm: str = "unit",
    dtype: torch.dtype = torch.float32,
    precision: str = "float32",
    log_every: int | None = None,
    activations: str = "",
    **more: Any,
) -> Recipe:
    """A recipe from what a user gives, checked; what is left out is chosen (see `train`).

    Args:
        shapes: name -> width of the tensors that batches have.
        kind: of the dictionary.
        site: what is read, where there are several names.
        sites: several of them: a crosscoder.
        site_out: what a transcoder reconstructs.
        d_dict: number of features; or give
        expansion: d_dict / d_in.
        k: for kinds that fix the number of active features.
        skip: whether a transcoder has a linear path beside the features.
        steps: optimizer steps.
        batch_size: rows a step.
        lr: highest learning rate; 0.11 / √d_in if not given.
        lr_schedule: "linear", "cosine" or "constant".
        lr_warmup: share of the run over which the learning rate rises.
        lr_decay: share of the run over which it falls to 0; 0.8 if not given, and 0 for "constant".
        k_start: k at the first step; it moves in a straight line to `k`,
        k_anneal: which it reaches after this share of the run.
        seed: of the initial directions.
        dead_after: rows after which a feature that was not active counts as dead; a hundredth of the run if not given,
            and at most 10 million.
        resample_every: steps after which dead features begin anew where reconstruction is worst (`resampling`).
        resample_scale: length of their encoders, in units of the living ones'.
        max_grad_norm: gradients are shortened to this length, over all parameters together, where they are longer.
        decoder_norm: "unit", "tangent" or "free": decoder rows are put to length 1 after each step; so, and what would
            lengthen them taken out of the gradient before; or left as they come, and put to length 1 at the end.
        dtype: of parameters and moments, torch.float32 or torch.float64.
        precision: of the encoder's dense product: "float32" (the parameters' dtype) or "bfloat16". Kinds that choose
            the k largest choose by it, and what is chosen is computed again in the parameters' dtype.
        log_every: steps between entries of the history.
        activations: fingerprint of the data.
        more: settings and training options of the kind.

    Raises:
        BadInput: arguments out of range, contradictory, or not of this kind.
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
    if lr_schedule not in LR_SCHEDULES:
        raise BadInput(f"lr_schedule={lr_schedule!r} was given; it is one of {', '.join(map(repr, LR_SCHEDULES))}.")
    if lr_schedule == "constant" and lr_decay:
        raise BadInput(f"lr_decay={lr_decay} was given with lr_schedule='constant'; leave it out, or give 'linear'.")
    lr_decay = (0.0 if lr_schedule == "constant" else 0.8) if lr_decay is None else lr_decay
    for name, share in {"lr_warmup": lr_warmup, "lr_decay": lr_decay, "k_anneal": k_anneal}.items():
        if not 0 <= share <= 1:
            raise BadInput(f"{name}={share} was given; it is a share of the run, from 0 to 1.")
    for name, value in {"lr": lr, "max_grad_norm": max_grad_norm, "resample_scale": resample_scale}.items():
        if value is not None and not value > 0:
            raise BadInput(f"{name}={value} was given; it must be above 0.")
    if precision not in PRECISIONS or (precision == "bfloat16" and dtype != torch.float32):
        raise BadInput(
            f"precision={precision!r} was given with dtype={dtype}; it is one of {', '.join(map(repr, PRECISIONS))}, "
            "and 'bfloat16' goes with torch.float32."
        )
    if "k" in cls.settings_names:
        more["k"] = 32 if k is None else k
        if k_start is not None and not 1 <= k_start <= d_dict:
            raise BadInput(f"k_start={k_start} was given; it must lie between 1 and d_dict = {d_dict}.")
    elif k is not None or k_start is not None:
        raise BadInput(f"k={k}, k_start={k_start} was given; kind {kind!r} has no k" + _options_said(cls))
    more = {**cls.default_settings(d_dict), **more}
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
        options=cls.checked_options({name: more[name] for name in cls.training_options if name in more}),
        steps=positive("steps", steps),
        batch_size=batch_size,
        lr=0.11 / d_in**0.5 if lr is None else lr,
        lr_schedule=lr_schedule,
        lr_warmup=lr_warmup,
        lr_decay=lr_decay,
        k_start=k_start,
        k_anneal=k_anneal,
        seed=seed,
        dead_after=min(10_000_000, steps * batch_size // 100) if dead_after is None else dead_after,
        resample_every=None if resample_every is None else positive("resample_every", resample_every),
        resample_scale=resample_scale,
        max_grad_norm=max_grad_norm,
        decoder_norm=decoder_norm,
        dtype=str(dtype).removeprefix("torch."),
        precision=precision,
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
