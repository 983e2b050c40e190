"""Applying interventions inside a running trace. Everything here travels to remote servers by value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadInput
from ..models.starting import shared
from .addresses import axes_by_address, read_site, write_site
from .interventions import Ablate, Knockout
from .selection import Columns

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from ..models import Model
    from .interventions import Intervention

Plan = (
    list  # of (address, interventions there, whether the site's value is wanted), in the order the model reaches them
)


def run_plan(model: Model, plan: Plan, columns: Columns, keep: Int[Tensor, "b k"] | None = None) -> dict[str, Tensor]:
    """Apply interventions and read sites, in forward order; returns what was read, by address.

    Args:
        model: The model.
        plan: What to do at which site.
        columns: Which of each prompt's own tokens the columns hold.
        keep: Keep only these columns of what is read.
    """
    out: dict[str, Tensor] = {}
    for address, interventions, wanted in plan:
        apply_at(model, address, interventions, columns)
        if wanted:
            out[address] = read_columns(model, address, keep).detach()
    return out


def read_columns(model: Model, address: str, keep: Tensor | None) -> Tensor:
    """A site in the prompts' own columns, or in some of them; the state is then never whole in memory."""
    axes = axes_by_address(model, address)
    meta = 0 if address == "logits" else model.meta_tokens
    first = axes.index("t")
    if keep is not None and address.endswith(".ssm.state"):
        _, layer, _ = address.split(".", 2)
        keep = keep + meta
        picked: list[Any] = [None] * keep.numel()
        for start, states in model.layers[int(layer)].ssm.iter_state():
            for place, column in enumerate(keep.flatten().tolist()):
                if start <= column < start + states.shape[1]:
                    picked[place] = states[place // keep.shape[1], column - start].clone()
        return torch.stack(picked).unflatten(0, tuple(keep.shape))
    value = read_site(model, address)
    if meta:
        # A run that goes on from a state has the meta tokens behind it, among its keys alone.
        resumed = "before" in shared(model)
        cut = [meta if name == "t" and not (resumed and axis == first) else 0 for axis, name in enumerate(axes)]
        value = value[tuple(slice(columns, None) for columns in cut)]
    if keep is None:
        return value
    value = value.movedim(first, 1)
    rows = torch.arange(len(value), device=value.device)[:, None]
    return value[rows, keep.to(value.device)].movedim(1, first)


def apply_at(model: Model, address: str, interventions: list[Any], columns: Columns) -> None:
    """Apply all interventions at one site."""
    others = []
    for item in interventions:
        if isinstance(item, Knockout):
            knock_out(model, address, item, columns)
        else:
            others.append(item)
    if not others:
        return
    if address.endswith(".ssm.state"):
        edit_states(model, address, others, columns)
        return
    axes = axes_by_address(model, address)
    value = read_site(model, address)
    if address == "logits" and value.shape[1] < columns.index.shape[1]:
        columns = columns.last(value.shape[1])  # no meta tokens; and ``generate`` asks for the last ones alone
    before = value
    for item in others:
        value = item.changed(value, columns, address, axes)
    if value is not before:  # a transcoder's edit only reads where it encodes
        write_site(model, address, value)


def edit_states(model: Model, address: str, items: list[Intervention], columns: Columns) -> None:
    """Interventions on h_t: the recurrence is run again with the state edited where each prompt's position is."""
    axes = axes_by_address(model, address)
    _, layer, _ = address.split(".", 2)
    view = model.layers[int(layer)].ssm
    for item in items:
        chosen = columns.chosen(item.positions).any(0).nonzero().flatten().tolist()
        if chosen and isinstance(item, Ablate) and item.pools:
            if "scale" in view.sites:
                raise BadInput(
                    f"{address} is kept in a unit of its own at every position (exp of ssm.scale), so states of other "
                    'positions cannot stand in for it; use mode="zero", or circuits.ablation_effects, which converts.'
                )
            item = item.referring(pool_of(view, item.mode, columns))
        if chosen:
            view.edit_state({c: edit_of(item, columns.only(c), address, axes) for c in chosen}, states=False)


def pool_of(view: Any, mode: str, columns: Columns) -> Tensor:
    """The states of all real tokens of this run `(n, ...)`, or their mean `(1, ...)`, before they are ablated."""
    real = columns.real
    if mode == "resample":
        states = view.state
        return states[real.to(states.device)]
    total: Any = 0
    for start, states in view.iter_state():
        chunk = states[real[:, start : start + states.shape[1]].to(states.device)]
        total = total + chunk.sum(0)
    return (total / real.sum())[None]


def edit_of(item: Intervention, column: Columns, address: str, axes: list[str]) -> Any:
    """The function from h_t `(b, ...)` to the edited one, for one column."""

    def edit(state: Tensor) -> Tensor:
        return item.changed(state[:, None], column, address, axes)[:, 0]

    return edit


def knock_out(model: Model, address: str, item: Knockout, columns: Columns) -> None:
    """Register a knockout with the mixer's scan."""
    _, layer, _ = address.split(".", 2)
    if item.heads is not None and "h" not in axes_by_address(model, address):
        raise BadInput(f"{address}: this scan has no heads (S6 keeps a state for every channel); leave heads= out.")
    heads = [item.heads] if isinstance(item.heads, int) else item.heads
    sources, destinations = columns.chosen(item.sources), columns.chosen(item.destinations)
    model.layers[int(layer)].ssm.knock_out(sources, destinations, heads)


def columns_of(model: Model, before: Columns | None, so_far: int, counted: bool) -> tuple[Columns, int]:
    """What the columns of the forward that is about to run hold, and how many columns there will then have been.

    The mask tells, where the model is given one. transformers drops it for a batch without padding, and models of
    recurrent layers alone drop it once they decode: what the earlier forwards of the run were given still holds.

    Args:
        model: The model.
        before: The columns of the forward before in this run.
        so_far: How many columns the forwards before had, cached ones included.
        counted: Whether it matters which token a column holds.
    """
    args, kwargs = model.nn.inputs
    ids = kwargs.get("input_ids", args[0] if args else None)
    ids = kwargs["inputs_embeds"] if ids is None else ids
    rows, length = ids.shape[:2]
    mask = kwargs.get("attention_mask")
    cache = kwargs.get("past_key_values", kwargs.get("cache_params", kwargs.get("state")))
    mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    told = shared(model).get("before") if before is None else None  # the run starts from a state of ours
    if mask is not None and mask.shape[1] > length:
        start = mask.shape[1] - length
    elif told is not None:
        start = told.shape[1]
    elif cache is None:
        start = 0  # every forward runs the whole sequence again
    else:
        start = cached(cache, counted) if before is None else so_far
    if mask is None or mask.shape[1] < start + length:
        known = ids.new_empty(rows, 0)
        if before is not None:
            known = (before.keys[:, model.meta_tokens :] >= 0)[:, : start + length]
        if told is not None:
            known = told
        known = known.to(ids.device, torch.long)
        if mask is not None:
            known = known[:, :start]
        middle = start + length - known.shape[1] - (0 if mask is None else mask.shape[1])
        parts = [known, torch.ones(rows, middle, dtype=torch.long, device=ids.device)]
        mask = torch.cat(parts if mask is None else [*parts, mask.long()], dim=1)
    mask = mask.long()
    keys = torch.where(mask.bool(), mask.cumsum(1) - 1, -1)
    lengths = mask.sum(1) if before is None else before.lengths
    meta = keys.new_full((rows, model.meta_tokens), -1)
    index = keys[:, start:] if start else torch.cat([meta, keys], 1)
    return Columns(index, lengths, True, torch.cat([meta, keys], 1)), start + length


def cached(cache: Any, counted: bool) -> int:
    """How many columns a cache holds that a run starts from."""
    if hasattr(cache, "seqlen_offset"):  # xLSTM's
        return int(cache.seqlen_offset)
    if isinstance(cache, (list, tuple)):  # RWKV-4's
        return uncounted() if counted else 0
    if any(hasattr(layer, "get_seq_length") for layer in cache.layers) or not cache.layers:
        return int(cache.get_seq_length())
    return uncounted() if counted and cache.has_previous_state() else 0


def uncounted() -> int:
    """Refuse to count positions after states alone.

    Raises:
        BadInput: Always.
    """
    raise BadInput(
        "This run starts from a cache of recurrent states, which do not tell how many tokens they hold, so positions "
        "cannot be counted; run the whole sequence from its beginning, or use positions=None."
    )
