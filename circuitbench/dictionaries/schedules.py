"""How learning rate, sparsity weights and k move over a run: functions of the step alone, so that a run can resume."""

from __future__ import annotations

import math

LR_SCHEDULES = ("linear", "cosine", "constant")


def rising(step: int, steps: int, share: float) -> float:
    """From above 0 at step 0 in a straight line to 1 at the end of the first `share` of the run; 1 from there on."""
    return min(1.0, (step + 1) / max(1, int(steps * share)))


def learning_rate(name: str, step: int, steps: int, *, warmup: float, decay: float) -> float:
    """A step's learning rate as a share of the highest.

    Args:
        name: how it falls over the last `decay` of the run: "linear", to 0 in a straight line; "cosine", to 0 along
            half a cosine; "constant", not at all.
        step: steps done before this one.
        steps: of the run.
        warmup: share of the run over which it rises in a straight line. Where both move, the lower one counts.
        decay: share of the run over which it falls.
    """
    left = (steps - step) / (decay * steps) if decay and name != "constant" else 1.0
    if name == "cosine":
        left = (1 - math.cos(math.pi * min(1.0, left))) / 2
    return min(rising(step, steps, warmup), left)


def annealed_k(step: int, steps: int, *, start: int, end: int, share: float) -> int:
    """Of a step: from `start` in a straight line to `end`, which the first `share` of the run ends with."""
    done = min(1.0, step / (share * steps)) if share else 1.0
    return round(start + (end - start) * done)
