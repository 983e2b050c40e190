"""`generate_text`: continue prompts, with or without interventions."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from ..models.generation import generate_text as continued
from .hold import hold

if TYPE_CHECKING:
    from ..models import Model
    from ..models.jobs import Pending
    from ..models.prompts import Prompts
    from .interventions import Intervention, Knockout


@overload
def generate_text(
    model: Model, prompts: Prompts, *, blocking: Literal[False], **settings: Any
) -> Pending[str | list[str]]: ...


@overload
def generate_text(model: Model, prompts: str, **settings: Any) -> str: ...


@overload
def generate_text(model: Model, prompts: Prompts, **settings: Any) -> Any: ...


def generate_text(
    model: Model,
    prompts: Prompts,
    *,
    interventions: Intervention | Knockout | Sequence[Intervention | Knockout] = (),
    **settings: Any,
) -> Any:
    """Continue prompts while interventions hold, for the prompt and every generated token.

    Args:
        model: The model.
        prompts: What to continue (see `models.prompts.encode`).
        interventions: What to change.
        **settings: ``max_new_tokens``, ``temperature``, ``top_k``, ``top_p``, ``num_beams``, ``seed``, ``state``,
            ``remote``, ``blocking``: as in `Model.generate_text`.

    Returns:
        The continuation without the prompt; a list for a list of prompts.

    Raises:
        BadInput: For settings that contradict each other, or prompts that do not fit.
    """
    with hold(model, interventions) if interventions else contextlib.nullcontext():
        return continued(model, prompts, **settings)
