"""Real signals to real processes, and training divided among two of them."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitbench import dictionaries
from circuitbench.dictionaries.checkpoints import CHECKPOINT
from circuitbench.errors import BadInput
from tests.dictionaries import processes
from tests.dictionaries.processes import KINDS, ROWS, SHORT, recipes, start


@pytest.fixture(scope="module")
def unbroken() -> list[dictionaries.TrainResult]:
    torch.set_num_threads(1)
    return dictionaries.train_many(ROWS, recipes(), **SHORT)


def assert_same(found: list[dictionaries.TrainResult], expected: list[dictionaries.TrainResult]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.history == other.history
        own = other.dictionary.state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in one.dictionary.state_dict().items())


def wait_for(path: Path, process: Any, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.is_alive() and time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first(number: int, tmp_path: Path, unbroken: list[dictionaries.TrainResult]) -> None:
    mark, out = tmp_path / "mark", tmp_path / "out"
    process = start(processes.train, out, mark, 23, 0.2, False, 1000)
    wait_for(mark, process)
    os.kill(process.pid, number)
    process.join(60)
    # Python ends with 1 where KeyboardInterrupt is not caught inside multiprocessing.
    assert process.exitcode == (143 if number == signal.SIGTERM else 1)
    if number == signal.SIGINT:
        assert "KeyboardInterrupt: saved after step 2" in (tmp_path / "stderr").read_text()
    assert (tmp_path / "finished").exists(), "loggers are told"
    part = dictionaries.train_many(ROWS, recipes(), **SHORT, out=out, resume=True, stop_after=30)
    assert all(result.step == 30 and result.rows_per_second > 0 for result in part)
    assert part[0].history["step"] == list(range(1, 31))
    assert_same(dictionaries.train_many(ROWS, recipes(), **SHORT, out=out, resume=True), unbroken)


def test_the_second_ctrl_c_is_not_waited_with(tmp_path: Path) -> None:
    mark, out = tmp_path / "mark", tmp_path / "out"
    process = start(processes.train, out, mark, 23, 60.0, False, 1000)
    wait_for(mark, process)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.is_alive(), "the step goes on"
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 1 and "saved after" not in (tmp_path / "stderr").read_text()
    assert dictionaries.train_many(ROWS, recipes(), **SHORT, out=out, resume=True, stop_after=1)[0].step == 1


@pytest.mark.slow
def test_kill_9_corrupts_nothing(tmp_path: Path, unbroken: list[dictionaries.TrainResult]) -> None:
    """Twenty kills at random moments, some of them while files are written; then the run goes on to its end."""
    mark, out = tmp_path / "mark", tmp_path / "out"
    moments = random.Random(0)
    killed = reached = 0
    while killed < 20:
        begun = any((out / kind / CHECKPOINT).exists() or (out / kind / "training.json").exists() for kind in KINDS)
        mark.unlink(missing_ok=True)
        process = start(processes.train, out, mark, reached + 1, 0.0, begun, 1)
        wait_for(mark, process) if killed % 4 else None
        time.sleep(moments.uniform(0, 0.25))
        process.kill()
        process.join()
        killed += 1
        found = [out / kind / CHECKPOINT for kind in KINDS]
        if all(path.exists() for path in found):
            probe = dictionaries.train_many(ROWS, recipes(), **SHORT, out=out, resume=True, stop_after=1)
            reached = min(result.step for result in probe)
        if process.exitcode == 0 or any((out / kind / "training.json").exists() for kind in KINDS):
            assert_same(dictionaries.train_many(ROWS, recipes(), **SHORT, out=out, resume=True), unbroken)
            out = tmp_path / f"out-{killed}"
            reached = 0
    begun = (out / KINDS[0] / CHECKPOINT).exists()
    assert_same(dictionaries.train_many(ROWS, recipes(), **SHORT, out=out, resume=begun), unbroken)


def together(tmp_path: Path, way: str, how: dict[str, Any], out: Path | None) -> list[Any]:
    """What each of two processes found."""
    meeting, result = tmp_path / f"meeting-{random.random()}", tmp_path / "result"
    both = [start(processes.divided, rank, meeting, out, way, how, result) for rank in range(2)]
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(f"{result}-{rank}") for rank in range(2)]


def test_two_processes_share_the_dictionaries(tmp_path: Path, unbroken: list[dictionaries.TrainResult]) -> None:
    how = {"recipes": recipes(), "settings": SHORT}
    for found in together(tmp_path, "dictionaries", how, tmp_path / "out"):
        assert found["error"] is None and len(found["record"]) == 3
        for (tensors, history, step), expected in zip(found["record"], unbroken, strict=True):
            assert history == expected.history and step == 60
            assert all(torch.equal(tensors[name], own) for name, own in expected.dictionary.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(KINDS)


def test_two_processes_share_the_batches(tmp_path: Path) -> None:
    """As one process on the same batches, to rounding, dead features and their resampling included; and resumed."""
    one = recipes(("topk",))[0] | {"dtype": torch.float64, "auxk_weight": 0.0, "max_grad_norm": 0.5, "dead_after": 100}
    alone = dictionaries.train_many(ROWS, [one], **SHORT)[0]
    assert max(alone.history["dead_share"]) > 0
    out = tmp_path / "out"
    how = {"recipes": [one], "settings": SHORT | {"stop_after": 37}}
    assert together(tmp_path, "batches", how, out)[0]["record"][0][2] == 37
    first, second = together(tmp_path, "batches", {"recipes": [one], "settings": SHORT | {"resume": True}}, out)
    for found in (first, second):
        assert found["error"] is None
        tensors, history, step = found["record"][0]
        assert step == 60
        for name, values in alone.history.items():
            assert history[name] == pytest.approx(values, rel=1e-6), name
        for name, own in alone.dictionary.state_dict().items():
            torch.testing.assert_close(tensors[name], own, rtol=1e-6, atol=1e-7)
    assert torch.equal(first["record"][0][0]["W_enc"], second["record"][0][0]["W_enc"])


def test_thresholds_and_weights_of_sparsity_are_one_for_all(tmp_path: Path) -> None:
    several = recipes(("batchtopk", "jumprelu", "matryoshka"))
    several[1].pop("k")
    first, second = together(tmp_path, "batches", {"recipes": several, "settings": SHORT | {"steps": 12}}, None)
    for one, other in zip(first["record"], second["record"], strict=True):
        assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())
        assert one[1] == other[1]
        assert one[1]["fvu"][-1] < one[1]["fvu"][0]


def test_what_is_wrong_in_one_process_is_raised_in_all(tmp_path: Path) -> None:
    bad = [recipes(("topk",))[0] | {"name": "good"}, recipes(("topk",))[0] | {"name": "bad", "lr": 1e30}]
    found = together(tmp_path, "dictionaries", {"recipes": bad, "settings": SHORT}, tmp_path / "out")
    assert "process 1: the loss is" in found[0]["error"] and "is too high" in found[1]["error"]
    found = together(tmp_path, "batches", {"recipes": bad[:1], "settings": SHORT | {"batch_size": 63}}, None)
    assert all("batch_size=63 cannot be divided among 2 processes" in one["error"] for one in found)


def test_one_process_is_told_how_to_be_several() -> None:
    with pytest.raises(BadInput, match="start the script with `torchrun --nproc-per-node=2 script.py`"):
        dictionaries.train_many(ROWS, recipes(), **SHORT, distributed="batches")
    with pytest.raises(BadInput, match="distributed='model' was given; it is one of 'dictionaries', 'batches'"):
        dictionaries.train_many(ROWS, recipes(), **SHORT, distributed="model")
