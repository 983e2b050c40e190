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
from .features import Feature, feature_indices, write_site_of
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
    given = [interventions] if isinstance(interventions, (Intervention, Knockout)) else interventions
    for item in given:
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
    feature_id: int | Sequence[int] | None = None,
    *,
    strength: Any = 1.0,
    site: str | None = None,
    positions: Positions = None,
    heads: Any = None,
) -> contextlib.AbstractContextManager[Model]:
    """Add `strength` times a direction to a site, for every trace and generate inside the block.

    Args:
        model: The model.
        direction: A dictionary (anything with ``W_dec``), or a vector that broadcasts over the site.
        feature_id: Which of the dictionary's features; of a list, all directions are added.
        strength: Factor of the direction as it is (decoder directions of our dictionaries have norm 1); for a list of
            features, one number, or one for each.
        site: Where; default: the site the dictionary was trained on (a transcoder: the one it reconstructs).
        positions: Which tokens; default all, generated ones included.
        heads: Which heads, for a site that has them.

    Raises:
        BadInput: For a dictionary without a feature, a feature that is not there, or a vector without a site.
    """
    if isinstance(direction, torch.Tensor):
        if feature_id is not None:
            raise BadInput("feature_id= chooses a feature of a dictionary; a vector has none. Leave it out.")
        if site is None:
            raise BadInput('Name the site to steer, for example site="layers.3.resid_post".')
        return hold(model, Add(site, direction, strength, positions, heads))
    if not isinstance(direction, Direction):
        raise BadInput(f"steer takes a vector or a dictionary with W_dec, not {type(direction).__name__}.")
    chosen = feature_indices(direction, named(direction, feature_id))
    strengths = torch.as_tensor(strength, dtype=direction.W_dec.dtype, device=direction.W_dec.device)
    if strengths.dim() and strengths.shape != (len(chosen),):
        raise BadInput(f"strength= is one number, or one for each of the {len(chosen)} features; not {strength!r}.")
    vector = strengths.expand(len(chosen)) @ direction.W_dec[chosen].detach()
    if site is None:
        site = write_site_of(direction, None, None)
    return hold(model, Add(site, vector, 1.0, positions, heads))


def ablate(
    model: Model,
    site: str | Any,
    feature_id: int | Sequence[int] | None = None,
    *,
    mode: str = "zero",
    strength: Any = 1.0,
    positions: Positions = None,
    heads: Any = None,
    channels: Any = None,
    reference: Tensor | None = None,
) -> contextlib.AbstractContextManager[Model]:
    """Remove what a site carries, or what a feature says there, for every trace and generate inside the block.

    Args:
        model: The model.
        site: Address of the site; or a dictionary, whose feature is then removed at the site it was trained on, with
            all that the dictionary does not explain left as it is (see `features.Feature`).
        feature_id: Which of the dictionary's features, or several.
        mode: As in `Ablate`.
        strength: As in `Ablate`.
        positions: Which tokens; default all, generated ones included.
        heads: Which heads, for a site that has them.
        channels: Which of the last axis.
        reference: As in `Ablate`.

    Raises:
        BadInput: As `hold` and `features.Feature`.
    """
    if isinstance(site, (str, Feature)):
        if feature_id is not None:
            raise BadInput(f"feature_id= chooses a feature of a dictionary, not of {site!r}; give the dictionary.")
    else:
        site = Feature(site, named(site, feature_id))
    return hold(model, Ablate(site, mode, positions, heads, channels, reference, strength=strength))


def named(dictionary: Any, feature_id: int | Sequence[int] | None) -> int | Sequence[int]:
    """The features that were named, if any were."""
    if feature_id is None and not isinstance(dictionary, Direction):
        raise BadInput(f"A site is named by its address, not by a {type(dictionary).__name__}.")
    if feature_id is None:
        raise BadInput(f"feature_id=None; this dictionary has features 0 to {len(dictionary.W_dec) - 1}: name one.")
    return feature_id
