"""Operations that run as one or several jobs: waiting for them, or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..errors import BadInput, RemoteError
from .remote import wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from .model import Model
    from .remote import JobBackend

T = TypeVar("T")


class Pending(Generic[T]):
    """An operation that was sent with ``blocking=False``.

    Attributes:
        job_ids: The server's ids of its jobs, for `circuitbench.resume`.
    """

    def __init__(self, backends: list[JobBackend], finish: Callable[[list[dict[str, Any]]], T]) -> None:
        self._backends = backends
        self._finish = finish
        self._values: list[dict[str, Any] | None] = [None] * len(backends)

    @property
    def job_ids(self) -> list[str]:
        """The server's ids of the jobs."""
        return [str(backend.job_id) for backend in self._backends]

    def done(self) -> bool:
        """Whether every job is finished; asks the server."""
        for number, backend in enumerate(self._backends):
            if self._values[number] is None:
                self._values[number] = backend()
        return all(values is not None for values in self._values)

    def result(self, timeout: float = 600.0) -> T:
        """Wait for the jobs, and give what the blocking call would have given.

        Args:
            timeout: Seconds for each job.

        Raises:
            RemoteError: If a job failed or did not finish in time; its `partial` holds what the others returned.
        """
        for number, backend in enumerate(self._backends):
            if self._values[number] is None:
                try:
                    self._values[number] = wait(backend, timeout)
                except RemoteError as error:
                    error.partial = [values for values in self._values if values is not None]
                    raise
        return self._finish([values for values in self._values if values is not None])

    def __repr__(self) -> str:
        return f"<pending: jobs {', '.join(self.job_ids)}; .result() waits>"


def check_place(model: Model, remote: bool | str, blocking: bool = True) -> None:
    """Whether the work can be done where it is asked for.

    Raises:
        BadInput: For a model without weights here, and for ``blocking=False``, which needs a server.
    """
    if remote not in (False, "local"):
        return
    if model.device.type == "meta":
        raise BadInput(
            "This model was loaded with remote=True, so its weights are not here; run with remote=True (or a server's "
            "address), or load it without remote=True."
        )
    if not blocking:
        raise BadInput(
            f"blocking=False needs a server: remote=True or its address; with remote={remote!r} the work is done here, "
            "before the call returns."
        )
