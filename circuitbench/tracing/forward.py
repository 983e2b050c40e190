"""One forward with interventions and nothing around it: what measurements are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import nnsight
import torch

from ..models.lock import lock_of
from .apply import run_plan
from .run import planned

if TYPE_CHECKING:
    from torch import Tensor

    from ..models import Model
    from ..models.prompts import Batch
    from .interventions import Intervention, Knockout


def forward(
    model: Model,
    batch: Batch,
    interventions: Intervention | Knockout | Sequence[Intervention | Knockout] = (),
    sites: Sequence[str] = (),
    remote: bool | str = False,
) -> dict[str, Tensor]:
    """Run a batch once; returns the logits and the sites asked for, by address, columns as padded in the batch."""
    plan = planned(model, interventions, sites)
    index, lengths, inputs = batch.index, batch.lengths, batch.inputs(model)
    with lock_of(model), torch.no_grad():
        with model.trace(**inputs, remote=remote):
            found = nnsight.save(run_plan(model, plan, index, lengths, False))
    return found
