"""The scripts in demos/ run as they are, offline, and show what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def output_of(script: str) -> str:
    """What a demo prints, run as a reader runs it."""
    # In an interpreter of its own, for a demo registers maps and models for the whole process.
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", ROOT / "demos" / script],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_first_steps_find_the_bracket_in_the_state_and_steer_it() -> None:
    out = output_of("first_steps.py")
    assert re.search(r"as it is: '\]' \d+%", out)
    effects = [float(value) for value in re.findall(r"layer 2, position \d .*: ([+-][\d.]+)", out)]
    (whole,) = (float(value) for value in re.findall(r"all of it together: ([+-][\d.]+)", out))
    assert len(effects) == 3 and all(whole < effect < 0.1 * whole for effect in effects)
    plain, steered = (re.search(rf"{name} *(.*)", out)[1] for name in ("plain:", "steered:"))
    assert plain.startswith("']") and steered.startswith("')")


def test_a_model_of_ones_own_passes_every_check() -> None:
    out = output_of("your_own_model.py")
    assert "Remember (remember" in out and "ssm.state" in out
    assert re.search(r"all \d+ checks hold", out)
    assert len(re.findall(r"layer \d, position \d: [+-]0\.\d+", out)) == 3


def test_a_recurrence_of_ones_own_is_checked_edited_and_taken_apart() -> None:
    out = output_of("neural_memory.py")
    assert int(re.search(r"recalls (\d+)% of the digits", out)[1]) > 98
    assert re.search(r"all \d+ checks hold", out) and re.search(r"ssm.mixing +mixing times x is y", out)
    base = float(re.search(r"3 rather than 5 by ([+-][\d.]+)\.", out)[1])
    layers = [[float(value) for value in re.findall(r"[+-][\d.]+", row)] for row in re.findall(r"  layer \d:.*", out)]
    by_token = [min(column) for column in zip(*layers, strict=True)]  # what the layer that matters does
    assert by_token[0] > -0.1 * base and all(effect < -base for effect in by_token[1:])
    said = dict(re.findall(r"^(Told|a and b exchanged|Feature)[^:]*: +(a \d, b \d, c \d, d \d)$", out, re.MULTILINE))
    assert said["Told"] == "a 3, b 7, c 1, d 2"
    assert said["a and b exchanged"] == "a 7, b 3, c 1, d 2"
    assert said["Feature"] == "a 5, b 7, c 1, d 2"
    assert float(re.search(r"FVU ([\d.]+) on memories", out)[1]) < 0.15
    assert int(re.search(r"(\d+) of all 64 pairs", out)[1]) > 55


def test_remote_runs_without_a_server() -> None:
    out = output_of("remote.py")
    assert "h_3 is zero: True" in out and "as here: True" in out
