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


def test_remote_runs_without_a_server() -> None:
    out = output_of("remote.py")
    assert "h_3 is zero: True" in out and "as here: True" in out
