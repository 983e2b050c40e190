"""Checks of a scan: replayed, as a matrix, frozen, and its state against the model's own cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...architectures import ARCHITECTURES
from ...models import kernels
from ...models.prefix import kind_of
from ...models.prompts import takes_position_ids
from ...recurrences import recurrence_of
from .blocks import disturbed, same_states, scans, state_edit
from .live import Failure, guarded, relative

if TYPE_CHECKING:
    from torch import Tensor

    from ...architectures.scans import Scan
    from .live import Live

PREFIX = 6  # tokens before the cache is edited
CACHE = "edit_state equals an edited cache"
FROZEN = "the frozen form closes"


def check_scans(live: Live) -> None:
    """The recurrence on the operands gives the model's own y; so do its matrix and its frozen form."""
    places = live.scans()
    found = live.attempt(scans, places) if places else {}
    for layer, part in places:
        site = f"layers.{layer}.{part}"
        here = live.attempt(scans, [(layer, part)]) if isinstance(found, Failure) else found
        scan = scan_of(live, part)
        advice = (
            f"recurrences.{scan.recurrence}, on what {type(scan).__name__}.read makes of the arguments, does not give "
            "the model's own y: look for swapped operands, dt before its softplus, bias or clamp, a missing D, another "
            "recurrence."
        )
        if isinstance(here, Failure):
            live.note(f"{site}.y", "the scan replayed", here, None, advice)
            continue
        here = here[site]
        if "gated" in here:
            live.note(f"{site}.gated", "the scan replayed, gated", relative(*here["gated"]), live.tolerance, advice)
        here["own"] = own_y(live, here)
        bound = max(live.floor, 3 * relative(here["replayed"], here["exact"]))
        live.note(f"{site}.y", "the scan replayed", relative(here["replayed"], here["own"]), bound, advice)
        if "mixing" in here and f"{site}.mixing" in live.addresses:
            off = relative(*mixed(here))
            live.note(f"{site}.mixing", "mixing times x is y", off, bound, "The matrix is not this scan's.")
        if layer in live.first and not getattr(recurrence_of(scan.recurrence), "linear", True):
            live.unverified(f"{site}.y", FROZEN, "in this recurrence y is not linear in x, so that there is none")
        elif layer in live.first:
            live.note(f"{site}.y", FROZEN, open_by(here, scan.recurrence), bound, advice)


def scan_of(live: Live, part: str) -> Scan:
    """How the map reads a part's scan."""
    scan = ARCHITECTURES[live.model.architecture].parts[part].scan
    assert scan is not None  # it has a y
    return scan


def own_y(live: Live, here: dict[str, Any]) -> Tensor:
    """What the model's own code makes of the scan's arguments: its output, or that of the code ours stands in for."""
    function = getattr(kernels.modeling_module(live.model.hf), "mamba_selective_scan", None)
    original = getattr(function, kernels.MARK, None)
    if original is None or "call" not in here or live.remote not in (False, "local") or live.model.device.type != "cpu":
        return here["own"]
    args, kwargs = here["call"]
    with torch.no_grad():
        return original(*args, **{**kwargs, "z": None, "return_last_state": False}).transpose(1, 2)


def mixed(here: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y by the mixing matrix, and the model's own."""
    x, M, own, D = here["operands"]["x"].float(), here["mixing"].float(), here["own"], here["D"]
    channels = here["channels"]
    if channels is not None:  # S6: the first and the last channel were asked for
        x, own = x.flatten(2)[..., channels], own.flatten(2)[..., channels]
        y = torch.einsum("bcts,bsc->btc", M, x)
        return y + (0 if D is None else D.float().flatten()[channels] * x), own
    y = torch.einsum("bhts,bshp->bthp", M, x)
    return y + (0 if D is None else (D[:, None] if D.dim() == 1 else D).float() * x), own


def open_by(here: dict[str, Any], name: str) -> float:
    """How far gradient × input of the frozen form is from y, per prompt and head, along y itself."""
    operands = {key: value.detach().clone() for key, value in here["operands"].items()}
    operands["x"].requires_grad_()
    own = here["own"].detach()
    with torch.enable_grad():
        y, _ = recurrence_of(name).frozen(**operands, D=here["D"])
        (gradient,) = torch.autograd.grad(y, operands["x"], own.to(y.dtype))
    axes = (1, *range(3, own.dim()))
    return relative((gradient.float() * operands["x"].float()).sum(axes), own.float().square().sum(axes))


def check_states(live: Live) -> None:
    """A state put back as it was changes no more than rounding; one edited goes on as the model's own cache would."""
    places = [place for place in live.scans() if f"layers.{place[0]}.{place[1]}.state" in live.addresses]
    if not places:
        return
    position = live.columns.shape[1] // 2
    together = live.moved(same_states, places, position)
    holds = not isinstance(together, Failure) and together <= live.tolerance
    for place in places:
        measured = together if holds else live.moved(same_states, [place], position)
        advice = "Replaying the scan with its own state moves the logits: the recurrence is not the model's."
        live.note(f"layers.{place[0]}.{place[1]}.state", "own state by edit_state", measured, live.tolerance, advice)
    for layer, part in places:
        if layer in live.first:
            check_cache(live, layer, part)


def check_cache(live: Live, layer: int, part: str) -> None:
    """Read and edited states against the cache, edited between a prefix and the rest of a prompt."""
    site = f"layers.{layer}.{part}.state"
    if not live.weights_here:
        live.unverified(site, CACHE, "the weights are not on this machine")
        return
    ids = live.inputs["input_ids"][:1].to(live.model.device)
    found = live.attempt(state_edit, layer, part, live.model.meta_tokens + PREFIX - 1, input_ids=ids)
    if isinstance(found, Failure):
        live.note(site, CACHE, found, live.tolerance, "The state cannot be read and edited.")
        return
    runs = [guarded(continued, live, ids, layer, part, edit) for edit in (False, True)]
    if any(isinstance(run, Failure) for run in runs):
        why = f"the model cannot go on from its own cache ({next(r.why for r in runs if isinstance(r, Failure))})"
        live.unverified(site, CACHE, why)
        return
    (plain, _), (edited, cached) = runs
    whole = live.own_logits({"input_ids": ids})
    off = relative(plain, whole[:, PREFIX:])
    if off > live.tolerance:
        why = f"the model's own cache does not continue its prompts (off by {off:.1e}, nothing edited)"
        live.unverified(site, CACHE, why)
        return
    after = found["logits"][:, PREFIX:]
    off = relative(found["state"], cached)
    live.note(site, "the state is the cache's", off, live.tolerance, "What is read as the state is not the model's.")
    advice = "Nothing follows from the state: it is not what the model reads (or its weights ignore it)."
    live.note_movement(site, "an edited state moves the logits", relative(after, whole[:, PREFIX:]), advice)
    advice = "What follows from an edited state differs from an edited cache: the recurrence is not the model's own."
    live.note(site, CACHE, relative(after, edited), live.tolerance, advice)


def continued(live: Live, ids: Tensor, layer: int, part: str, edit: bool) -> tuple[Tensor, Tensor]:
    """Logits after a prefix whose cached state may be edited, and that state as it was; without any trace."""
    model, hf, site = live.model, live.model.hf, f"layers.{layer}.{part}.state"
    kind = kind_of(model)
    # At once where transformers goes on so: there, steps may lack the limits of dt.
    at_once = scan_of(live, part).continues and kind.together and not kind.mapped
    size = ids.shape[1] - PREFIX if at_once else 1
    logits = []
    with torch.no_grad():
        cache = kind.prepared(hf, ids)
        out = hf(ids[:, :PREFIX], use_cache=True, **({} if cache is None else {kind.argument: cache}))
        cache = kind.of(out) if cache is None else cache
        state = kind.read(hf, cache)[site]
        if edit:
            kind.write(hf, cache, {site: disturbed(state)}, PREFIX + model.meta_tokens)
        for start in range(PREFIX, ids.shape[1], size):
            given = {kind.argument: cache, "use_cache": True}
            if takes_position_ids(model):  # Bamba and MiniMax count from 0 again without them
                given["position_ids"] = torch.arange(start, start + size, device=ids.device)[None]
            out = hf(ids[:, start : start + size], **given)
            logits.append(out.logits)
    return torch.cat(logits, 1), state
