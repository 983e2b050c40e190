"""Checks between sites: branches add up to the residual stream, heads and channels are where others say they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...architectures import ARCHITECTURES
from ...architectures.base import LAYER
from .blocks import gated, heads, readings, residuals
from .live import Failure, relative
from .maps import parts_of, uncovered

if TYPE_CHECKING:
    from ...models.views import LayerView
    from .live import Live

SUM = "the sum of the branches"
RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
HEAD = "a head reaches its own"
CHANNELS = "its channels are those of y"


def check_residuals(live: Live) -> None:
    """What a layer hands on is what it was given plus what its branches put out, the middle edited or not."""
    plan: list[tuple[int, list[str]]] = []
    for layer in live.model.layers:
        names, why = branches(live, layer)
        if names and not why:
            plan.append((layer.index, names))
        elif names:
            live.unverified(f"layers.{layer.index}.resid_post", SUM, why)
    for change in ("none", "assigned", "in place"):
        some = [(layer, names) for layer, names in plan if change == "none" or "resid_mid" in names]
        found = live.attempt(residuals, some, change) if some else {}
        for layer, names in some:
            for name in ("resid_mid", "resid_post") if change == "none" else ("resid_post",):
                if name not in names:
                    continue
                site = f"layers.{layer}.{name}"
                before = [other for other in names[: names.index(name)] if other.endswith(".out")]
                advice = (
                    f"{name} is not resid_pre + {' + '.join(before)}: an output lacks a multiplier or a norm (scale=, "
                    "another location), or a part is not added to the residual stream (to_residual=False)."
                )
                if change != "none":
                    advice = f"An edit ({change}) is not carried on to resid_post: set in_place=True for it in the map."
                measured = found if isinstance(found, Failure) else found[site]
                check = SUM if change == "none" else f"{SUM}, resid_mid {change}"
                live.note(site, check, measured, live.floor, advice)


def branches(live: Live, layer: LayerView) -> tuple[list[str], str]:
    """The residual sites of a layer and the outputs added between them, in order; and why they cannot be summed."""
    architecture = ARCHITECTURES[live.model.architecture]
    found = parts_of(architecture, layer.envoy._module)
    adding = [name for name in found if name != LAYER and architecture.parts[name].to_residual]
    names = [name for name in layer.sites if name in RESIDUAL or name in [f"{part}.out" for part in adding]]
    checked = [name for name in names if f"layers.{layer.index}.{name}" in live.addresses]
    if "resid_pre" not in checked or "resid_post" not in checked:
        return [], ""
    if architecture.post_norm:
        return [], ""  # norms stand in the stream itself: it is no sum
    if checked != names:
        return names, "one of the sites it needs is not checked"
    other = uncovered(layer.envoy._module, found)
    if other:
        return names, f"no part of the map covers {', '.join(other)}"
    # Experts put out what the MLP puts out, where both are the same module.
    silent = [
        name for name in adding if f"{name}.out" not in names and not (name in ("mlp", "moe") and "mlp.out" in names)
    ]
    return names, f"the map has no output site for {', '.join(silent)}" if silent else ""


def check_heads(live: Live) -> None:
    """A head of q, k, v or the pattern reaches its own pattern and output alone, from its own position on."""
    row, t = 1, live.columns.shape[1]
    column = t - 4
    real = live.columns[row]
    for layer in live.first:
        prefix = f"layers.{layer}.attn"
        if not all(f"{prefix}.{name}" in live.addresses for name in ("q", "k", "v", "pattern", "z")):
            continue
        base = live.run(heads, layer, "", 0, row, column)  # all of these have been read before
        groups = live.run(readings, [f"{prefix}.k"])["sites"][f"{prefix}.k"][0][2]
        head = min(1, groups - 1)
        for name in ("q", "k", "v", "pattern"):
            site = f"{prefix}.{name}"
            advice = (
                f"A change of head {head} of {name} at one position reaches other heads or earlier positions, or not "
                "its own: the layout takes the channels apart in another order, or this is another of q, k, v."
            )
            found = live.attempt(heads, layer, name, head, row, column)
            if isinstance(found, Failure):
                live.note(site, HEAD, found, live.tolerance, advice)
                continue
            shared = len(base["z"]) // groups if name in ("k", "v") else 1
            own = torch.zeros(len(base["z"]), t, 1, dtype=torch.bool)
            own[head * shared : (head + 1) * shared, column : t if name in ("k", "v") else column + 1] = True
            reached, strayed = [], []
            for kind in ("pattern", "z"):
                moved = (found[kind].double() - base[kind].double()).abs().cpu() / base[kind].abs().max().item()
                if kind == "pattern" and name == "v":
                    strayed.append(moved[:, real].max().item())
                else:
                    reached.append((moved * own).max().item())
                    strayed.append((moved * ~own)[:, real].max().item())
            live.note_movement(site, "a change of a head moves its own", min(reached), advice)
            live.note(site, HEAD, max(strayed), live.tolerance, advice)


def check_gates(live: Live) -> None:
    """What one head of y writes, and no other, is in that head's channels of the gated output; so for the gate."""
    for layer, part in live.scans(live.first):
        prefix = f"layers.{layer}.{part}"
        names = [name for name in ("gated", "gate") if f"{prefix}.{name}" in live.addresses]
        if names[:1] != ["gated"]:
            continue
        shapes = live.run(readings, [f"{prefix}.y", f"{prefix}.gated"])["sites"]
        count, *width = shapes[f"{prefix}.y"][0][2:]
        size = width[0] if width else 1  # S6: every channel is a head of its own
        if count * size != shapes[f"{prefix}.gated"][0][2]:
            live.unverified(f"{prefix}.gated", CHANNELS, "y and gated differ in size")
            continue
        head = min(1, count - 1)
        own = (head * size, (head + 1) * size)
        found = [live.attempt(gated, layer, part, head, own, name == "gate") for name in names]
        silent = live.attempt(gated, layer, part, None, own, False)  # not zero where the norm that follows has a bias
        for name, one in zip(names, found, strict=True):
            advice = f"The channels of {name} are in another order than the heads of y: correct its layout."
            if isinstance(one, Failure):
                live.note(f"{prefix}.{name}", CHANNELS, one, None, advice)
            elif isinstance(found[0], Failure):
                live.note(f"{prefix}.{name}", CHANNELS, found[0], None, advice)
            elif isinstance(silent, Failure):
                live.note(f"{prefix}.{name}", CHANNELS, silent, None, advice)
            elif name == "gate":  # the gate of other channels does not matter to these
                now, before = (one["gated"][..., slice(*own)] for one in (one, found[0]))
                live.note(f"{prefix}.gate", CHANNELS, relative(now, before), live.tolerance, advice)
            else:
                value = (one["gated"].double() - silent["gated"].double()).abs()
                others = torch.cat([value[..., : own[0]], value[..., own[1] :]], -1).max().item()
                within = value[..., own[0] : own[1]].max().item()
                strayed = others / within if within else Failure("None of it is there")
                live.note(f"{prefix}.gated", CHANNELS, strayed, live.tolerance, advice)
