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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class WriteBack:
    """What nnsight calls back before the worker moves on (it asks for ``fn``, ``location`` and ``occurrence``)."""

    def __init__(self, fn: Callable[[], Any], location: str, occurrence: int) -> None:
        self.fn = fn
        self.location = location
        self.occurrence = occurrence
        self.view = None
        self.key = (self, location, occurrence)


def worker(location: str) -> Any:
    """The running block's worker; outside of a trace there is none, and nothing to read."""
    try:
        return Mediator.current(location)
    except ValueError:
        raise ValueError(
            f"{location} can only be read or written while the model runs: inside `with model.trace(prompt):` "
            "or `with model.generate(prompt):`."
        ) from None


def notes(location: str) -> dict:
    """A dictionary that lives as long as this worker's run: what its views have read so far."""
    greenlet = worker(location).worker
    if not hasattr(greenlet, "circuitbench"):
        greenlet.circuitbench = {}
    return greenlet.circuitbench


def flush(mediator: Mediator) -> None:
    """Let a waiting write-back through now, keeping the step that ``tracer.iter`` has pinned for what comes next."""
    pinned = mediator.iteration
    mediator.flush()
    mediator.iteration = pinned


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


def own_rows(location: str) -> slice:
    """The rows of the batch that belong to the running block (all of them, unless several invokes share the run)."""
    mediator = worker(location)
    batcher, group = mediator.interleaver.batcher, mediator.batch_group
    if batcher is None or not batcher.batching or group is None:
        return slice(None)
    return slice(group[0], group[0] + group[1])


def read_whole(location: str) -> Any:
    """The value at `location`, for the whole batch."""
    mediator = worker(location)
    flush(mediator)
    group, mediator.batch_group = mediator.batch_group, None
    try:
        return Mediator.value(location)
    finally:
        mediator.batch_group = group


def write_whole(location: str, value: Any) -> None:
    """Replace the value at `location`, for the whole batch."""
    mediator = worker(location)
    flush(mediator)
    group, mediator.batch_group = mediator.batch_group, None
    try:
        Mediator.swap(location, value)
    finally:
        mediator.batch_group = group


def write_back(location: str, occurrence: int, fn: Callable[[], None]) -> WriteBack:
    """Call `fn` when the block moves on; `fn` reads and writes by itself, at this visit of its locations.

    nnsight swaps in whatever its callback returns, so it is handed what is at `location` after `fn`.
    """
    mediator = worker(location)

    def finish() -> Any:
        pinned, mediator.iteration = mediator.iteration, occurrence
        try:
            fn()
            return Mediator.value(location)
        finally:
            mediator.iteration = pinned

    mediator.transform = WriteBack(finish, location, occurrence)
    return mediator.transform


def waiting(location: str) -> WriteBack | None:
    """The write-back that the block has pending, if any."""
    return worker(location).transform
