"""A prompt in, text out, through nnsight: whatever is held on the model holds here too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadInput
from .jobs import Pending, check_place
from .lock import lock_of
from .prompts import check_length, check_padding, encode

if TYPE_CHECKING:
    from .model import Model
    from .prompts import Prompts


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
    remote: bool | str = False,
    blocking: bool = True,
) -> Any:
    """Continue prompts.

    Args:
        model: The model.
        prompts: What to continue (see `prompts.encode`).
        max_new_tokens: Tokens to add at most.
        temperature: 0 takes the most likely token every time; above, tokens are sampled.
        top_k, top_p: Sample from the `top_k` most likely tokens, from the smallest set with probability `top_p`.
        num_beams: More than 1 searches that many beams.
        seed: Of the sampling.
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
    batch = encode(model, prompts)
    check_padding(model, batch)
    longest = batch.input_ids.shape[1] + max_new_tokens
    check_length(model, longest, f"With max_new_tokens={max_new_tokens}, the longest prompt becomes")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    def finish(values: list[dict[str, Any]]) -> str | list[str]:
        """Ids as text."""
        texts = [decode(model, row[batch.input_ids.shape[1] :].tolist()) for row in values[0]["ids"]]
        return texts[0] if is_single(prompts) else texts

    with lock_of(model), torch.no_grad(), forked(seed):
        with model.generate(**inputs, **settings, remote=remote, blocking=blocking) as tracer:
            if seed is not None:
                torch.manual_seed(seed)  # in the block, so that it happens where the model runs
            ids = tracer.result.save()
    return finish([{"ids": ids}]) if blocking else Pending([tracer.backend], finish)


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
