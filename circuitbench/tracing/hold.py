"""Interventions that stay on: `hold`, and its two common forms `steer` and `ablate`.

Inside the with-block they apply to every trace and every generation of the model, the user's own ones included, prompt
and generated tokens alike. They are nnsight edits, so they travel with the model to a remote server.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadInput
from ..models.events import every_forward
from ..models.lock import lock_of
from .apply import apply_at, columns_of
from .forward import planned
from .interventions import Ablate, Add, Direction, Intervention, Knockout

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from ..models import Model
    from .selection import Positions


@contextlib.contextmanager
def hold(model: Model, interventions: Intervention | Knockout | Sequence[Intervention | Knockout]) -> Iterator[Model]:
    """Keep interventions on for every trace and generate inside the block.

    Args:
        model: The model.
        interventions: What to change. Positions count each prompt's own tokens; generated tokens count on, and are
            reached by ``positions=None`` and by slices with an open end.

    Raises:
        BadInput: For an ``Ablate`` by mean or resampling without a reference: one token at a time has nothing to
            average. In the block, for positions of a run that starts from a cache which does not tell its length.
    """
    plan = [(address, items) for address, items, _ in planned(model, interventions, []) if items]
    for _, items in plan:
        for item in items:
            if isinstance(item, Ablate) and item.pools:
                raise BadInput(
                    f'{item!r}: while it is held, mode="{item.mode}" needs reference= (activations of the site, for '
                    "example from capture), because a generated token comes alone."
                )
    counted = any(item.counts for _, items in plan for item in items)
    with lock_of(model):
        edits = len(model.nn._edits)
        with model.nn.edit(inplace=True):
            columns, so_far = None, 0
            for _ in every_forward():
                columns, so_far = columns_of(model, columns, so_far, counted)
                for address, items in plan:
                    apply_at(model, address, items, columns)
        ours = model.nn._edits[edits:]
    try:
        with warnings.catch_warnings():
            # The edit waits for a next forward when the last one is over; that is how it ends, and not worth a warning.
            warnings.filterwarnings("ignore", message=f"'{re.escape(model.nn.path)}.input.* was never reached")
            yield model
    finally:
        for edit in ours:
            model.nn._edits.remove(edit)


def steer(
    model: Model,
    direction: Direction | Float[Tensor, " d"],
    feature_id: int | None = None,
    *,
    strength: float = 1.0,
    site: str | None = None,
    positions: Positions = None,
    heads: Any = None,
) -> contextlib.AbstractContextManager[Model]:
    """Add `strength` times a direction to a site, for every trace and generate inside the block.

    Args:
        model: The model.
        direction: A dictionary (anything with ``W_dec``), or a vector that broadcasts over the site.
        feature_id: Which of the dictionary's features.
        strength: Factor of the direction as it is (decoder directions of our dictionaries have norm 1).
        site: Where; default: the site the dictionary was trained on.
        positions: Which tokens; default all, generated ones included.
        heads: Which heads, for a site that has them.

    Raises:
        BadInput: For a dictionary without a feature, a feature that is not there, or a vector without a site.
    """
    if isinstance(direction, torch.Tensor):
        if feature_id is not None:
            raise BadInput("feature_id= chooses a feature of a dictionary; a vector has none. Leave it out.")
        vector = direction
    else:
        if not isinstance(direction, Direction):
            raise BadInput(f"steer takes a vector or a dictionary with W_dec, not {type(direction).__name__}.")
        size = direction.W_dec.shape[0]
        if feature_id is None or not 0 <= feature_id < size:
            raise BadInput(f"feature_id={feature_id!r}; this dictionary has features 0 to {size - 1}.")
        vector = direction.W_dec[feature_id].detach()
        site = site or getattr(direction, "site", None)
    if site is None:
        raise BadInput('Name the site to steer, for example site="layers.3.resid_post".')
    return hold(model, Add(site, vector, strength, positions, heads))


def ablate(
    model: Model,
    site: str,
    *,
    mode: str = "zero",
    positions: Positions = None,
    heads: Any = None,
    channels: Any = None,
    reference: Tensor | None = None,
) -> contextlib.AbstractContextManager[Model]:
    """Remove what a site carries, for every trace and generate inside the block (see `Ablate`)."""
    return hold(model, Ablate(site, mode, positions, heads, channels, reference))
