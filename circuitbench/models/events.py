"""Meeting the model at a location: the few calls that every view is made of.

nnsight runs the user's block as a worker that *parks* at a location until the model gets there. Two things are added to
that here, and nothing else in the package touches nnsight's machinery:

* **Whole-batch reads.** With several invokes, nnsight narrows every tensor whose first axis happens to have the size of
  the batch, so eight prompts on a model with eight heads would slice the parameter A. Views read the whole batch and
  narrow what they know to have a batch axis.
* **Write-backs.** What a user holds is often computed (transposed, scaled, discretised). A write-back is called when
  the block next asks the model for anything, or ends, while the model still waits at the location: in-place edits reach
      it.

This module travels to remote servers by value: `nnsight.intervention.envoy` is on NDIF's list of importable modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight.intervention.envoy import Mediator

from ..errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nnsight.intervention.envoy import Envoy
    from torch import Tensor

LATEST = 1024  # tensors whose late edits are noticed


class WriteBack:
    """What is called before the block moves on, in the place of nnsight's own; `key` is what nnsight tells views by."""

    def __init__(self, fn: Callable[[], None], location: str, occurrence: int) -> None:
        self.fn = fn
        self.location = location
        self.occurrence = occurrence
        self.view = None
        self.key = (self, location, occurrence)


def worker(location: str) -> Any:
    """The running block's worker; outside of a trace there is none, and nothing to read."""
    try:
        mediator = Mediator.current(location)
    except ValueError:
        raise BadInput(
            f"{location} can only be read or written while the model runs: inside `with model.trace(prompt):` "
            "or `with model.generate(prompt):`."
        ) from None
    mediator.flush = flush  # nnsight calls it before anything that the block asks for, and at its end
    return mediator


def flush() -> None:
    """Let a waiting write-back through, before the block moves on.

    Ours parks at its location as often as it has to, or not at all, and swaps in by itself. nnsight's `flush` looks up
    who to hand its swap to before it calls the write-back; were that to park, another block (one that has released this
    one from a barrier) could be handed the swap instead of the model.
    """
    mediator = Mediator.current("a write-back")
    waiting = mediator.transform
    if waiting is not None and not isinstance(waiting, WriteBack):
        Mediator.flush(mediator)
    elif waiting is not None:
        mediator.transform = None
        pinned, mediator.iteration = mediator.iteration, waiting.occurrence
        try:
            waiting.fn()
        finally:
            mediator.iteration = pinned  # what ``tracer.iter`` has pinned is for what comes next
    check_sealed(mediator)


def handed_out(run: Any) -> list:
    """What views have handed out in this run: [worker, tensor, address, version once it has moved on]."""
    if not hasattr(run, "circuitbench_handed_out"):
        run.circuitbench_handed_out = []
    return run.circuitbench_handed_out


def hand_out(tensor: Tensor, address: str) -> Tensor:
    """Remember a tensor that shares the model's memory: it may be edited in place until the block moves on."""
    if not tensor.is_inference():
        forget(tensor)
        mediator = worker(address)
        handed_out(mediator.interleaver.batcher).append([mediator, tensor, address, None])
    return tensor


def seal(tensor: Tensor, address: str) -> None:
    """From here on, an edit of `tensor` in place would not reach the model any more."""
    if not tensor.is_inference():
        forget(tensor)
        mediator = worker(address)
        handed_out(mediator.interleaver.batcher).append([mediator, tensor, address, tensor._version])


def forget(tensor: Tensor) -> None:
    """Another view of the same memory is in use: edits of it are no edits of the earlier one."""
    entries = handed_out(worker("a site").interleaver.batcher)
    memory = tensor.untyped_storage().data_ptr()
    entries[:] = [entry for entry in entries[-LATEST:] if entry[1].untyped_storage().data_ptr() != memory]


def check_sealed(mediator: Any) -> None:
    """Raise for an in-place edit that came after the model had moved on, where it would be lost without a word."""
    for entry in handed_out(mediator.interleaver.batcher):
        block, tensor, address, version = entry
        if block is not mediator:
            continue
        if version is None:
            entry[3] = tensor._version
        elif tensor._version != version:
            raise BadInput(
                f"{address} was edited in place after the model had moved past it, so that the edit could not "
                "reach the model; edit a site before you ask for a later one (or a .clone() of it)."
            )


def notes(location: str) -> dict:
    """A dictionary that lives as long as this worker's run: what its views have read so far."""
    greenlet = worker(location).worker
    if not hasattr(greenlet, "circuitbench"):
        greenlet.circuitbench = {}
    return greenlet.circuitbench


def wanted(location: str) -> int:
    """Which visit of `location` a request made now would be served at."""
    return worker(location).wanted(location)


def follows(location: str) -> bool:
    """Whether requests follow the model from visit to visit (inside ``tracer.iter``), not ask for a fixed one."""
    return worker(location).iteration is None


def every_forward() -> Iterator[int]:
    """Steps of a run, one for every forward the model makes, until it makes no more (as ``tracer.iter[:]``).

    A block that is held as an edit travels with the model, and must not name the tracer it was written under.
    """
    mediator = worker("a step")
    step = 0
    while True:
        mediator.iteration = step
        yield step
        step += 1


def passed(location: str, occurrence: int) -> bool:
    """Whether the model is already past this visit of `location`."""
    return worker(location).occurrence(location) > occurrence


def before(location: str, address: str) -> None:
    """Refuse to ask for `address` when the model has moved past this location."""
    if passed(location, wanted(location)):
        raise BadInput(
            f"{address}: the model had moved past it when it was asked for; ask for sites in the order in which the "
            "model reaches them (print(model) lists them so)."
        )


def instrumented(envoy: Envoy) -> bool:
    """Whether nnsight offers the operations inside this module's forward, from the next time it runs."""
    return bool(envoy._module.__dict__["__nnsight__"].sourced)


def own_rows(location: str, size: int) -> slice:
    """The rows of the batch that belong to the running block (all of them, unless several invokes share the run).

    Args:
        location: Where, for errors.
        size: Rows of the tensor: those of the prompts, times the beams or sequences that are generated for each.
    """
    mediator = worker(location)
    batcher, group = mediator.interleaver.batcher, mediator.batch_group
    if batcher is None or not batcher.batching or group is None:
        return slice(None)
    copies, rest = divmod(size, batcher.total)
    if rest or not copies:
        raise BadInput(f"{location} has {size} rows, which do not belong to the {batcher.total} prompts of this batch.")
    return slice(group[0] * copies, (group[0] + group[1]) * copies)


def read_whole(location: str, address: str = "") -> Any:
    """The value at `location`, for the whole batch; `address` is the site it is wanted for, for errors."""
    mediator = worker(location)
    flush()
    before(location, address or location)
    group, mediator.batch_group = mediator.batch_group, None
    try:
        return Mediator.value(location)
    finally:
        mediator.batch_group = group


def write_whole(location: str, value: Any) -> None:
    """Replace the value at `location`, for the whole batch."""
    mediator = worker(location)
    flush()
    group, mediator.batch_group = mediator.batch_group, None
    try:
        Mediator.swap(location, value)
    finally:
        mediator.batch_group = group


def at_visit(occurrence: int, fn: Callable[..., Any], location: str, *given: Any) -> Any:
    """Call `fn` with a location, for this visit of it, whatever step the block is pinned to."""
    mediator = worker(location)
    pinned, mediator.iteration = mediator.iteration, occurrence
    try:
        return fn(location, *given)
    finally:
        mediator.iteration = pinned


def write_back(location: str, occurrence: int, fn: Callable[[], None]) -> WriteBack:
    """Call `fn` when the block moves on; `fn` reads and writes by itself, at this visit of its locations."""
    mediator = worker(location)
    mediator.transform = WriteBack(fn, location, occurrence)
    return mediator.transform


def waiting(location: str) -> WriteBack | None:
    """The write-back that the block has pending, if any."""
    return worker(location).transform
