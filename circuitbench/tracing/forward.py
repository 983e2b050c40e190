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
    for item in items:
        for address in targets(model, item):
            by_address.setdefault(address, []).append(item)
    wanted = {*sites, "logits"}
    return [(a, by_address.get(a, []), a in wanted) for a in model.sites if a in by_address or a in wanted]


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
    addresses = resolve(model, item.site)
    for address in addresses:
        if address.endswith(".ssm.mixing"):
            raise ReadOnlySite(
                f"{address} cannot be written; use Knockout(sources, destinations), or write x, B, C or decay."
            )
    return addresses
