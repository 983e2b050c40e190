"""The loop over batches: steps, checkpoints, signals, progress, and what is told of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from circuitbench.dictionaries import checkpoints, diagnostics
from circuitbench.dictionaries.batches import Batch, Batches
from circuitbench.dictionaries.distributed import ALONE, World
from circuitbench.dictionaries.interrupts import Interrupts
from circuitbench.dictionaries.loggers import Logger
from circuitbench.dictionaries.run import Run
from circuitbench.errors import BadInput


@dataclass
class Plan:
    """What is done besides training.

    Attributes:
        last: step after which this call stops.
        steps: of the whole run.
        batch_size: rows a step.
        checkpoint_every: steps between checkpoints.
        progress: whether a bar is shown.
        loggers: who is told.
        world: among which processes rows are divided; the first one writes, shows and tells.
    """

    last: int
    steps: int
    batch_size: int
    checkpoint_every: int
    progress: bool = True
    loggers: Sequence[Logger] = ()
    world: World = field(default=ALONE)


@dataclass
class Outcome:
    """How a loop went: rows a second by the wall clock, and the runs that failed with their errors."""

    rows_per_second: float
    failures: dict[str, BadInput]


def loop(runs: Sequence[Run], folders: Mapping[str, Path | None], batches: Batches, plan: Plan) -> Outcome:
    """Train until `plan.last`. A run that fails is left out from there on; runs that are behind catch up first.

    Args:
        runs: with names of their own.
        folders: of the runs, by name.
        batches: the same for all.
        plan: the rest.
    """
    first = plan.world.rank == 0
    done, failures = min(run.step for run in runs), {}
    began_at, started = done, time.perf_counter()
    kinds = ", ".join(dict.fromkeys(run.recipe.kind for run in runs))
    with ExitStack() as stack:
        if first and plan.progress:
            for line in warnings_of(runs):
                tqdm.write(line, file=sys.stderr)
        for logger in plan.loggers if first else ():
            stack.callback(logger.finish)
            logger.start({run.name: {**run.recipe.to_dict(), "diagnostics": run.diagnostics} for run in runs})
        bar = stack.enter_context(
            tqdm(
                total=plan.steps,
                initial=done,
                disable=not (plan.progress and first),
                unit="step",
                desc=f"training {kinds}",
            )
        )
        saves = plan.world.size > 1 or any(folder is not None for folder in folders.values())
        interrupts = stack.enter_context(Interrupts(saves))
        source = batches.from_step(done)
        told_at, told = done, started
        while done < plan.last and len(failures) < len(runs):
            batch = _next(source, done)
            numbers: dict[str, float] = {}
            training = [run for run in runs if run.name not in failures and run.step == done]
            for run in training:
                try:
                    entry = run.train_on(batch)
                except BadInput as error:
                    failures[run.name] = error
                    continue
                prefix = f"{run.name}/" if run.name else ""
                numbers |= {f"{prefix}{name}": value for name, value in (entry or {}).items() if name != "step"}
            done += 1
            stopped = plan.world.stops(interrupts.received is not None, runs[0].rows_since_active.device)
            if done % plan.checkpoint_every == 0 or done == plan.last or stopped:
                save(runs, folders, failures, plan.world)
            if stopped:
                interrupts.act(f"saved after step {done}; go on with resume=True")
            if numbers:
                now = time.perf_counter()
                numbers["rows_per_second"] = (done - told_at) * plan.batch_size / (now - told)
                told_at, told = done, now
                bar.set_postfix(_short(numbers))
                for logger in plan.loggers if first else ():
                    logger.log(done, numbers)
            bar.update()
    seconds = time.perf_counter() - started
    return Outcome((done - began_at) * plan.batch_size / seconds if done > began_at else 0.0, failures)


def save(
    runs: Sequence[Run], folders: Mapping[str, Path | None], failures: Mapping[str, BadInput], world: World
) -> None:
    """Checkpoints of all that go on."""
    for run in runs:
        folder = folders[run.name]
        if folder is not None and run.name not in failures and world.rank == 0:
            checkpoints.save(folder, run)


def warnings_of(runs: Sequence[Run]) -> list[str]:
    """What the activations say, once for each site that is read."""
    said = {run.recipe.reads: diagnostics.said(run.diagnostics["gamma"], int(run.diagnostics["rows"])) for run in runs}
    return [f"{', '.join(reads)}: {line}" if len(said) > 1 else line for reads, line in said.items()]


def _next(source: Iterator[Batch], done: int) -> Batch:
    try:
        return next(source)
    except StopIteration:
        raise BadInput(f"the batches ended after {done} steps; `from_step` is to go on without end.") from None


def _short(numbers: Mapping[str, float]) -> dict[str, str]:
    """For the bar: means over the dictionaries."""
    mean = {}
    for name in ("loss", "fvu", "l0", "dead_share"):
        values = [value for key, value in numbers.items() if key.rpartition("/")[2] == name]
        mean[name] = sum(values) / len(values)
    return {
        "loss": f"{mean['loss']:.3g}",
        "fvu": f"{mean['fvu']:.3f}",
        "l0": f"{mean['l0']:.1f}",
        "dead": f"{mean['dead_share']:.1%}",
        "rows/s": f"{numbers['rows_per_second']:.0f}",
    }
