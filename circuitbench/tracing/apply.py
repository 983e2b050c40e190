"""Applying interventions inside a running trace. Everything here travels to remote servers by value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadInput
from .addresses import axes_by_address, read_site, write_site
from .interventions import Knockout
from .selection import restrict, select

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from ..models import Model
    from .interventions import Intervention

Plan = (
    list  # of (address, interventions there, whether the site's value is wanted), in the order the model reaches them
)


def run_plan(
    model: Model,
    plan: Plan,
    index: Int[Tensor, "b t"],
    lengths: Int[Tensor, " b"],
    growing: bool,
    columns: Int[Tensor, "b k"] | None = None,
) -> dict[str, Tensor]:
    """Apply interventions and read sites, in forward order; returns what was read, by address.

    Args:
        model: The model.
        plan: What to do at which site.
        index: Token index of every column, -1 for padding.
        lengths: Tokens of each prompt.
        growing: Whether tokens are generated after the prompt.
        columns: Keep only these columns of what is read.
    """
    out: dict[str, Tensor] = {}
    for address, interventions, wanted in plan:
        apply_at(model, address, interventions, index, lengths, growing)
        if wanted:
            out[address] = read_columns(model, address, columns).detach()
    return out


def read_columns(model: Model, address: str, columns: Tensor | None) -> Tensor:
    """A site, or some columns of it; the state is then never whole in memory."""
    if columns is None:
        return read_site(model, address)
    if address.endswith(".ssm.state"):
        _, layer, _ = address.split(".", 2)
        kept: list[Any] = [None] * columns.numel()
        for start, states in model.layers[int(layer)].ssm.iter_state():
            for place, column in enumerate(columns.flatten().tolist()):
                if start <= column < start + states.shape[1]:
                    kept[place] = states[place // columns.shape[1], column - start].clone()
        return torch.stack(kept).unflatten(0, tuple(columns.shape))
    value = read_site(model, address)
    axis = axes_by_address(model, address).index("t")
    value = value.movedim(axis, 1)
    rows = torch.arange(len(value), device=value.device)[:, None]
    return value[rows, columns.to(value.device)].movedim(1, axis)


def apply_at(
    model: Model, address: str, interventions: list[Any], index: Tensor, lengths: Tensor, growing: bool
) -> None:
    """Apply all interventions at one site."""
    knockouts = [item for item in interventions if isinstance(item, Knockout)]
    others = [item for item in interventions if not isinstance(item, Knockout)]
    for knockout in knockouts:
        knock_out(model, address, knockout, index, lengths, growing)
    if not others:
        return
    if address.endswith(".ssm.state"):
        edit_states(model, address, others, index, lengths, growing)
        return
    axes = axes_by_address(model, address)
    value = read_site(model, address)
    value = value if axes[1] == "t" else value.transpose(1, 2)  # (b, heads, t, t): queries are the positions
    for item in others:
        value = item.changed(value, index, lengths, address, has_heads(axes), growing)
    write_site(model, address, value if axes[1] == "t" else value.transpose(1, 2))


def has_heads(axes: list[str]) -> bool:
    """Whether the site's axis 2 (or 1, for matrices over positions) counts heads."""
    return axes[2] in ("h", "kv") or axes[1] in ("h", "kv")


def edit_states(
    model: Model, address: str, items: list[Intervention], index: Tensor, lengths: Tensor, growing: bool
) -> None:
    """Interventions on h_t: the recurrence is run again with the state edited where each prompt's position is."""
    axes = axes_by_address(model, address)
    _, layer, _ = address.split(".", 2)
    view = model.layers[int(layer)].ssm
    columns = set()
    for item in items:
        columns.update(select(item.positions, index, lengths, growing).any(0).nonzero().flatten().tolist())
    edits = {column: edit_of(items, column, index, lengths, address, axes, growing) for column in columns}
    if edits:
        view.edit_state(edits, states=False)


def edit_of(
    items: list[Intervention],
    column: int,
    index: Tensor,
    lengths: Tensor,
    address: str,
    axes: list[str],
    growing: bool,
) -> Any:
    """The function from h_t `(b, ...)` to the edited one, for one column."""

    def edit(state: Tensor) -> Tensor:
        value = state[:, None]
        for item in items:
            chosen = select(item.positions, index, lengths, growing)[:, column : column + 1]
            value = torch.where(
                mask_of(item, chosen, value, address, axes),
                item.apply(value, index[:, column : column + 1] >= 0, address).to(value.dtype),
                value,
            )
        return value[:, 0]

    return edit


def mask_of(item: Intervention, chosen: Tensor, value: Tensor, address: str, axes: list[str]) -> Tensor:
    """Where one intervention acts on the state of one column."""
    return restrict(chosen, value, item.heads, item.channels, address, has_heads(axes))


def knock_out(model: Model, address: str, item: Knockout, index: Tensor, lengths: Tensor, growing: bool) -> None:
    """Register a knockout with the mixer's scan."""
    _, layer, _ = address.split(".", 2)
    axes = axes_by_address(model, address)
    if item.heads is not None and not has_heads(axes):
        raise BadInput(f"{address}: this scan has no heads (S6 keeps a state for every channel); leave heads= out.")
    heads = [item.heads] if isinstance(item.heads, int) else item.heads
    sources = select(item.sources, index, lengths, growing)
    destinations = select(item.destinations, index, lengths, growing)
    model.layers[int(layer)].ssm.knock_out(sources, destinations, heads)


def read_index(model: Model, so_far: int) -> tuple[Tensor, Tensor]:
    """(token index of every column, real tokens of every row) of the forward that is about to run.

    Args:
        model: The model.
        so_far: Columns of earlier forwards of this generation.
    """
    args, kwargs = model.nn.inputs
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        ids = kwargs["inputs_embeds"]
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        mask = ids.new_ones(ids.shape[0], so_far + ids.shape[1])
    mask = mask.to(torch.long)
    index = torch.where(mask.bool(), mask.cumsum(1) - 1, -1)
    return index[:, -ids.shape[1] :], mask.sum(1)
