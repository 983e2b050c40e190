"""Running a prefix, and starting a run from its state."""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from ..errors import BadInput, UnsupportedModel
from .caches import CacheKind, CacheParams, MiniMaxKind, RecurrentGemmaKind, RWKV7Kind, RwkvKind, XlstmKind
from .jobs import check_place
from .lock import lock_of
from .marks import about
from .prompts import encode, padding_leak, takes_position_ids
from .starting import Start, start_run, taken
from .state import State, in_order
from .views import SSMView

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from .model import Model
    from .prompts import Batch, Prompts

KINDS = {
    "minimax": MiniMaxKind,
    "xlstm": XlstmKind,
    "recurrent_gemma": RecurrentGemmaKind,
    "rwkv": RwkvKind,
    "rwkv7": RWKV7Kind,
}


def run_prefix(model: Model, prompt: Prompts, *, remote: bool | str = False) -> State:
    """Run prompts, and keep what the tokens after them depend on.

    Args:
        model: The model.
        prompt: A prompt, or several (see `prompts.encode`); `continue_from` goes on with each of them.
        remote: ``True``, ``"local"`` or a server's address: where to run.

    Returns:
        The state after the last token.

    Raises:
        UnsupportedModel: For a model that keeps its state where circuitbench does not know.
        BadInput: For prompts that do not fit.
    """
    check_place(model, remote)
    kind = kind_of(model)
    batch = encode(model, prompt)
    # Where padding would leak into a prompt's first tokens, prompts of one length run together.
    groups = [list(range(len(batch.input_ids)))]
    if batch.padded and padding_leak(model):
        groups = by_length(batch.lengths)
    if by_row(model):
        groups = apart(groups, batch.lengths)
    states = [prefix(model, kind, picked(batch, rows), remote) for rows in groups]
    return in_order(states, groups)


def prefix(model: Model, kind: CacheKind, batch: Batch, remote: bool | str) -> State:
    """`run_prefix`, of one batch."""
    start = Start(kind, None, batch.attention_mask, batch.input_ids.shape[1], False, False, [], [])
    with lock_of(model), torch.no_grad(), started(model, start):
        with model.trace(**batch.inputs(model), use_cache=True, remote=remote):
            found = nnsight.save(taken(model, start))
    return State(found, batch.input_ids, batch.attention_mask, about(model))


def advanced(model: Model, state: State, batch: Batch, rows: list[int], remote: bool | str) -> State:
    """The state after some more tokens of some of its prompts (those `rows`); the others stay where they are."""
    groups = by_length(batch.lengths)
    if by_row(model):
        groups = apart(groups, batch.lengths)
    states, order = [], []
    for group in groups:
        part, before = picked(batch, group), state.rows([rows[row] for row in group])
        start = starting_from(model, before, part.input_ids.shape[1])
        with lock_of(model), torch.no_grad(), started(model, start):
            with model.trace(input_ids=part.input_ids, use_cache=True, remote=remote):
                found = nnsight.save(taken(model, start))
        states.append(followed(before, part, found))
        order.append([rows[row] for row in group])
    rest = [row for row in range(len(state.input_ids)) if row not in rows]
    if rest:
        states.append(state.rows(rest))
        order.append(rest)
    return in_order(states, order)


def followed(state: State, batch: Batch, tensors: dict[str, Tensor]) -> State:
    """The state of what a state's prompts and a batch of suffixes make together."""
    ids = torch.cat([state.input_ids, batch.input_ids], 1)
    mask = torch.cat([state.attention_mask, batch.attention_mask], 1)
    return State(tensors, ids, mask, dict(state.about))


@contextlib.contextmanager
def started(model: Model, start: Start) -> Iterator[None]:
    """Let the runs inside the block start from a state, before every other block of theirs."""
    with lock_of(model):
        edits = len(model.nn._edits)
        with model.nn.edit(inplace=True):
            start_run(model, start)
        ours = model.nn._edits.pop(edits)
        model.nn._edits.insert(0, ours)
    try:
        with warnings.catch_warnings():
            # The edit waits for a next forward when the last one is over; that is how it ends, and not worth a warning.
            warnings.filterwarnings("ignore", message=f"'{re.escape(model.nn.path)}.input.* was never reached")
            yield
    finally:
        model.nn._edits.remove(ours)


def starting_from(model: Model, state: State, length: int) -> Start:
    """What a run needs that goes on from a state with `length` tokens of each prompt."""
    kind = kind_of(model)
    scans = [
        (layer.index, name, part)
        for layer in model.layers
        for name, part in layer._parts.items()
        if isinstance(part, SSMView)
    ]
    restarted = [(layer, name) for layer, name, part in scans if not part._scan.continues]
    return Start(
        kind,
        dict(state._tensors),
        state.attention_mask,
        length,
        takes_position_ids(model),
        any(name.endswith(".attn.k") for name in state),
        restarted,
        limits(model),
    )


def limits(model: Model) -> list[tuple[int, str, float, float]]:
    """(layer, part, low, high) of scans whose dt has limits; transformers does not apply them to single steps."""
    found = []
    for layer in model.layers:
        for name, part in layer._parts.items():
            if isinstance(part, SSMView) and "dt" in part.sites:
                low, high = getattr(part._envoy._module, "time_step_limit", None) or (0.0, torch.inf)
                if low > 0 or high < torch.inf:
                    found.append((layer.index, name, float(low), float(high)))
    return found


def by_row(model: Model) -> bool:
    """Whether one token that follows a cached past has to come without others beside it in the batch."""
    return KINDS.get(model.hf.config.model_type, CacheKind).by_row


def kind_of(model: Model) -> CacheKind:
    """The adapter for a model's cache.

    Raises:
        UnsupportedModel: For a model whose forward takes no cache that is known.
    """
    parts = []
    for layer in model.layers:
        recurrent = [name for name in layer._parts if name not in ("attn", "mlp", "moe")]
        parts.append(recurrent[0] if recurrent else "ssm")
    hf: Any = model.hf
    if hf.config.model_type in KINDS:
        return KINDS[hf.config.model_type](parts)
    arguments = inspect.signature(type(hf).forward).parameters
    for kind in (CacheKind, CacheParams):
        if kind.argument in arguments:
            return kind(parts)
    raise UnsupportedModel(
        f"{type(hf).__name__}.forward takes neither past_key_values nor cache_params, so circuitbench does not know "
        "where it keeps its state between two forwards; run the whole sequence at once."
    )


def fitted(state: State, count: int) -> State:
    """A state for this number of suffixes.

    Raises:
        BadInput: If it is of another number of prompts, and not of one.
    """
    rows = len(state.input_ids)
    if rows == count:
        return state
    if rows == 1:
        return state.repeat(count)
    raise BadInput(
        f"The state is of {rows} prompts, and there {'is 1 suffix' if count == 1 else f'are {count} suffixes'}; give "
        f"{rows}, one for each, or a state of one prompt (state.rows([0])), which all suffixes follow."
    )


def check_fits(model: Model, state: State) -> None:
    """Refuse a state of another model.

    Raises:
        BadInput: Saying in what they differ.
    """
    if not isinstance(state, State):
        raise BadInput(f"A state comes from run_prefix or load_state; this is a {type(state).__name__}.")
    here, there = about(model), state.about
    again = "Run the prefix on this model: run_prefix(model, prompt)."
    if there["model_type"] != here["model_type"]:
        raise BadInput(f"This state is of a {there['model_type']}, and the model is a {here['model_type']}. {again}")
    if there["config"] != here["config"]:
        raise BadInput(f"This state is of a {there['model_type']} of another configuration than the model's. {again}")
    if there["dtype"] != here["dtype"]:
        raise BadInput(f"This state is of a model in {there['dtype']}, and the model is in {here['dtype']}. {again}")
    if there["weights"] and here["weights"] and there["weights"] != here["weights"]:
        raise BadInput(f"This state is of a {there['model_type']} with other weights than the model's. {again}")


# Batches --------------------------------------------------------------------------------------------------------------


def by_length(lengths: Int[Tensor, " b"]) -> list[list[int]]:
    """Which prompts are of one length."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths.tolist()):
        groups.setdefault(length, []).append(row)
    return list(groups.values())


def apart(groups: list[list[int]], lengths: Int[Tensor, " b"]) -> list[list[int]]:
    """The same groups, but that prompts of one token run alone."""
    return [one for rows in groups for one in ([[row] for row in rows] if lengths[rows[0]] == 1 else [rows])]


def picked(batch: Batch, rows: list[int]) -> Batch:
    """Some prompts of a batch, without columns that are padding in all of them."""
    return type(batch)(batch.input_ids[rows], batch.attention_mask[rows]).rows(0, len(rows))
