"""Loggers are told the history, the settings and the end, however it comes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitbench import dictionaries
from circuitbench.dictionaries import loggers
from circuitbench.errors import BadInput
from tests.dictionaries.planted import planted

X = planted(300, d_in=16, n_features=40, active=3)[0]
HOW = {"d_dict": 48, "k": 4, "steps": 12, "batch_size": 64, "log_every": 5, "progress": False}


class Recording:
    def __init__(self) -> None:
        self.told: list[tuple] = []

    def start(self, settings: Mapping[str, Any]) -> None:
        self.told.append(("start", settings))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.told.append((step, dict(numbers)))

    def finish(self) -> None:
        self.told.append(("finish",))


def test_a_logger_is_told_what_the_history_has() -> None:
    one, two = Recording(), Recording()
    result = dictionaries.train(X, **HOW, loggers=[one, two])
    (_, settings), *entries, end = one.told
    assert settings == {"": {**result.settings, "diagnostics": result.diagnostics}} and end == ("finish",)
    json.dumps(settings)
    assert [step for step, _ in entries] == result.history["step"] == [5, 10, 12]
    for number, (_, told) in enumerate(entries):
        assert told.pop("rows_per_second") > 0
        assert told == {name: result.history[name][number] for name in ("loss", "fvu", "l0", "dead_share")}
    assert len(two.told) == 5


def test_of_many_each_number_has_a_name() -> None:
    recording = Recording()
    recipes = [{"d_dict": 48, "k": 4, "log_every": 5}, {"d_dict": 48, "k": 5, "log_every": 6, "name": "b"}]
    results = dictionaries.train_many(X, recipes, steps=12, batch_size=64, progress=False, loggers=[recording])
    told = dict(recording.told[1:-1])
    assert list(told) == [5, 6, 10, 12]
    assert told[5].keys() == {"0-topk/loss", "0-topk/fvu", "0-topk/l0", "0-topk/dead_share", "rows_per_second"}
    assert told[12]["b/fvu"] == results[1].history["fvu"][-1] and told[12]["0-topk/l0"] == pytest.approx(4, abs=0.2)


def test_loggers_are_finished_when_training_fails() -> None:
    recording = Recording()
    with pytest.raises(BadInput, match="is too high"):
        dictionaries.train(X, **HOW | {"lr": 1e30}, loggers=[recording])
    assert recording.told[-1] == ("finish",)


def test_lines_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    result = dictionaries.train(X, **HOW, loggers=[loggers.ToStdout()])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "topk, 48 features, 12 steps of 64 rows" and "γ = " in lines[1]
    fvu = result.history["fvu"][-1]
    assert lines[-1].startswith("step 12  loss ") and f"fvu {fvu:.4f}  l0 " in lines[-1] and "rows/s" in lines[-1]
    recipes = dictionaries.grid(k=[4, 5], d_dict=48, log_every=12)
    dictionaries.train_many(X, recipes, steps=12, batch_size=64, progress=False, loggers=[loggers.ToStdout()])
    last = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(":")[0] for line in last] == ["k4", "k5"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_missing_is_named(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    make = {"tensorboard": loggers.ToTensorBoard, "wandb": loggers.ToWandb, "trackio": loggers.ToTrackio}[name]
    with pytest.raises(BadInput, match=f"needs the package {name}, which is not installed: `pip install {name}`"):
        make("x")


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = dictionaries.train(X, **HOW, loggers=[loggers.ToTensorBoard(tmp_path)])
    found = events.EventAccumulator(str(tmp_path))
    found.Reload()
    told = [(event.step, event.value) for event in found.Scalars("fvu")]
    assert told == [
        (step, torch.tensor(fvu).item()) for step, fvu in zip(*map(result.history.get, ("step", "fvu")), strict=True)
    ]


def test_what_is_no_logger_is_refused() -> None:
    with pytest.raises(BadInput, match="a logger is an object with start, log and finish"):
        dictionaries.train(X, **HOW, loggers=[loggers.ToStdout])
