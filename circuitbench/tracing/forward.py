"""One forward with interventions and nothing around it: what measurements are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from ..errors import BadInput, ReadOnlySite
from ..models.jobs import check_place
from ..models.lock import lock_of
from .addresses import owner_of, resolve
from .apply import run_plan
from .features import FeatureEdit, Together
from .interventions import Intervention, Knockout
from .selection import Columns

if TYPE_CHECKING:
    from ..models import Model
    from ..models.prompts import Batch


def forward(
    model: Model,
    batch: Batch,
    interventions: Intervention | Knockout | Sequence[Intervention | Knockout] = (),
    sites: Sequence[str] = (),
    remote: bool | str = False,
    blocking: bool = True,
) -> Any:
    """Run a batch once.

    Returns:
        The logits and the sites asked for, by address, columns as padded in the batch; with ``blocking=False``, the
        backend that fetches them (as ``found``).
    """
    check_place(model, remote, blocking)
    plan = planned(model, interventions, sites)
    columns, inputs = Columns(batch.columns(model), batch.lengths), batch.inputs(model)
    with lock_of(model), torch.no_grad():
        with model.trace(**inputs, remote=remote, blocking=blocking) as sent:
            found = nnsight.save(run_plan(model, plan, columns))
    return found if blocking else sent.backend


def planned(
    model: Model, interventions: Intervention | Knockout | Sequence[Intervention | Knockout], sites: Sequence[str]
) -> list[tuple[str, list[Any], bool]]:
    """Interventions and wanted sites in the order the model reaches them; logits are always wanted."""
    if not isinstance(interventions, (Intervention, Knockout, Sequence)):
        raise BadInput(f"Interventions are one, or a list of them, not {type(interventions).__name__}.")
    items = [interventions] if isinstance(interventions, (Intervention, Knockout)) else list(interventions)
    by_address: dict[str, list[Any]] = {}
    edits: list[Together] = []  # in the making: what comes next in the list may join them
    for item in items:
        addresses = targets(model, item)
        feature = getattr(item, "feature", None)
        key = (feature.dictionary, addresses[0], addresses[-1]) if feature is not None else None
        joined = next((edit for edit in edits if key is not None and edit.joins(*key)), None)
        edits = [edit for edit in edits if edit is joined or not {edit.read, edit.write} & set(addresses)]
        if key is not None and joined is None:
            joined = Together(*key)
            edits.append(joined)
            for address in dict.fromkeys(addresses):
                by_address.setdefault(address, []).append(joined)
        if joined is not None:
            joined.items.append(item)
            continue
        for address in addresses:
            by_address.setdefault(address, []).append(item)
    made: dict[Together, FeatureEdit] = {}
    for address, listed in by_address.items():
        for place, item in enumerate(listed):
            if isinstance(item, Together):
                made[item] = made.get(item) or item.edit()
                listed[place] = item.part_at(address, made[item])
    wanted = {*sites, "logits"}
    return [(a, by_address.get(a, []), a in wanted) for a in model.sites if a in by_address or a in wanted]


def feature_targets(model: Model, item: Intervention) -> list[str]:
    """Where a dictionary's features are read, and where their directions are written, if that is elsewhere.

    Raises:
        BadInput: For several sites, or a site that is written before the other is there.
    """
    assert item.feature is not None  # `targets` looked
    found = []
    for site in dict.fromkeys((item.feature.site, item.feature.site_out)):
        addresses = resolve(model, site)
        if len(addresses) != 1:
            raise BadInput(
                f"{site} stands for {len(addresses)} sites; a dictionary belongs to one, such as {addresses[0]}."
            )
        found += addresses
    if found != sorted(found, key=model.sites.index):
        raise BadInput(
            f"{found[1]}, which the transcoder reconstructs, comes before {found[0]}, which it reads, so it is over "
            "when the features are known."
        )
    return found


def mixed_site(model: Model, address: str) -> str:
    """The site of what a scan mixes over positions (x; in some families v), from the site of its y."""
    view = owner_of(model, address)[0]
    stem = address.rpartition(".")[0]
    return next(f"{stem}.{name}" for name, kind in vars(view)["_scan_sites"].items() if kind == "x")


def targets(model: Model, item: Intervention | Knockout) -> list[str]:
    """The addresses an intervention acts at.

    Raises:
        ReadOnlySite: For one that cannot be changed.
    """
    if isinstance(item, Knockout):
        stem = item.site.removesuffix(".mixing").removesuffix(".y")
        return [mixed_site(model, address) for address in resolve(model, f"{stem}.y")]
    if not isinstance(item, Intervention):
        raise BadInput(f"An intervention is Set, Add, Scale, Ablate or Knockout, not {type(item).__name__}.")
    addresses = feature_targets(model, item) if item.feature is not None else resolve(model, item.site)
    for address in addresses:
        if address.endswith(".ssm.mixing"):
            raise ReadOnlySite(
                f"{address} cannot be written; use Knockout(sources, destinations), or write x, B, C or decay."
            )
    return addresses
