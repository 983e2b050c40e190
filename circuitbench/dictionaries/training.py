"""Training dictionaries on activations: one, or many from one stream of batches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from circuitbench.dictionaries import checkpoints
from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.batches import Batches, batches_of
from circuitbench.dictionaries.recipe import positive, recipe
from circuitbench.dictionaries.run import History, Run
from circuitbench.errors import BadInput


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
    """

    dictionary: Dictionary
    history: History
    step: int
    finished: bool
    rows_per_second: float
    settings: dict[str, Any]


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
        **settings: of `recipe.recipe`: `site`, `sites`, `site_out` (names of what is read and reconstructed, where
            there are several), `skip`, `lr_warmup`, `lr_decay`, `dead_after`, `decoder_norm`, `dtype`, `log_every`; and
            the kind's own, such as `auxk_weight`.

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
    )[0]


def train_many(
    activations: Tensor | Mapping[str, Tensor] | Iterable[Any],
    recipes: Sequence[Mapping[str, Any]],
    *,
    targets: Tensor | None = None,
    steps: int = 1000,
    batch_size: int = 1024,
    seed: int = 0,
    out: Sequence[str | Path] | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> list[TrainResult]:
    """Train many dictionaries from one stream of batches: every batch is made once and used by all.

    Args:
        activations: as in `train`; a mapping, or an iterable of such, where the recipes name several sites.
        recipes: for each dictionary, what `train` takes besides the arguments here; `seed` may be among it.
        targets: as in `train`.
        steps: optimizer steps.
        batch_size: rows a step.
        seed: of the order of rows, and of the dictionaries whose recipe has none.
        out: a folder for each dictionary.
        resume: as in `train`.
        stop_after: as in `train`.
        checkpoint_every: as in `train`.
        progress: show a progress bar.

    Returns:
        One result for each recipe; `rows_per_second` is that of all together.

    Raises:
        BadInput: as `train`; no recipe; another number of folders than of recipes.
    """
    if not recipes:
        raise BadInput("no recipe was given; train_many needs at least one.")
    if out is not None and len({Path(folder) for folder in out}) != len(recipes):
        raise BadInput(
            f"{len(recipes)} recipes were given and out={list(map(str, out))}; give each a folder of its own."
        )
    if stop_after is not None and (out is None or not 1 <= stop_after <= steps):
        raise BadInput(
            f"stop_after={stop_after} needs `out`, for the checkpoint, and must lie between 1 and steps = {steps}."
        )
    if resume and out is None:
        raise BadInput("resume=True needs `out`, the folder that holds the checkpoint.")
    batches = batches_of(activations, targets, batch_size, seed)
    sample = batches.sample()
    shapes = {name: rows.shape[1] for name, rows in sample.items()}
    common = {"steps": steps, "batch_size": batch_size, "activations": batches.fingerprint}
    made = [recipe(shapes, **{"seed": seed, **given}, **common) for given in recipes]
    folders = [None] * len(made) if out is None else [Path(folder) for folder in out]
    if resume and all(
        folder is not None and checkpoints.is_finished(folder, one.to_dict())
        for folder, one in zip(folders, made, strict=True)
    ):
        return [_read(folder, one.to_dict(), steps) for folder, one in zip(folders, made, strict=True)]

    runs = [Run(one, sample) for one in made]
    for folder, run in zip(folders, runs, strict=True):
        if folder is not None:
            (checkpoints.load if resume else checkpoints.begin)(folder, run)
    if len({run.step for run in runs}) != 1:
        raise BadInput(f"the runs in {out} are at steps {[run.step for run in runs]}; resume only what began together.")
    every = max(1, steps // 10) if checkpoint_every is None else positive("checkpoint_every", checkpoint_every)
    first, seconds = runs[0].step, _loop(runs, folders, batches, steps, stop_after or steps, every, progress)
    results = [
        TrainResult(
            dictionary=run.finished(),
            history=run.history,
            step=run.step,
            finished=run.step == steps,
            rows_per_second=(run.step - first) * batch_size / seconds if run.step > first else 0.0,
            settings=run.recipe.to_dict(),
        )
        for run in runs
    ]
    for folder, run, result in zip(folders, runs, results, strict=True):
        if folder is not None and result.finished:
            checkpoints.finish(folder, result.dictionary, run)
    return results


def _loop(
    runs: list[Run],
    folders: Sequence[Path | None],
    batches: Batches,
    steps: int,
    last: int,
    checkpoint_every: int,
    progress: bool,
) -> float:
    """Train until step `last`; returns the seconds it took."""
    started = time.perf_counter()
    kinds = ", ".join(dict.fromkeys(run.recipe.kind for run in runs))
    with tqdm(total=steps, initial=runs[0].step, disable=not progress, unit="step", desc=f"training {kinds}") as bar:
        for batch in batches.from_step(runs[0].step):
            if runs[0].step >= last:
                break
            entries = [run.train_on(batch) for run in runs]
            if entries[0]:
                means = {
                    name: sum(e[name] for e in entries if e) / len(entries) for name in ("fvu", "l0", "dead_share")
                }
                bar.set_postfix(fvu=f"{means['fvu']:.3f}", l0=f"{means['l0']:.1f}", dead=f"{means['dead_share']:.1%}")
            for folder, run in zip(folders, runs, strict=True):
                if folder is not None and (run.step % checkpoint_every == 0 or run.step == last):
                    checkpoints.save(folder, run)
            bar.update()
    return time.perf_counter() - started


def _read(folder: Path | None, settings: dict[str, Any], steps: int) -> TrainResult:
    """The result of a run that had nothing left to do."""
    assert folder is not None
    dictionary, history = checkpoints.load_finished(folder)
    return TrainResult(dictionary, history, steps, True, 0.0, settings)
