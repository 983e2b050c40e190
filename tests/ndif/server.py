"""A server that speaks the protocol of nnsight 0.8.1's NDIF client, for the tests.

NDIF itself cannot be installed from an index. This stand-in runs jobs as NDIF does: in a process of its own, on weights
of its own, without circuitbench, refusing imports outside NDIF's whitelist. `POST /misbehave` makes it fail in the ways
networks and servers do.

It prints its address once it listens, and ends when its standard input closes.
"""

from __future__ import annotations

import importlib.util
import sys

if importlib.util.find_spec("circuitbench") is not None:
    sys.exit("circuitbench can be imported here: a server that has it would prove nothing about code that travels")

import asyncio
import contextlib
import functools
import io
import json
import os
import socket
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import torch
import uvicorn
import whitelist
import zstandard
from fastapi import FastAPI, File, Form, HTTPException, Request, Response, UploadFile, WebSocket, WebSocketDisconnect
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.ndif import get_local_env
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc
from pydantic import BaseModel, ConfigDict

INLINE_LIMIT = 100_000  # bytes: smaller results come back on the websocket, larger ones by address
REVOKED_KEY = "revoked"


class Misbehaviour(BaseModel):
    """How to fail, until told otherwise."""

    model_config = ConfigDict(extra="forbid")

    refuse_subscription: bool = False  # 403 for the websocket, as a server of another protocol answers
    delay: float = 0.0  # seconds between RUNNING and the work
    drop: Literal["close", "abort"] | None = None  # lose the websocket once RUNNING is sent; the job goes on
    error: str | None = None  # end in ERROR with this description
    die: bool = False  # accept the job, then end the process
    packages: dict[str, str] = {}  # what GET /env says about these, instead of the truth


app = FastAPI()
worker = ThreadPoolExecutor(1)  # a model serves one request at a time
misbehaviour = Misbehaviour()
models: dict[str, Any] = {}
sessions: dict[str, WebSocket] = {}
responses: dict[str, ResponseModel] = {}
results: dict[str, bytes] = {}


class Job:
    """One request on its way through the worker."""

    def __init__(self, request: RequestModel, blob: bytes, base_url: str) -> None:
        self.id = str(uuid.uuid4())
        self.request, self.blob, self.base_url = request, blob, base_url
        self.loop = asyncio.get_running_loop()
        self.misbehaviour = misbehaviour

    def run(self) -> None:
        self.report(Status.QUEUED)
        try:
            result = self.execute()
        except BaseException:  # noqa: BLE001 (whatever the request's code raises belongs to the client)
            self.report(Status.ERROR, traceback.format_exc())
            return
        results[self.id] = result
        self.report(Status.COMPLETED, data=f"{self.base_url}result/{self.id}", inline=len(result) <= INLINE_LIMIT)

    def execute(self) -> bytes:
        key, request = self.request.model_key, self.request
        if key not in models:
            self.report(Status.DEPLOYING)
            models[key] = Remotable.from_model_key(key, dispatch=True)
        model = models[key]
        model._remoteable_set_env(request.env)
        # nnsight keeps sources by file name for the life of a process; here the same name is another client's file.
        SOURCES.clear()
        BLOCKS.clear()
        self.report(Status.RUNNING)
        if self.misbehaviour.die:
            os._exit(1)
        self.drop()
        time.sleep(self.misbehaviour.delay)
        if self.misbehaviour.error is not None:
            raise RuntimeError(self.misbehaviour.error)
        inc()
        try:
            with whitelist.request_code(), contextlib.redirect_stdout(Log(self)):
                objects = model._remoteable_persistent_objects()
                tracer = RequestModel.deserialize(self.blob, objects, request.compress, whitelist.Unpickler)
                tracer.execute(tracer.info.code)
            saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
        finally:
            dec()
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        data = buffer.getvalue()
        return zstandard.ZstdCompressor().compress(data) if request.compress else data

    def report(self, status: Status, description: str = "", data: Any = None, inline: bool = False) -> None:
        """Keep the status for those who poll, and send it to the one who listens."""
        final = status in (Status.COMPLETED, Status.ERROR)
        response = ResponseModel(
            id=self.id, status=status, description=description, data=data, meta={"time": time.time()} if final else None
        )
        if status != Status.LOG:
            responses[self.id] = response
        if inline:
            message = response.model_copy(update={"data": results[self.id]}).pickle()
        else:
            message = response.model_dump_json()
        asyncio.run_coroutine_threadsafe(self.send(message), self.loop).result()

    async def send(self, message: str | bytes) -> None:
        listener = sessions.get(self.request.session_id)
        if listener is None:
            return
        try:
            await (listener.send_bytes(message) if isinstance(message, bytes) else listener.send_text(message))
        except (WebSocketDisconnect, RuntimeError):  # the client went away: it may still ask by id
            sessions.pop(self.request.session_id, None)

    def drop(self) -> None:
        listener = sessions.get(self.request.session_id)
        if listener is None or self.misbehaviour.drop is None:
            return
        del sessions[self.request.session_id]
        if self.misbehaviour.drop == "close":
            asyncio.run_coroutine_threadsafe(listener.close(1011), self.loop).result()
        else:
            connections = server.server_state.connections
            (connection,) = (c for c in connections if getattr(c, "client", None) == tuple(listener.client))
            self.loop.call_soon_threadsafe(connection.transport.abort)


class Log(io.TextIOBase):
    """Sends what the request prints to its client."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def write(self, text: str) -> int:
        if text.strip():
            self.job.report(Status.LOG, text)
        return len(text)


@app.post("/request")
async def request(http: Request, data: Annotated[str, Form()], blob: Annotated[UploadFile, File()]) -> Response:
    if http.headers.get("ndif-api-key") == REVOKED_KEY:
        raise HTTPException(401, "Missing or invalid API key.")
    job = Job(RequestModel.model_validate_json(data), await blob.read(), str(http.base_url))
    responses[job.id] = ResponseModel(id=job.id, status=Status.RECEIVED, description="received")
    worker.submit(job.run)
    return Response(responses[job.id].model_dump_json(), media_type="application/json")


@app.websocket("/subscribe")
async def subscribe(socket: WebSocket) -> None:
    if misbehaviour.refuse_subscription:
        await socket.close()
        return
    await socket.accept()
    session_id = str(uuid.uuid4())
    sessions[session_id] = socket
    await socket.send_text(json.dumps({"session_id": session_id}))
    try:
        while True:
            await socket.receive_bytes()
    except (WebSocketDisconnect, RuntimeError):
        sessions.pop(session_id, None)


@app.get("/response/{job_id}")
async def response(job_id: str) -> Response:
    if job_id not in responses:
        raise HTTPException(404, f"no job {job_id}")
    return Response(responses[job_id].model_dump_json(), media_type="application/json")


@app.get("/result/{job_id}")
async def result(job_id: str) -> Response:
    return Response(results[job_id], media_type="application/octet-stream")


@app.get("/status")
async def status() -> dict:
    return {"deployments": {key: deployment(key) for key in models}}


def deployment(key: str) -> dict:
    details = json.loads(key.partition(":")[2])
    return {"model_key": key, "deployment_level": "HOT", "application_state": "RUNNING", **details}


@functools.cache
def installed() -> dict:
    return get_local_env()


@app.get("/env")
async def env() -> dict:
    here = installed()
    return here | {"packages": here["packages"] | misbehaviour.packages}


@app.get("/whoami")
async def whoami() -> dict:
    return {"email": "someone@example.org", "tags": []}


@app.post("/misbehave")
async def misbehave(wanted: Misbehaviour) -> None:
    global misbehaviour
    misbehaviour = wanted


def end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    server.run(sockets=[listening])
