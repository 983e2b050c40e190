"""What `check` does inside the running model. Everything here travels to remote servers by value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ...models.events import read_whole
from ..addresses import axes_by_address, owner_of, read_site, write_site

if TYPE_CHECKING:
    from torch import Tensor

    from ...models import Model


def disturbed(value: Tensor) -> Tensor:
    """Another tensor of the same kind: factors differ, so that no norm undoes them; what is positive stays positive."""
    work = value.to(torch.promote_types(value.dtype, torch.float32))
    wave = torch.cos(torch.arange(work.shape[-1], device=work.device))
    size = work.square().mean().sqrt()
    return (work * (1.5 + 0.4 * wave) + torch.where(size > 0, size, 1.0) * (0.1 + 0.05 * wave)).to(value.dtype)


def unchanged(value: Tensor) -> Tensor:
    """The identity."""
    return value


def untouched(model: Model) -> dict[str, Any]:
    """The model alone."""
    return {"logits": model.logits}


def readings(model: Model, addresses: list[str]) -> dict[str, Any]:
    """Shape of every site, and whether all of it is finite."""
    found: dict[str, Any] = {}
    for address in addresses:
        owner, name = owner_of(model, address)
        value = getattr(owner, name)
        if "channels" in axes_by_address(model, address):
            value = value(channels=[0])
        found[address] = (tuple(value.shape), bool(torch.isfinite(value).all()))
    return {"sites": found, "logits": model.logits}


def identities(model: Model, addresses: list[str], in_place: bool) -> dict[str, Any]:
    """Every site gets its own value."""
    for address in addresses:
        value = read_site(model, address)
        if in_place:
            value[:] = value.clone()
        else:
            write_site(model, address, value.clone())
    return {"logits": model.logits}


def edits(model: Model, addresses: list[str], row: int, last: int, in_place: bool) -> dict[str, Any]:
    """Every site gets other values in one prompt's last columns."""
    for address in addresses:
        value = read_site(model, address)
        before = axes_by_address(model, address).index("t") - 1
        where = (row, *[slice(None)] * before, slice(-last, None))
        new = disturbed(value)[where]
        if in_place:
            value[where] = new
        else:
            value = value.clone()
            value[where] = new
            write_site(model, address, value)
    return {"logits": model.logits}


def roundings(model: Model, addresses: list[str], size: float) -> dict[str, Any]:
    """Every site is rounded anew: each entry off by a random part of `size`, relative to itself."""
    generator = torch.Generator().manual_seed(0)
    for address in addresses:
        value = read_site(model, address)
        random = torch.rand(value.shape, generator=generator) * 2 - 1
        value *= (1 + size * random).to(value.device, torch.promote_types(value.dtype, torch.float32))
    return {"logits": model.logits}


def scans(model: Model, places: list[tuple[int, str]]) -> dict[str, Any]:
    """What each scan was given, what the model's own code made of it, and what the recurrence makes of it."""
    found: dict[str, Any] = {}
    for layer, part in places:
        view, prefix = getattr(model.layers[layer], part), f"layers.{layer}.{part}"
        # Where a loop applies the gate, only the gated output is the model's own.
        inside = any(loop.each_head for loop in view._scan.loops)
        gate: Any = view.gate if inside else None
        run = view._run()
        call, recurrence = run.firing.call, view._recurrence
        given = {**call.operands, "D": call.D, "initial_state": call.initial_state}
        here: dict[str, Any] = {"operands": call.operands, "D": call.D}
        if not view._scan.loops:
            here["call"] = read_whole(run.input)
        here["replayed"], _ = recurrence.forward(**given)
        here["exact"], _ = recurrence.forward(**given, accumulate=torch.float64)
        if "mixing" in view.sites:
            channels = [0, call.operands["x"].shape[2:].numel() - 1]
            by_channel = "channels" in axes_by_address(model, f"{prefix}.mixing")
            here["mixing"] = view.mixing(channels=channels) if by_channel else view.mixing
            here["channels"] = channels if by_channel else None
        here["own"] = view.y
        if inside:
            here["gated"] = (view.gated, F.silu(gate) * here["replayed"].flatten(2))
        found[f"layers.{layer}.{part}"] = here
    return found


def same_states(model: Model, places: list[tuple[int, str]], position: int) -> dict[str, Any]:
    """Every scan is replayed with its own state put back at one position."""
    for layer, part in places:
        getattr(model.layers[layer], part).edit_state({position: unchanged}, states=False)
    return {"logits": model.logits}


def state_edit(model: Model, layer: int, part: str, position: int) -> dict[str, Any]:
    """The state at one position, and the logits with it changed after it was read."""
    view = getattr(model.layers[layer], part)
    state = view.state[:, position]
    view.edit_state({position: disturbed}, when="after_read", states=False)
    return {"state": state, "logits": model.logits}


def residuals(model: Model, plan: list[tuple[int, list[str]]], change: str) -> dict[str, Any]:
    """For every layer, how far the residual stream is from what went in plus what the branches put out.

    Args:
        model: The model.
        plan: (layer, its residual sites and outputs in forward order).
        change: ``"none"``; or how the middle of the stream is changed, and expected to be carried on:
            ``"assigned"``, ``"in place"``.
    """
    found: dict[str, Any] = {}
    for layer, names in plan:
        view = model.layers[layer]
        total = torch.zeros(())
        for name in names:
            part, _, site = name.rpartition(".")
            value = getattr(getattr(view, part) if part else view, site)
            if name == "resid_pre":
                total = value.double()
            elif part:
                total = total + value.double()
            else:
                off = (value.double() - total).abs().max() / value.double().abs().max()
                found[f"layers.{layer}.{name}"] = float(off)
            if name == "resid_mid":
                new = disturbed(value) if change != "none" else value
                total = new.double()
                if change == "assigned":
                    view.resid_mid = new
                if change == "in place":
                    value[:] = new
    return found


def heads(model: Model, layer: int, name: str, head: int, row: int, column: int) -> dict[str, Any]:
    """One prompt's pattern and output of an attention layer, heads first, with one head of a site changed at one place.

    Args:
        model: The model.
        layer: The layer.
        name: ``"q"``, ``"k"``, ``"v"`` or ``"pattern"``; another name changes nothing.
        head, row, column: Where.
    """
    view = model.layers[layer].attn
    for site in ("q", "k", "v", "pattern"):
        if site == name:
            value = getattr(view, site)
            index = (row, head, column) if site == "pattern" else (row, column, head)
            value[index] = disturbed(value)[index]
    pattern = view.pattern[row].clone()
    return {"pattern": pattern, "z": view.z[row].transpose(0, 1)}


def gated(
    model: Model, layer: int, part: str, head: int | None, channels: tuple[int, int], gate: bool
) -> dict[str, Any]:
    """The gated output of a scan that writes in one head alone or in none, the gate changed everywhere else or not."""
    view = getattr(model.layers[layer], part)
    for name in (name for name in view.sites if name in ("gate", "y")):  # in the order the model reaches them
        if name == "y":
            y = view.y
            kept = None if head is None else y[:, :, head].clone()
            y[:] = 0
            if kept is not None:
                y[:, :, head] = kept
        elif gate:
            value = view.gate
            new = disturbed(value)
            value[..., : channels[0]] = new[..., : channels[0]]
            value[..., channels[1] :] = new[..., channels[1] :]
    return {"gated": view.gated}
