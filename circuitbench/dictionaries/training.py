"""Training dictionaries on activations: one, or many from one stream of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from circuitbench.dictionaries import checkpoints
from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.batches import Batch, Batches, batches_of
from circuitbench.dictionaries.distributed import ALONE, World, check_shares, divided
from circuitbench.dictionaries.loggers import Logger, checked
from circuitbench.dictionaries.loop import Plan, loop
from circuitbench.dictionaries.many import called, folders_of, names_of
from circuitbench.dictionaries.recipe import Recipe, positive, recipe
from circuitbench.dictionaries.run import History, Run
from circuitbench.errors import BadInput, TrainingFailed


@dataclass
class TrainResult:
    """A trained dictionary and how it came about.

    Attributes:
        dictionary: on the device of the activations, decoder rows of length 1.
        history: lists of one length: `step` (steps done) and, of that step's batch, `loss`, `fvu` (squared error as a
            share of the variance of all activations), `l0` (active features a row) and `dead_share` (features that were
            not active on the last `dead_after` rows).
        step: steps done.
        finished: False if `stop_after` ended the run before its last step.
        rows_per_second: of this call, by the wall clock; 0 if it had nothing to do.
        settings: everything that determines the result besides the activations.
        diagnostics: what the activations said before training: `gamma`, the length of their mean over the root of their
            summed variances (`diagnostics.outlier_severity`), and `rows`, on how many it was measured.
    """

    dictionary: Dictionary
    history: History
    step: int
    finished: bool
    rows_per_second: float
    settings: dict[str, Any]
    diagnostics: dict[str, float]


def train(
    activations: Tensor | Mapping[str, Tensor] | Iterable[Any],
    targets: Tensor | None = None,
    *,
    kind: str = "topk",
    d_dict: int | None = None,
    expansion: int | None = None,
    k: int | None = None,
    steps: int = 1000,
    batch_size: int = 1024,
    lr: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    checkpoint_every: int | None = None,
    progress: bool = True,
    loggers: Sequence[Logger] = (),
    distributed: str | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a dictionary: Adam on the kind's own loss, `b_dec` from the data's mean.

    While training, activations have variance 1 (the mean over components), so that learning rates and sparsity weights
    do not depend on their scale; the finished dictionary is one of the activations as they come.

    Args:
        activations: a tensor `(n, d_in)`, whose rows are shuffled; a mapping from names to such, with the same rows; or
            an iterable of either, of any lengths, read in its order.
        targets: `(n, d_out)`: what a transcoder reconstructs.
        kind: "topk", "batchtopk", …: see `build`.
        d_dict: number of features; or give
        expansion: d_dict / d_in.
        k: features active on a row, for kinds that fix their number; 32 if not given.
        steps: optimizer steps.
        batch_size: rows a step.
        lr: peak learning rate; 0.11 / √d_in if not given.
        seed: of the initial directions and the order of rows.
        out: folder for checkpoints, and at the end for the dictionary and `training.json`.
        resume: continue from the checkpoint in `out`. On the CPU the result equals that of an unbroken run to the last
            bit.
        stop_after: leave a checkpoint in `out` after that many steps in all, and return.
        checkpoint_every: steps between checkpoints; a tenth of the run if not given.
        progress: show a progress bar.
        loggers: who is told of the run, such as `[loggers.ToStdout()]`; see `loggers.Logger`.
        distributed: "batches" if the rows of each batch are divided among the processes that torchrun started.
        **settings: of `recipe.recipe`: `site`, `sites`, `site_out` (names of what is read and reconstructed, where
            there are several), `skip`, `lr_schedule`, `lr_warmup`, `lr_decay`, `k_start`, `k_anneal`, `dead_after`,
            `resample_every`, `max_grad_norm`, `decoder_norm`, `dtype`, `precision`, `log_every`; and the kind's own,
            such as `auxk_weight`.

    With `out`, Ctrl-C and SIGTERM leave a checkpoint after the step that is being done: then KeyboardInterrupt is
    raised, or the process ends with exit code 143. A second Ctrl-C is not waited with.

    Raises:
        BadInput: arguments out of range or contradictory, activations of the wrong shape or not finite, a checkpoint of
            other settings or of other activations.
    """
    one = {"kind": kind, "d_dict": d_dict, "expansion": expansion, "k": k, "lr": lr, **settings}
    return train_many(
        activations,
        [one],
        targets=targets,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        out=None if out is None else [out],
        resume=resume,
        stop_after=stop_after,
        checkpoint_every=checkpoint_every,
        progress=progress,
        loggers=loggers,
        distributed=distributed,
    )[0]


def train_many(
    activations: Tensor | Mapping[str, Tensor] | Iterable[Any],
    recipes: Sequence[Mapping[str, Any]],
    *,
    targets: Tensor | None = None,
    steps: int = 1000,
    batch_size: int = 1024,
    seed: int = 0,
    out: Sequence[str | Path] | str | Path | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    checkpoint_every: int | None = None,
    progress: bool = True,
    loggers: Sequence[Logger] = (),
    distributed: str | None = None,
) -> list[TrainResult]:
    """Train many dictionaries from one stream of batches: every batch is made once and used by all.

    Args:
        activations: as in `train`; a mapping, or an iterable of such, where the recipes name several sites.
        recipes: for each dictionary, what `train` takes besides the arguments here; `seed` may be among it, and a
            `name`. `grid` makes them.
        targets: as in `train`.
        steps: optimizer steps.
        batch_size: rows a step.
        seed: of the order of rows, and of the dictionaries whose recipe has none.
        out: a folder for each dictionary, or one for all, in which each has one of its name.
        resume: as in `train`. Dictionaries that are finished are read, those that are behind catch up.
        stop_after: as in `train`.
        checkpoint_every: as in `train`.
        progress: show a progress bar.
        loggers: as in `train`; of several dictionaries, numbers have the name before them: "a/fvu".
        distributed: how work is divided among the processes that torchrun started. "dictionaries": process r trains the
            recipes r, r + size, …, and all results are read from `out`. "batches": all train all, each on its share of
            every batch, with the mean of their gradients; the first process writes. Every process makes all batches.

    Returns:
        One result for each recipe; `rows_per_second` is that of all together.

    Raises:
        BadInput: as `train`; no recipe; another number of folders than of recipes.
        TrainingFailed: some dictionaries failed, such as one whose learning rate was too high; it names them, and holds
            the results of the others.
    """
    if not recipes:
        raise BadInput("no recipe was given; train_many needs at least one.")
    names = names_of(recipes)
    folders = folders_of(names, out)
    if stop_after is not None and (out is None or not 1 <= stop_after <= steps):
        raise BadInput(
            f"stop_after={stop_after} needs `out`, for the checkpoint, and must lie between 1 and steps = {steps}."
        )
    if resume and out is None:
        raise BadInput("resume=True needs `out`, the folder that holds the checkpoint.")
    world = ALONE if distributed is None else World.initialised(distributed)
    if distributed is not None:
        check_shares(world, batch_size, distributed, out is not None)
    batches = batches_of(activations, targets, batch_size, seed)
    rows = getattr(batches, "batch_size", batch_size)
    if rows != batch_size:
        raise BadInput(f"batch_size={batch_size} was given, and the batches have {rows} rows; give the same.")
    sample = batches.sample()
    shapes = {name: rows.shape[1] for name, rows in sample.items()}
    common = {"steps": steps, "batch_size": batch_size, "activations": batches.fingerprint}
    made = {
        name: _made(name, shapes, {"seed": seed, **given, **common}) for name, given in zip(names, recipes, strict=True)
    }
    every = max(1, steps // 10) if checkpoint_every is None else positive("checkpoint_every", checkpoint_every)
    plan = Plan(stop_after or steps, steps, batch_size, every, progress, checked(loggers))
    if distributed == "dictionaries":
        plan.progress = progress and world.rank == 0

        def some(which: list[int]) -> dict[str, TrainResult]:
            return _train({names[i]: made[names[i]] for i in which}, folders, batches, sample, plan, resume)

        own = divided(world, len(names), some)
        results = {name: own[name] if name in own else _read(folders[name], made[name], sample) for name in names}
        world.wait()  # until all have read what others wrote
        return [results[name] for name in names]
    plan.world = world
    results = _train(made, folders, batches, sample, plan, resume)
    return [results[name] for name in names]


def _train(
    made: Mapping[str, Recipe],
    folders: Mapping[str, Path | None],
    batches: Batches,
    sample: Batch,
    plan: Plan,
    resume: bool,
) -> dict[str, TrainResult]:
    """Train the recipes from their beginnings or checkpoints; those that are finished are read."""
    world = plan.world
    finished = {name for name, one in made.items() if resume and _is_finished(folders[name], one)}
    results = {name: _read(folders[name], made[name], sample) for name in finished}
    runs = []
    for name, one in made.items():
        if name not in finished:
            with called(name):
                runs.append(Run(one, sample, name, world))
    if not runs:
        return results
    world.first_does(lambda: _begin(runs, folders, resume))
    for run in runs:
        folder = folders[run.name]
        if resume and folder is not None:
            checkpoints.load(folder, run)
    outcome = loop(runs, folders, batches, plan)
    for run in runs:
        if run.name not in outcome.failures:
            results[run.name] = _result(run, outcome.rows_per_second)
            folder = folders[run.name]
            if folder is not None and results[run.name].finished and world.rank == 0:
                checkpoints.finish(folder, results[run.name].dictionary, run)
    world.wait()
    if outcome.failures:
        _raise(outcome.failures, [results.get(name) for name in made])
    return results


def _begin(runs: Sequence[Run], folders: Mapping[str, Path | None], resume: bool) -> None:
    """Write the first checkpoints, where none is to be resumed."""
    places = [(folder, run) for run in runs if (folder := folders[run.name]) is not None]
    # A run of many that was killed while it wrote its first checkpoints lacks some: those begin now, and catch up.
    some_begun = any((folder / checkpoints.CHECKPOINT).exists() for folder, _ in places)
    for folder, run in places:
        if not resume or (some_begun and not (folder / checkpoints.CHECKPOINT).exists()):
            checkpoints.begin(folder, run)


def _raise(failures: dict[str, BadInput], results: list[TrainResult | None]) -> NoReturn:
    """The error of a dictionary that is alone; of several, one that names each."""
    if len(results) == 1:
        raise next(iter(failures.values()))
    listed = "; ".join(f"{name}: {error}" for name, error in failures.items())
    raise TrainingFailed(
        f"{len(failures)} of {len(results)} dictionaries failed, the others were trained. {listed}", failures, results
    ) from next(iter(failures.values()))


def _result(run: Run, rows_per_second: float) -> TrainResult:
    return TrainResult(
        dictionary=run.finished(),
        history=run.history,
        step=run.step,
        finished=run.step == run.recipe.steps,
        rows_per_second=rows_per_second,
        settings=run.recipe.to_dict(),
        diagnostics=run.diagnostics,
    )


def _is_finished(folder: Path | None, one: Recipe) -> bool:
    return folder is not None and checkpoints.is_finished(folder, one.to_dict())


def _read(folder: Path | None, one: Recipe, sample: Batch) -> TrainResult:
    """The result of a run that had nothing left to do here: it is finished, or another process left a checkpoint."""
    assert folder is not None
    if _is_finished(folder, one):
        dictionary, history, found = checkpoints.load_finished(folder)
        return TrainResult(dictionary, history, one.steps, True, 0.0, one.to_dict(), found)
    run = Run(one, sample)
    checkpoints.load(folder, run)
    return _result(run, 0.0)


def _made(name: str, shapes: Mapping[str, int], given: dict[str, Any]) -> Recipe:
    given.pop("name", None)
    with called(name):
        return recipe(shapes, **given)
