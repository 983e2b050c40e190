"""What other processes run for `test_processes`: training that is killed, and training that is divided."""

from __future__ import annotations

import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from circuitbench import dictionaries
from tests.dictionaries.planted import planted

FORKSERVER = get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.dictionaries.processes"])  # the imports are done once for all of them

ROWS = planted(700, d_in=16, n_features=40, active=3)[0]
KINDS = ("topk", "standard", "batchtopk")
SHORT: dict[str, Any] = {"steps": 60, "batch_size": 64, "progress": False}


def recipes(kinds: tuple[str, ...] = KINDS) -> list[dict[str, Any]]:
    """Dictionaries with everything that has a state."""
    return [
        {"name": kind, "kind": kind, "d_dict": 48, "dead_after": 300, "resample_every": 20, "log_every": 1}
        | ({"k": 4} if kind != "standard" else {})
        for kind in kinds
    ]


def start(target: Any, *args: Any) -> Any:
    process = FORKSERVER.Process(target=target, args=args)
    process.start()
    return process


class Told:
    """A logger that leaves a mark for the parent at some step, and takes its time from then on."""

    def __init__(self, mark: Path, at: int, pause: float) -> None:
        self.mark, self.at, self.pause = mark, at, pause

    def start(self, settings: Any) -> None:
        pass

    def log(self, step: int, numbers: Any) -> None:
        if step == self.at:
            self.mark.touch()
        if step >= self.at and self.pause:
            time.sleep(self.pause)

    def finish(self) -> None:
        (self.mark.parent / "finished").touch()


def train(out: Path, mark: Path, at: int, pause: float, resume: bool, checkpoint_every: int) -> None:
    """A run of its own process; its handlers are checked to be the ones before."""
    torch.set_num_threads(1)
    sys.stderr = open(mark.parent / "stderr", "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    # What a shell starts in the background ignores Ctrl-C, and so would all that comes of it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        dictionaries.train_many(
            ROWS,
            recipes(),
            **SHORT,
            out=out,
            resume=resume,
            checkpoint_every=checkpoint_every,
            loggers=[Told(mark, at, pause)],
        )
    finally:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def divided(rank: int, meeting: Path, out: Path | None, way: str, how: dict[str, Any], result: Path) -> None:
    """One of two processes that train together, and what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        error, found = None, []
        try:
            found = dictionaries.train_many(ROWS, how["recipes"], **how["settings"], out=out, distributed=way)
        except dictionaries.training.BadInput as raised:
            error = str(raised)
        record = [(one.dictionary.state_dict(), one.history, one.step) for one in found]
        torch.save({"record": record, "error": error}, f"{result}-{rank}")
    finally:
        dist.destroy_process_group()
