"""From a map (data) and a live model to views: which sites each layer has, where, and how large.

Runs on the client alone; what it builds travels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..architectures.base import LAYER, Architecture, Part, Site, find_module, find_part
from ..errors import UnsupportedModel
from ..recurrences import recurrence_of
from .attention_view import Pattern
from .spots import Spot
from .views import LayerView, PartView, SSMView, Verbs

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from nnsight.intervention.envoy import Envoy
    from torch import nn

    from ..architectures.scans import Scan

# Axis names that mean the same in every family.
DIMS = {
    "d_model": "config.hidden_size",
    "vocab": "config.vocab_size",
    "kv": "config.num_key_value_heads",
    "proj": "in_proj.out_features",
    "conv_dim": "conv1d.in_channels",
    "d_mlp": "down_proj.in_features",
    "experts": "experts.num_experts",
}


class Binder:
    """Binds one architecture to one model."""

    def __init__(self, nn_model: TransformersModel, architecture: Architecture) -> None:
        self.nn = nn_model
        self.hf: Any = nn_model._module
        self.config = self.hf.config.get_text_config()
        self.architecture = architecture

    @property
    def meta_tokens(self) -> int:
        """Columns that the layers have before a prompt's own."""
        name = self.architecture.meta_tokens
        return int(self.attribute(name, self.hf, None)) if name else 0

    def layers(self) -> list[LayerView]:
        """Views of all layers."""
        modules = find_module(self.hf, self.architecture.layers)
        if modules is None:
            raise UnsupportedModel(
                f"The map for {self.architecture.model_type!r} expects the layers at {self.architecture.layers!r}, "
                f"which this {type(self.hf).__name__} does not have."
            )
        return [self.layer(index, module) for index, module in enumerate(modules)]

    def layer(self, index: int, module: nn.Module) -> LayerView:
        """The view of one layer."""
        base = f"{self.architecture.layers}.{index}"
        found = {LAYER: ""} | {
            name: path
            for name, part in self.architecture.parts.items()
            if (path := find_part(module, part)) is not None
        }
        envoys = {name: self.envoy(base, path) for name, path in found.items()}
        spots: dict[str, dict[str, Any]] = {name: {} for name in found}
        scans: dict[str, str] = {}
        shapes: dict[str, tuple[str, ...]] = {}
        axes: dict[str, list[str]] = {}
        names: dict[str, list[str]] = {name: [] for name in found}
        theirs: dict[str, list[Spot]] = {name: [] for name in found}
        places: list[tuple[str, str, Envoy, bool]] = []  # (owner, name, module it is inside of, is an operation of it)
        for name, entry in self.architecture.sites.items():
            owner, _, site_name = name.rpartition(".")
            if owner not in found:
                continue
            site = self.applicable(entry, envoys[owner]._module, module)
            if site is None:
                continue
            address = f"layers.{index}.{name}"
            for at in (site.at, site.step or site.at):
                if at.startswith("scan:"):
                    scans[site_name] = at.removeprefix("scan:")
            if site.at.startswith("scan:"):
                scan = self.architecture.parts[owner].scan
                assert scan is not None  # a map with a scan's sites has a scan
                places.append((owner, site_name, self.scan_home(scan, envoys[owner]), True))
            elif site.at.startswith("pattern:"):
                spots[owner][site_name] = Pattern(address, envoys[owner])
                places.append((owner, site_name, envoys[owner], True))
            else:
                home = envoys[owner if site.base is None else site.base]
                spot = self.spot(address, site, home, envoys[owner], module, self.architecture.parts.get(owner))
                if spot is None:
                    continue
                part = self.architecture.parts.get(owner)
                spot.continues = part.cache if part is not None else ""
                spots[owner][site_name] = spot
                if site.base is None:
                    theirs[owner].append(spot)
                    if part is not None and part.scan is not None and not scans:
                        spot.opens = True
                    elif spot.timed:
                        for earlier in theirs[owner]:
                            earlier.opens = True
                places.append((owner, site_name, spot.envoy, ".source." in spot.locations[0]))
            names[owner].append(site_name)
            axes[name] = canonical_axes(site)
            shapes[name] = self.shape(site, envoys[owner]._module, module, self.architecture.parts.get(owner))
        needed = instrumented_first(places)
        for owner, site_name, *_ in places:
            if site_name in spots[owner]:
                spots[owner][site_name].instrument = needed[owner, site_name]
        parts: dict[str, PartView] = {}
        for name in found:
            if name == LAYER or not names[name]:
                continue
            part = self.architecture.parts[name]
            if part.scan is None:
                parts[name] = PartView(f"layers.{index}.{name}", spots[name])
            else:
                recurrence = verbs_of(part.scan)
                parts[name] = SSMView(
                    f"layers.{index}.{name}",
                    spots[name],
                    envoys[name],
                    part.scan,
                    recurrence,
                    scans,
                    names[name],
                    [
                        envoy
                        for owner, site in needed
                        if owner == name and site in scans
                        for envoy in needed[owner, site]
                    ],
                    part.cache,
                )
        kind = kind_of(found, self.architecture.parts)
        return LayerView(index, kind, envoys[LAYER], spots[LAYER], parts, shapes, axes)

    def root(self, name: str, at: str, site: Site) -> Spot:
        """A site of the model as a whole."""
        bound = self.spot(name, replace(site, at=at), self.nn, self.nn, None, None)
        if bound is None:
            raise UnsupportedModel(
                f"The map for {self.architecture.model_type!r} has {name} at {at!r}: no such module."
            )
        return bound

    def envoy(self, base: str, path: str) -> Envoy:
        """The envoy of a module."""
        return self.nn.get(f"{base}.{path}" if path else base)

    def scan_home(self, scan: Scan, part: Envoy) -> Envoy:
        """The module whose forward calls the scan."""
        path, _, operation = scan.sequence.partition("/")
        return inside(part, path) if path and operation else part

    def applicable(self, entry: Site | tuple[Site, ...], part: nn.Module, layer: nn.Module) -> Site | None:
        """The alternative whose condition holds, if any."""
        for site in entry if isinstance(entry, tuple) else (entry,):
            if site.when is None:
                return site
            wanted, name = (False, site.when[1:]) if site.when.startswith("!") else (True, site.when)
            if bool(self.attribute(name, part, layer)) == wanted:
                return site
        return None

    def attribute(self, name: str, part: nn.Module, layer: nn.Module | None) -> Any:
        """``config.x``, ``layer.x``, or an attribute of the part's module."""
        owner, rest = part, name
        if name.startswith("config."):
            owner, rest = self.config, name.removeprefix("config.")
        elif name.startswith("layer."):
            owner, rest = layer, name.removeprefix("layer.")
        return find_module(owner, rest)

    def spot(
        self,
        address: str,
        site: Site,
        home: Envoy,
        owner: Envoy,
        layer: nn.Module | None,
        part: Part | None,
    ) -> Spot | None:
        """A site bound to the module it lives in, or ``None`` if this layer lacks that module."""
        while_decoding = site.step if site.step is not None and site.step.startswith("/") else site.at
        place, decoding = self.place(site.at, home), self.place(while_decoding, home)
        if place is None or decoding is None:
            return None
        (envoy, sequence, element), (_, step, _) = place, decoding
        raw, canonical = site.patterns
        grouped = axes_of(raw) if "(" in raw else axes_of(canonical) if "(" in canonical else []
        sizes = self.sizes(grouped, owner._module, layer, part)
        return Spot(
            address=address,
            envoy=envoy,
            part=owner,
            locations=(sequence, step),
            element=element,
            raw=raw,
            canonical=canonical,
            sizes=sizes,
            index=site.index,
            scale=None if site.scale is None else float(self.attribute(site.scale, owner._module, layer)),
            divided=self.divided(site, layer),
            trim=site.trim,
            in_place=site.in_place,
            copied=site.copied,
            made_from=site.made_from,
            writable=site.writable,
        )

    def divided(self, site: Site, layer: nn.Module | None) -> float | None:
        """By what the model has divided the site's tensor in this layer, if it has."""
        by = 1.0 if site.divided is None else site.divided(self.config, layer)
        return None if by == 1.0 else by

    def sizes(self, axes: list[str], owner: nn.Module, layer: nn.Module | None, part: Part | None) -> dict[str, int]:
        """Sizes of the axes that the map knows."""
        dims = {**DIMS, **(part.dims if part else {})}
        found = {axis: self.attribute(dims[axis], owner, layer) for axis in axes if axis in dims}
        return {axis: size for axis, size in found.items() if isinstance(size, int)}

    def shape(self, site: Site, owner: nn.Module, layer: nn.Module | None, part: Part | None) -> tuple[str, ...]:
        """The canonical axes, with sizes where the map knows them."""
        axes = canonical_axes(site)
        sizes = self.sizes(axes, owner, layer, part)
        known = {axis: f"{size}" for axis, size in sizes.items()}
        if self.meta_tokens and site is not self.architecture.logits:
            known["t"] = f"{self.meta_tokens}+t"
        return tuple(known.get(axis, axis) for axis in axes)

    def place(self, at: str, home: Envoy) -> tuple[Envoy, str, str | int | None] | None:
        """Envoy, nnsight location and element for an address in a map."""
        target, _, port = at.partition(":")
        path, _, operation = target.partition("/")
        if path and find_module(home._module, path) is None:
            return None
        envoy = inside(home, path) if path else home
        if operation and operation not in envoy.source.names:
            raise UnsupportedModel(
                f"The map for {self.architecture.model_type!r} names the operation {operation!r} inside {envoy.path}, "
                "which this version of transformers does not have; run `circuitbench check` to see what else differs."
            )
        prefix = f"{envoy.path}.source.{operation}" if operation else envoy.path
        port, _, index = port.partition("[")
        port, _, name = port.partition(".")
        element: str | int | None = "input" if port == "input" else None
        if index:
            element = int(index.rstrip("]"))
        elif name:
            element = name
        return envoy, f"{prefix}.{port}", element


def verbs_of(scan: Scan) -> Verbs:
    """The functions of the recurrence that a scan is."""
    recurrence = recurrence_of(scan.recurrence)
    if getattr(recurrence, "write_follows_state", False) and not scan.write_follows_state:
        raise UnsupportedModel(
            f"{type(scan).__name__} is the recurrence {scan.recurrence!r}, in which what a step writes may depend on "
            "the state: set write_follows_state = True."
        )
    return Verbs(recurrence)


def instrumented_first(places: list[tuple[str, str, Envoy, bool]]) -> dict[tuple[str, str], list[Envoy]]:
    """For every site, the modules whose operations must be instrumented before it is asked for.

    nnsight instruments a module's forward when an operation in it is first named. Once the model is inside that forward
    it is too late, so whoever asks for an earlier site inside the module has to name it first.
    """
    needed: dict[tuple[str, str], list[Envoy]] = {}
    for number, (owner, name, envoy, operation) in enumerate(places):
        later = [other for _, _, other, is_operation in places[number:] if is_operation]
        inside = [other for other in later if envoy.path.startswith(f"{other.path}.") or (operation and other is envoy)]
        needed[owner, name] = list({other.path: other for other in inside}.values())
    return needed


def inside(envoy: Envoy, path: str) -> Envoy:
    """The envoy of a submodule; nnsight moves those whose name it serves itself on every module (``output``)."""
    for name in path.split("."):
        moved = vars(envoy).get(f"E_{name}")
        envoy = getattr(envoy, name) if moved is None else moved
    return envoy


def axes_of(pattern: str) -> list[str]:
    """Axis names of an einops pattern."""
    return pattern.replace("(", " ").replace(")", " ").split()


def canonical_axes(site: Site) -> list[str]:
    """Axis names of the site's tensor, as a user sees it."""
    canonical = site.patterns[1]
    if "(" in canonical:  # heads merged back into channels
        return ["b", "t", "d_inner"]
    return canonical.split()[0 if site.index is None else 1 :]


def kind_of(found: dict[str, str], parts: Any) -> str:
    """What mixes positions: ``ssm``, ``conv``, ``attention``, ``hybrid`` (attention and one of them), else ``mlp``."""
    mixing = [name for name in found if name != LAYER and parts[name].mixes]
    if "attn" in mixing:
        return "hybrid" if "ssm" in mixing or "conv" in mixing else "attention"
    return "ssm" if "ssm" in mixing else "conv" if "conv" in mixing else "mlp"
