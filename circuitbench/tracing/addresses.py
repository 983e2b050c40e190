"""Addresses: from what a user types to sites of one model, and reading or writing a site by its address.

`read_site` and `write_site` travel to remote servers by value.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, SiteNotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..models import Model

# Names that other tools use for the same tensors; accepted wherever a site is named, never printed.
ALIASES = {
    "H1": "ssm.gated",
    "out_proj_in": "ssm.gated",
    "H2": "ssm.in_proj",
    "x_proj": "ssm.in_proj",
    "H3": "ssm.y",
    "ssm_y": "ssm.y",
    "H4": "ssm.state",
    "hidden_state_h": "ssm.state",
    "H5": "ssm.conv",
    "conv1d": "ssm.conv",
    "A_bar": "ssm.decay",
    "z": "ssm.gate",
    "out_proj_out": "ssm.out",
    "residual": "resid_post",
}


def resolve(model: Model, sites: str | Sequence[str]) -> list[str]:
    """The addresses that are meant, in the order the model reaches them.

    Args:
        model: The model.
        sites: Addresses; ``*`` stands for every layer that has the site, ``-1`` for the last layer, and other tools'
            names are understood (``"layers.3.H1"``).

    Raises:
        SiteNotFound: For a site or layer that is not there, naming those that are.
    """
    known = model.sites
    asked = [sites] if isinstance(sites, str) else list(sites)
    found: set[str] = set()
    for site in asked:
        if not isinstance(site, str):
            raise BadInput(f"A site is named by its address, like 'layers.3.ssm.y', not by a {type(site).__name__}.")
        matches = matching_addresses(model, site, known)
        if not matches:
            raise missing(model, site, known)
        found.update(matches)
    return [address for address in known if address in found]


def matching_addresses(model: Model, site: str, known: list[str]) -> list[str]:
    """Known addresses that one written address stands for."""
    match = re.fullmatch(r"layers\.(\*|-?\d+)\.(.+)", site)
    if match is None:
        return [site] if site in known else []
    layer, name = match.groups()
    name = ALIASES.get(name, name)
    if layer == "*":
        wanted = re.compile(rf"layers\.\d+\.{re.escape(name)}")
        return [address for address in known if wanted.fullmatch(address)]
    index = int(layer) if int(layer) >= 0 else len(model.layers) + int(layer)
    return [address for address in known if address == f"layers.{index}.{name}"]


def missing(model: Model, site: str, known: list[str]) -> SiteNotFound:
    """The error for an address that matches nothing."""
    if site.startswith("layers.*."):
        return SiteNotFound(f"{site}: no layer of this model has it; they have {', '.join(model._names())}.")
    match = re.fullmatch(r"layers\.(-?\d+)\.(.+)", site)
    if match and -len(model.layers) <= int(match[1]) < len(model.layers):
        layer = model.layers[int(match[1])]
        return SiteNotFound(f"{site}: layer {layer.index} ({layer.kind}) has {', '.join(layer.sites)}.")
    if match:
        return SiteNotFound(f"{site}: this model has layers 0 to {len(model.layers) - 1}.")
    close = difflib.get_close_matches(site, known, 3, 0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else "print(model) lists the sites."
    return SiteNotFound(f"There is no site {site!r}; {hint}")


def read_site(model: Model, address: str) -> Tensor:
    """Read a site inside a trace."""
    owner, name = owner_of(model, address)
    return getattr(owner, name)


def write_site(model: Model, address: str, value: Tensor) -> None:
    """Write a site inside a trace."""
    owner, name = owner_of(model, address)
    setattr(owner, name, value)


def owner_of(model: Model, address: str) -> tuple[Any, str]:
    """The view that holds a site, and the site's name there."""
    if not address.startswith("layers."):
        return model, address
    _, index, name = address.split(".", 2)
    layer = model.layers[int(index)]
    part, _, site = name.rpartition(".")
    return (getattr(layer, part) if part else layer), site or name


def shapes_by_address(model: Model) -> dict[str, tuple[str, ...]]:
    """The shape of every site, sizes where they are known, axis names elsewhere; in forward order."""
    layers = {f"layers.{layer.index}.{name}": shape for layer in model.layers for name, shape in layer.shapes.items()}
    return {"embed": model._shapes["embed"], **layers, "logits": model._shapes["logits"]}


def axes_by_address(model: Model, address: str) -> list[str]:
    """Axis names of a site."""
    if not address.startswith("layers."):
        return ["b", "t", "d"]
    _, layer, name = address.split(".", 2)
    return model.layers[int(layer)].axes[name]
