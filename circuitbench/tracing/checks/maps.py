"""Do the words of a map name something in the model's code? Looked up, not run."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING

from ...architectures.base import LAYER, Architecture, Site, find_module, find_part
from ...errors import UnsupportedModel
from ...models.attention_view import OPERATION
from ...models.binding import Binder, inside
from .report import Row

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from nnsight.intervention.envoy import Envoy
    from torch import nn

CHECK = "the map names what is there"


def missing(nn_model: TransformersModel, architecture: Architecture) -> tuple[list[Row], Architecture | None]:
    """What the map names and the code lacks; and the map without it, if anything is left to check."""
    binder = Binder(nn_model, architecture)
    layers = find_module(binder.hf, architecture.layers)
    if layers is None:
        return [lacks("model", f"There is no module {architecture.layers!r} to hold the layers")], None
    rows = [
        lacks("model", f"There is no module {path!r} ({role})")
        for role, path in (("final_norm", architecture.final_norm), ("unembed", architecture.unembed))
        if find_module(binder.hf, path) is None
    ]
    for name in ("embed", "logits"):
        site = getattr(architecture, name)
        path = site.at.format(layers=architecture.layers).partition(":")[0].partition("/")[0]
        if find_module(binder.hf, path) is None:
            return [*rows, lacks(name, f"There is no module {path!r}")], None
    broken: set[str] = set()
    scanless: set[str] = set()
    unused, unnamed = set(architecture.parts), {}
    for index, layer in enumerate(layers):
        found = parts_of(architecture, layer)
        unused -= set(found)
        unnamed |= {f"layers.{index}": name for name in uncovered(layer, found)}
        for name, path in found.items():
            why = lacking_operation(binder, architecture, index, name, path)
            if why:
                scanless.add(name)
                rows.append(lacks(f"layers.{index}.{name}", why))
        for name, entry in architecture.sites.items():
            owner = name.rpartition(".")[0]
            if owner not in found:
                continue
            site = binder.applicable(entry, find_module(layer, found[owner]), layer)
            why = "" if site is None else lacking(binder, architecture, site, index, found, owner)
            if why:
                broken.add(name)
                rows.append(lacks(f"layers.{index}.{name}", why))
    for name in sorted(unused):
        for where, module in unnamed.items():
            paths = " or ".join(repr(path) for path in architecture.parts[name].paths)
            rows.append(lacks(where, f"There is no {name!r} at {paths} in any layer, and no part covers {module}"))
    if not rows:
        return [Row("model", CHECK, True)], architecture
    kept = {
        name: site for name, site in architecture.sites.items() if name not in broken and part(name) not in scanless
    }
    return rows, replace(architecture, sites=kept)


def lacks(site: str, why: str) -> Row:
    """A word of the map that names nothing."""
    advice = f"{why}; correct the map (print the module, or envoy.source.names for its operations)."
    return Row(site, CHECK, False, advice=advice)


def part(name: str) -> str:
    """The part that a site belongs to."""
    return name.rpartition(".")[0]


def parts_of(architecture: Architecture, layer: nn.Module) -> dict[str, str]:
    """The parts that a layer has, and their paths; the layer itself among them."""
    found = {name: find_part(layer, part) for name, part in architecture.parts.items()}
    return {LAYER: ""} | {name: path for name, path in found.items() if path is not None}


def lacking(
    binder: Binder, architecture: Architecture, site: Site, index: int, found: dict[str, str], owner: str
) -> str:
    """Why a site's location does not exist in one layer; nothing if it does, or if the layer may lack it."""
    base = f"{architecture.layers}.{index}"
    part = binder.envoy(base, found[owner])
    home = part if site.base is None else binder.envoy(base, found[site.base])
    if site.at.startswith("pattern:"):
        return "" if OPERATION in part.source.names else f"There is no attention function ({OPERATION}) in {part.path}"
    for at in (site.at, site.step or site.at):
        if at.startswith("scan:"):
            continue
        module, _, operation = at.partition(":")[0].partition("/")
        try:
            place = binder.place(at, home)
        except UnsupportedModel:
            return no_operation(operation, inside(home, module) if module else home)
        # Experts and a plain MLP may stand at the same path: each then has sites that the other lacks.
        shared = any(name != owner and found[name] == found[owner] for name in found)
        if place is None and not shared:
            return f"There is no module {module!r} in {home.path}"
    return ""


def lacking_operation(binder: Binder, architecture: Architecture, index: int, name: str, path: str) -> str:
    """Which operation a part's scan names that its module does not call; its sites are then out of reach."""
    scan = architecture.parts[name].scan if name != LAYER else None
    if scan is None:
        return ""
    envoy = binder.envoy(f"{architecture.layers}.{index}", path)
    places = [scan.sequence, scan.step]
    if scan.loops:
        places = [at for loop in scan.loops for at in (*loop.given.values(), *loop.skipped, loop.output)]
    for place in places:
        module, _, operation = place.partition(":")[0].partition("/")
        if module and find_module(envoy._module, module) is None:
            hint = f" (an operation is written '/{module}')" if module in envoy.source.names else ""
            return f"There is no module {module!r} in {envoy.path}{hint}"
        home = inside(envoy, module) if module else envoy
        if operation and operation not in home.source.names:
            return no_operation(operation, home)
    return ""


def no_operation(operation: str, envoy: Envoy) -> str:
    """The reason, with the names that come closest."""
    names = difflib.get_close_matches(operation, list(envoy.source.names), 4, 0.0)
    return f"There is no operation {operation!r} in {envoy.path} (there are {', '.join(names)})"


def uncovered(layer: nn.Module, found: dict[str, str]) -> list[str]:
    """Modules of a layer with weights of their own kind (more than a norm or one projection) that no part covers."""
    paths = [path for path in found.values() if path]
    out = []
    for name, module in layer.named_children():
        if any(path == name or path.startswith(f"{name}.") for path in paths):
            continue
        if sum(parameter.dim() > 1 for parameter in module.parameters()) > 1:
            out.append(f"{name} ({type(module).__name__})")
    return out
