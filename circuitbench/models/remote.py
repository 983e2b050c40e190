"""Remote runs: nnsight's own backend, with every failure in one sentence, and a job id to come back with.

A job goes on when the connection to its server is lost; what is needed to fetch it later is its id, which travels with
the error. Servers whose transformers differs from the one here are refused before anything is sent: the maps name
operations inside its code, and two versions may compute different functions under the same name.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import httpx
import pydantic
import websocket
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.backends.remote import RemoteError as NnsightRemoteError
from nnsight.ndif import get_local_env
from nnsight.schema.config import CONFIG
from nnsight.schema.response import ResponseModel, Status

from ..errors import BadInput, JobFailed, RemoteError, VersionMismatch

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from nnsight.tracing.tracer import Tracer

    from .model import Model

PACKAGES = ("transformers", "nnsight")
TIMEOUT = 60.0  # seconds
_CHECKED: set[str] = set()


class JobBackend(RemoteBackend):
    """nnsight's remote backend; remembers the id of its job, and says what went wrong."""

    status: Any = None  # the job's last `Status`

    def note(self, response: ResponseModel) -> bool:
        self.job_id, self.status = response.id, response.status
        return super().note(response)

    def __call__(self, tracer: Tracer | None = None) -> Any:
        if self.blocking:
            self.job_id = None
        if tracer is not None:
            check_server(self.host)
        try:
            return super().__call__(tracer)
        except NnsightRemoteError as error:
            if self.status == Status.ERROR:
                reason = str(error).strip().splitlines()[-1]
                raise JobFailed(
                    f"Job {self.job_id} failed on {self.host}: {reason}\n\nOn the server:\n{error}", job_id=self.job_id
                ) from None
            raise RemoteError(f"{self.host} did not take the job: {error}") from None
        except (websocket.WebSocketException, pydantic.ValidationError, httpx.HTTPError, OSError) as error:
            # pydantic: an orderly close of the socket reaches nnsight as the empty message
            if self.job_id is None:
                raise unreachable(self.host, error) from None
            raise RemoteError(
                f"The connection to {self.host} was lost while job {self.job_id} was {self.status.value}; it may go on "
                f"there: fetch it with circuitbench.resume(model, {self.job_id!r}, remote={self.host!r}).",
                job_id=self.job_id,
            ) from None


def unreachable(host: str, error: Exception) -> RemoteError:
    """The error for a server that does not answer."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RemoteError(
        f"{host} cannot be reached ({reason}); check the address and the network, or run here with remote=False."
    )


class Backends:
    """Stands in for nnsight's `_remote_backend` of one model, so that a user's own traces use `JobBackend` too."""

    def __init__(self, nn: TransformersModel) -> None:
        self.nn = nn

    def __call__(self, remote: bool | str, blocking: bool, job_id: str | None, verbose: bool) -> Any:
        if remote == "local":
            return type(self.nn)._remote_backend(self.nn, remote, blocking, job_id, verbose)
        return JobBackend(
            model_key(self.nn),
            host=remote if isinstance(remote, str) else None,
            env=self.nn._remoteable_get_env(),
            blocking=blocking,
            job_id=job_id,
            verbose=verbose,
        )

    def __reduce__(self) -> tuple:
        # The model's attributes travel with every request; this one means nothing on the server.
        return (int, ())


def attach(nn: TransformersModel) -> None:
    """Let this model's remote traces go through `JobBackend`."""
    object.__setattr__(nn, "_remote_backend", Backends(nn))


def model_key(nn: TransformersModel) -> str:
    """The name a server knows the model by.

    Raises:
        BadInput: For a model that no server can load by name.
    """
    if not nn.repo_id:
        raise BadInput(
            "This model has no name a server could load it by (it was built in memory); load it from a Hub id to run "
            "remotely, or use remote=False."
        )
    try:
        return nn.to_model_key()
    except (httpx.HTTPError, OSError) as error:
        raise RemoteError(
            f"The Hub could not confirm the name {nn.repo_id!r} ({type(error).__name__}), which a remote run needs; "
            "check the name and the network."
        ) from error


def check_server(host: str) -> None:
    """Compare the server's transformers and nnsight with the ones here, once for every server.

    Raises:
        VersionMismatch: If they differ in more than the last number.
        RemoteError: If the server does not answer.
    """
    if host in _CHECKED:
        return
    try:
        answer = httpx.get(f"{host}/env", timeout=TIMEOUT).raise_for_status().json()
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise unreachable(host, error) from None
    here, there = get_local_env()["packages"], answer.get("packages", {})
    for name in PACKAGES:
        if name in there and minor(there[name]) != minor(here[name]):
            raise VersionMismatch(
                f"{host} runs {name} {there[name]}, here it is {here[name]}: the same site may be another tensor. "
                f"Install {name}=={there[name]} here, or accept it with circuitbench.models.remote.accept({host!r})."
            )
    _CHECKED.add(host)


def accept(host: str) -> None:
    """Run on this server whatever its versions are; `check(model, remote=host)` tells whether the sites hold."""
    _CHECKED.add(host)


def minor(version: str) -> tuple[str, ...]:
    """Major and minor version number."""
    return tuple(version.split("+")[0].split(".")[:2])


def host_of(remote: bool | str) -> str:
    """The server's address for a `remote=` argument."""
    return remote if isinstance(remote, str) else CONFIG.API.HOST


def resume(model: Model, job_id: str, *, remote: bool | str = True, timeout: float = 600.0) -> dict[str, Any]:
    """Fetch a job that was sent earlier, from this process or another.

    Args:
        model: The model it ran on.
        job_id: Its id, as the error or the handle gave it.
        remote: The server.
        timeout: Seconds to wait for it to finish.

    Returns:
        The saved values, by the names they had in the block.

    Raises:
        RemoteError: If the server does not know the job, the job failed, or it did not finish in time.
    """
    host = host_of(remote)
    backend = JobBackend(model_key(model.nn), host=host, blocking=False, job_id=job_id)
    try:
        known = httpx.get(f"{host}/response/{job_id}", timeout=TIMEOUT)
    except httpx.HTTPError as error:
        raise unreachable(host, error) from None
    if known.status_code == 404:
        raise RemoteError(f"{host} knows no job {job_id!r}; its result may have expired.")
    return wait(backend, timeout)


def wait(backend: JobBackend, timeout: float) -> dict[str, Any]:
    """Poll a job until it is finished."""
    deadline, pause = time.monotonic() + timeout, 0.05
    while (values := backend()) is None:
        if time.monotonic() > deadline:
            raise RemoteError(
                f"Job {backend.job_id} on {backend.host} is not finished after {timeout:g} s; fetch it later with "
                f"circuitbench.resume(model, {backend.job_id!r}, remote={backend.host!r}).",
                job_id=backend.job_id,
            )
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
    return values
