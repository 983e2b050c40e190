"""A prompt in, text out, through nnsight: whatever is held on the model holds here too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadInput
from .guards import REORDERED
from .jobs import Pending, check_place
from .lock import lock_of
from .prefix import advanced, by_length, by_row, check_fits, fitted, kind_of, limits, picked, started, starting_from
from .prompts import Batch, check_length, check_padding, encode, padding_leak
from .starting import Start
from .state import State

if TYPE_CHECKING:
    from .model import Model
    from .prompts import Prompts


UNBEAMED = ("rwkv", "xlstm")  # families whose states transformers keeps in forms of their own


def generate_text(
    model: Model,
    prompts: Prompts,
    *,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    seed: int | None = None,
    state: State | None = None,
    remote: bool | str = False,
    blocking: bool = True,
) -> Any:
    """Continue prompts.

    Where transformers' own steps leave out the limits of dt (Zamba2, Nemotron-H), they are applied here: what is
    generated follows from the prompt as from a run of the whole sequence.

    Args:
        model: The model.
        prompts: What to continue (see `prompts.encode`).
        max_new_tokens: Tokens to add at most.
        temperature: 0 takes the most likely token every time; above, tokens are sampled.
        top_k, top_p: Sample from the `top_k` most likely tokens, from the smallest set with probability `top_p`.
        num_beams: More than 1 searches that many beams.
        seed: Of the sampling.
        state: What the prompts follow, from `run_prefix`: of one prompt, or of as many as there are prompts.
        remote: ``True``, ``"local"`` or a server's address: where to run.
        blocking: ``False`` sends the run to the server and returns at once: a `Pending`.

    Returns:
        The continuation without the prompt; a list for a list of prompts.

    Raises:
        BadInput: For settings that contradict each other, or prompts that do not fit.
    """
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens={max_new_tokens}; ask for at least 1.")
    if (
        temperature < 0
        or num_beams < 1
        or (top_k is not None and top_k < 1)
        or (top_p is not None and not 0 < top_p <= 1)
    ):
        raise BadInput(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}, num_beams={num_beams}: temperature is 0 or "
            "more, top_k and num_beams are 1 or more, and top_p is above 0 and at most 1."
        )
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise BadInput(f"temperature={temperature}: sampling with top_k or top_p needs a temperature above 0.")
    if num_beams > 1 and temperature > 0:
        raise BadInput("Beam search takes the most likely continuation; leave temperature at 0, or num_beams at 1.")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p if top_p is not None else 1.0}
    if num_beams > 1:
        settings["num_beams"] = num_beams
    check_place(model, remote, blocking)
    if num_beams > 1 and model.hf.config.model_type in UNBEAMED:
        raise BadInput(
            f"transformers cannot search beams with {model.hf.config.model_type}, whose states it does not reorder; "
            "leave num_beams at 1."
        )
    if num_beams > 1 and remote not in (False, "local") and model.hf.config.model_type in REORDERED:
        raise BadInput(
            f"transformers on the server does not reorder the states of {model.hf.config.model_type} with the beams; "
            "leave num_beams at 1, or search beams here with remote=False."
        )
    batch = encode(model, prompts, special_tokens=state is None)
    if state is not None:
        check_fits(model, state)
        state = fitted(state, len(batch.input_ids))
    before = 0 if state is None else state.lengths
    longest = int((batch.lengths + before).max()) + max_new_tokens
    check_length(model, longest, f"With max_new_tokens={max_new_tokens}, the longest prompt becomes")
    groups = together(model, batch, state)
    if len(groups) > 1 and not blocking:
        raise BadInput(
            f"These prompts cannot run in one batch of {model.hf.config.model_type}; leave blocking=True, or send them "
            "one by one."
        )
    runs = []
    for rows in groups:
        part, after = picked(batch, rows), None if state is None else state.rows(rows)
        if after is not None:
            part, after = all_but_last(model, part, after, remote)
        runs.append(generated(model, part, after, settings, seed, remote, blocking))
    single = is_single(prompts)

    def finish(values: list[dict[str, Any]]) -> str | list[str]:
        """Ids as text."""
        texts = [""] * len(batch.input_ids)
        for rows, (width, _), value in zip(groups, runs, values, strict=True):
            for row, ids in zip(rows, value["ids"], strict=True):
                texts[row] = decode(model, ids[width:].tolist())
        return texts[0] if single else texts

    return finish([{"ids": ids} for _, ids in runs]) if blocking else Pending([sent for _, sent in runs], finish)


def together(model: Model, batch: Batch, state: State | None) -> list[list[int]]:
    """Which prompts run in one batch: all, but where padding or other prompts would change them."""
    if by_row(model):
        return [[row] for row in range(len(batch.input_ids))]
    lengths = batch.lengths if state is None else batch.lengths + state.lengths
    if state is None:
        check_padding(model, batch)
    if padding_leak(model) or model.hf.config.model_type == "minimax":  # whose steps mask the wrong keys
        return by_length(lengths)
    return [list(range(len(lengths)))]


def all_but_last(model: Model, batch: Batch, state: State, remote: bool | str) -> tuple[Batch, State]:
    """Whole prompts, and the state before their last tokens, which transformers can go on from token by token."""
    longer = [row for row, length in enumerate(batch.lengths.tolist()) if length > 1]
    last = batch.input_ids[:, -1:]
    if longer:
        ids, mask = (value[longer, :-1] for value in (batch.input_ids, batch.attention_mask))
        state = advanced(model, state, Batch(ids, mask), longer, remote)
    ids, mask = torch.cat([state.input_ids, last], 1), torch.cat([state.attention_mask, torch.ones_like(last)], 1)
    return Batch(ids, mask), state


def generated(
    model: Model,
    batch: Batch,
    state: State | None,
    settings: dict[str, Any],
    seed: int | None,
    remote: bool | str,
    blocking: bool,
) -> tuple[int, Any]:
    """One batch: how wide the prompts are, and the ids (or, not blocking, the backend that will have them)."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    start: Any = None
    if state is not None:
        start = starting_from(model, state, 1)
    elif limited := limits(model):
        start = Start(kind_of(model), None, batch.attention_mask, 0, False, False, [], limited)
    with (
        lock_of(model),
        torch.no_grad(),
        forked(seed),
        contextlib.nullcontext() if start is None else started(model, start),
    ):
        with model.generate(**inputs, **settings, remote=remote, blocking=blocking) as tracer:
            if seed is not None:
                torch.manual_seed(seed)  # in the block, so that it happens where the model runs
            ids = tracer.result.save()
    return batch.input_ids.shape[1], ids if blocking else tracer.backend


def is_single(prompts: Prompts) -> bool:
    """Whether one prompt was given rather than a list of them."""
    if isinstance(prompts, torch.Tensor):
        return prompts.dim() == 1
    return isinstance(prompts, str) or (isinstance(prompts, Sequence) and isinstance(prompts[0], int))


@contextlib.contextmanager
def forked(seed: int | None) -> Iterator[None]:
    """Leave the caller's random state as it was, where the block seeds it."""
    with torch.random.fork_rng(enabled=seed is not None):
        yield


def decode(model: Model, ids: list[int]) -> str:
    """Generated ids as text, up to the end of text."""
    assert model.tokenizer is not None  # `load_model` gives every model one
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))
