"""`continue_from`: go on from a state, with sites read and interventions on what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import nnsight
import torch
import torch.nn.functional as F

from ..models.jobs import check_place
from ..models.lock import lock_of
from ..models.prefix import apart, by_length, by_row, check_fits, fitted, followed, picked, started, starting_from
from ..models.prompts import Batch, check_length, encode
from ..models.starting import taken
from ..models.state import State, in_order
from .addresses import resolve
from .apply import run_plan
from .forward import planned
from .run import Result, joined
from .selection import Columns

if TYPE_CHECKING:
    from torch import Tensor

    from ..models import Model
    from ..models.prompts import Prompts
    from .interventions import Intervention, Knockout


@dataclass
class Continued(Result):
    """What followed from a state: a `Result` about the suffixes, and the state after them.

    Attributes:
        state: The state after each suffix, to go on from.
    """

    state: State = field(kw_only=True, repr=False)


def continue_from(
    model: Model,
    state: State,
    suffix: Prompts,
    *,
    sites: str | Sequence[str] = (),
    interventions: Intervention | Knockout | Sequence[Intervention | Knockout] = (),
    remote: bool | str = False,
) -> Continued:
    """Go on from a state, as if its prompt and the suffix had been run together.

    Text gets no special tokens here. A tokenizer may cut "ab" otherwise than "a" and "b": what is equal is the run of
    the same token ids.

    Args:
        model: The model.
        state: From `run_prefix` or `load_state`, of one prompt or of as many as there are suffixes.
        suffix: What follows (see `prompts.encode`); several suffixes each follow their own prompt, or all the one.
        sites: Sites to return, as they are after the interventions.
        interventions: What to change. Positions count each suffix's own tokens from 0; keys of ``attn.pattern``
            count from the beginning of the prompt.
        remote: ``True``, ``"local"`` or a server's address: where to run.

    Returns:
        Logits, sites and the state, of the suffixes' tokens: `[i, j]` is token j of suffix i.

    Raises:
        BadInput: For a state of another model or of another number of prompts, or a suffix that does not fit.
        SiteNotFound: For a site that is not there.
        ReadOnlySite: For a site that cannot be changed that way.
    """
    check_place(model, remote)
    check_fits(model, state)
    asked = resolve(model, sites) if sites else []
    batch = encode(model, suffix, special_tokens=False)
    state = fitted(state, len(batch.input_ids))
    longest = int((state.lengths + batch.lengths).max())
    check_length(model, longest, "With this suffix, the longest prompt has")
    # Suffixes of one length run together: padding between a state and what follows it would be a part of the prompt.
    groups = by_length(batch.lengths)
    if by_row(model):
        groups = apart(groups, batch.lengths)
    plan, plain = planned(model, interventions, asked), planned(model, (), ())
    pieces, states, moved = [], [], 0.0
    for rows in groups:
        part, before = picked(batch, rows), state.rows(rows)
        found, after = ran(model, before, part, plan, remote)
        if interventions:
            base, _ = ran(model, before, part, plain, remote)
            moved += (found["logits"].cpu().float() - base["logits"].cpu().float()).square().sum().item()
        pieces.append({address: with_all_keys(model, before, part, address, v) for address, v in found.items()})
        states.append(after)
    whole = joined(pieces)
    order = [row for rows in groups for row in rows]
    back = torch.tensor([order.index(row) for row in range(len(order))])
    whole = {address: value[back.to(value.device)] for address, value in whole.items()}
    return Continued(
        whole["logits"],
        {address: whole[address] for address in asked},
        moved**0.5,
        batch.lengths,
        state=in_order(states, groups),
    )


def ran(
    model: Model, state: State, batch: Batch, plan: list[tuple[str, list[Any], bool]], remote: bool | str
) -> tuple[dict[str, Tensor], State]:
    """Suffixes of one length, each after its own prompt: what was asked for, and the state after them."""
    length = batch.input_ids.shape[1]
    start = starting_from(model, state, length)
    columns = suffix_columns(model, state, batch)
    with lock_of(model), torch.no_grad(), started(model, start):
        with model.trace(input_ids=batch.input_ids, use_cache=True, remote=remote):
            found = nnsight.save(run_plan(model, plan, columns))
            after = nnsight.save(taken(model, start))
    return found, followed(state, batch, after)


def suffix_columns(model: Model, state: State, batch: Batch) -> Columns:
    """What the columns of a run that goes on from a state hold: tokens of the suffix, counted from 0.

    What they can attend to is counted from the beginning of the prompt.
    """
    mask = torch.cat([state.attention_mask, batch.attention_mask], 1)
    keys = F.pad(torch.where(mask.bool(), mask.cumsum(1) - 1, -1), (model.meta_tokens, 0), value=-1)
    return Columns(batch.index, batch.lengths, keys=keys, key_lengths=mask.sum(1))


def with_all_keys(model: Model, state: State, batch: Batch, address: str, value: Tensor) -> Tensor:
    """A site's tensor; the keys of attention count each prompt's own tokens from its beginning, NaN past its end.

    What has left a sliding window is not kept, and gets no attention.
    """
    if not address.endswith(".pattern"):
        return value
    lengths = (state.lengths + batch.lengths).tolist()
    out = value.new_full((*value.shape[:-1], max(lengths)), torch.nan)
    for row, length in enumerate(lengths):
        kept = value[row, ..., -length:]
        out[row, ..., :length] = F.pad(kept, (length - kept.shape[-1], 0))
    return out
