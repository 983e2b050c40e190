"""Every error circuitbench raises on purpose. Each message says what was given, what is allowed, what to type."""

from __future__ import annotations

from typing import Any


class CircuitbenchError(Exception):
    """Base class of all errors raised by circuitbench."""


class BadInput(CircuitbenchError, ValueError):
    """An argument has a wrong value, shape or type."""


class SiteNotFound(CircuitbenchError, AttributeError):
    """A site, layer or address does not exist in this model; the message names those that do.

    It is an `AttributeError` so that `hasattr` and tab completion behave.
    """


class ReadOnlySite(CircuitbenchError, AttributeError):
    """The site can be read but not written; the message says how to change it instead."""


class UnsupportedModel(CircuitbenchError):
    """No architecture map fits this model, or its checkpoint cannot be represented."""


class VersionMismatch(CircuitbenchError):
    """transformers or nnsight, here or on the server, is a version the maps were not made for."""


class KernelMismatch(CircuitbenchError):
    """An installed kernel package does not run on the device the model is on."""


class CheckFailed(CircuitbenchError):
    """`circuitbench check` found a site that does not do what its map says."""


class RemoteError(CircuitbenchError):
    """A remote job failed, was lost, or the server could not be reached.

    Attributes:
        job_id: Id of the job, where there is one: `circuitbench.resume` fetches it.
        partial: What had been returned before, where the operation consists of several jobs.
    """

    def __init__(self, message: str, job_id: str | None = None, partial: Any = None) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.partial = partial


class JobFailed(RemoteError):
    """A remote job ran, and its code raised an error there."""


class TrainingFailed(CircuitbenchError):
    """Some of many dictionaries could not be trained; the others were, to the end.

    Attributes:
        failures: Name of the dictionary -> what went wrong.
        results: As `train_many` returns them, None where one failed.
    """

    def __init__(self, message: str, failures: dict[str, Any], results: list[Any]) -> None:
        super().__init__(message)
        self.failures = failures
        self.results = results
