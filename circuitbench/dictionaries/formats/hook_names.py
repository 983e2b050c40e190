"""What SAELens calls a site: the module of the Hugging Face model whose output it is, where there is one.

SAELens reads a model of transformers through hooks on modules: a hook name is a module's path, what it reads is the
module's output, or the first of several. Inputs, tensors in the middle of a forward and states have no name there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from circuitbench.dictionaries.base import Dictionary
from circuitbench.models.spots import Spot
from circuitbench.tracing.addresses import owner_of, resolve

if TYPE_CHECKING:
    from circuitbench.models import Model


def record(dictionary: Dictionary, model: Model) -> None:
    """Write down what SAELens calls the sites of a dictionary, where it has names for them."""
    addresses = {"hook_name": dictionary.site}
    if dictionary.transcodes:
        addresses["hook_name_out"] = dictionary.site_out
    named = {key: hook_name(model, address) for key, address in addresses.items() if address is not None}
    found = {key: name for key, name in named.items() if name is not None}
    if found:
        dictionary.metadata["saelens"] = dictionary.metadata.get("saelens", {}) | found


def hook_name(model: Model, address: str) -> str | None:
    """The module whose output is this site, by its path in `model.hf`; None if the site is no module's output.

    Raises:
        SiteNotFound: no such site.
    """
    owner, name = owner_of(model, resolve(model, address)[0])
    spot = getattr(owner, "_spots", {}).get(name)
    if not isinstance(spot, Spot):
        return None
    location, later = spot.locations
    changed = (spot.index, spot.scale, spot.divided) != (None, None, None) or spot.trim or spot.raw != spot.canonical
    if changed or location != later or ".source." in location or not location.endswith(".output"):
        return None
    if spot.element not in (None, 0):
        return None
    module: Any = spot.envoy._module
    return next((path for path, other in model.hf.named_modules() if other is module), None)
