"""Training a dictionary on activations: the loop, its schedule, its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from circuitbench.dictionaries import checkpoints, losses
from circuitbench.dictionaries.base import Dictionary, build
from circuitbench.dictionaries.batches import batches_of
from circuitbench.dictionaries.topk import TopK
from circuitbench.errors import BadInput

History = dict[str, list[int | float]]
HISTORY = ("step", "loss", "fvu", "l0", "dead_share")


@dataclass
class TrainResult:
    """A trained dictionary and how it came about.

    Attributes:
        dictionary: on the device of the activations.
        history: lists of one length: `step` (steps done) and, of that step's batch, `loss` (FVU + auxk_weight · AuxK),
            `fvu` (squared error as a share of the variance of all activations), `l0` (active features a row) and
            `dead_share` (features that were not active on the last `dead_after` rows).
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


@dataclass
class Run:
    """What changes while training, and so what a checkpoint holds."""

    dictionary: TopK
    optimizer: torch.optim.Adam
    rows_since_active: Tensor
    step: int = 0
    history: History = field(default_factory=lambda: {name: [] for name in HISTORY})


def train(
    activations: Tensor | Iterable[Tensor],
    *,
    kind: str = "topk",
    d_dict: int | None = None,
    expansion: int | None = None,
    k: int = 32,
    steps: int = 1000,
    batch_size: int = 1024,
    lr: float | None = None,
    seed: int = 0,
    auxk_weight: float = 1 / 32,
    dead_after: int | None = None,
    dtype: torch.dtype = torch.float32,
    out: str | Path | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    checkpoint_every: int | None = None,
    log_every: int | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train a dictionary: squared error plus AuxK, Adam, `b_dec` from the data's mean, decoder rows of length 1.

    The learning rate warms up over the first twentieth of the steps and falls linearly to 0 over the last four fifths.
    That of the biases is in units of the activations' standard deviation, so that their scale does not matter.

    Args:
        activations: a tensor `(n, d_in)`, whose rows are shuffled; or an iterable of such tensors, of any lengths, read
            in its order.
        kind: "topk".
        d_dict: number of features; or give
        expansion: d_dict / d_in.
        k: features that may be active on a row.
        steps: optimizer steps.
        batch_size: rows a step.
        lr: peak learning rate; 0.11 / √d_in if not given.
        seed: of the initial directions and the order of rows.
        auxk_weight: weight of AuxK beside the error as a share of the variance.
        dead_after: rows without activity after which a feature counts as dead; a hundredth of the run, at most ten
            million, if not given.
        dtype: torch.float32 or torch.float64.
        out: folder for checkpoints, and at the end for the dictionary and `training.json`.
        resume: continue from the checkpoint in `out`. On the CPU the result equals that of an unbroken run to the last
            bit.
        stop_after: leave a checkpoint in `out` after that many steps in all, and return.
        checkpoint_every: steps between checkpoints; a tenth of the run if not given.
        log_every: steps between entries of the history; a hundredth of the run if not given.
        progress: show a progress bar.

    Raises:
        BadInput: arguments out of range or contradictory, activations of the wrong shape or not finite, a checkpoint of
            other settings or of other activations.
    """
    batches = batches_of(activations, batch_size, seed)
    sample = batches.sample()
    settings: dict[str, Any] = {
        "kind": kind,
        "d_in": batches.d_in,
        "d_dict": _d_dict(batches.d_in, d_dict, expansion),
        "k": k,
        "steps": _positive("steps", steps),
        "batch_size": batch_size,
        "lr": 0.11 / batches.d_in**0.5 if lr is None else lr,
        "seed": seed,
        "auxk_weight": auxk_weight,
        "dead_after": min(10_000_000, steps * batch_size // 100) if dead_after is None else dead_after,
        "dtype": str(dtype).removeprefix("torch."),
        "log_every": max(1, steps // 100) if log_every is None else _positive("log_every", log_every),
        "activations": batches.fingerprint,
    }
    if dtype not in (torch.float32, torch.float64):
        raise BadInput(f"dtype={dtype} was given; dictionaries train in torch.float32 or torch.float64.")
    if stop_after is not None and (out is None or not 1 <= stop_after <= steps):
        raise BadInput(
            f"stop_after={stop_after} needs `out`, for the checkpoint, and must lie between 1 and steps = {steps}."
        )
    if resume and out is None:
        raise BadInput("resume=True needs `out`, the folder that holds the checkpoint.")

    mean, scale = _mean_and_scale(sample)
    run = _start(settings, dtype, mean, scale, sample.device)
    folder = None if out is None else Path(out)
    if folder is not None:
        if resume and checkpoints.is_finished(folder, settings):
            return checkpoints.load_finished(folder)
        if resume:
            checkpoints.load(folder, settings, run)
        else:
            checkpoints.begin(folder, settings, run)

    every = max(1, steps // 10) if checkpoint_every is None else _positive("checkpoint_every", checkpoint_every)
    last = steps if stop_after is None else stop_after
    first, started = run.step, time.perf_counter()
    with tqdm(total=steps, initial=run.step, disable=not progress, unit="step", desc=f"training {kind}") as bar:
        for x in batches.from_step(run.step):
            if run.step >= last:
                break
            entry = _step(run, x.to(run.dictionary.W_enc), settings, float(scale))
            if entry:
                bar.set_postfix(fvu=f"{entry['fvu']:.3f}", l0=f"{entry['l0']:.1f}", dead=f"{entry['dead_share']:.1%}")
            if folder is not None and (run.step % every == 0 or run.step == last):
                checkpoints.save(folder, settings, run)
            bar.update()
    seconds = time.perf_counter() - started
    result = TrainResult(
        dictionary=run.dictionary.requires_grad_(False).eval(),
        history=run.history,
        step=run.step,
        finished=run.step == steps,
        rows_per_second=(run.step - first) * batch_size / seconds if run.step > first else 0.0,
        settings=settings,
    )
    if folder is not None and result.finished:
        checkpoints.finish(folder, result)
    return result


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise BadInput(f"{name}={value} was given; it must be at least 1.")
    return value


def _d_dict(d_in: int, d_dict: int | None, expansion: int | None) -> int:
    if (d_dict is None) == (expansion is None):
        raise BadInput(f"d_dict={d_dict} and expansion={expansion} were given; give one of them, such as expansion=8.")
    return d_in * _positive("expansion", expansion) if d_dict is None else d_dict  # pyright: ignore[reportArgumentType]


def _mean_and_scale(sample: Tensor) -> tuple[Tensor, Tensor]:
    """The mean row, and the root of the mean variance of a component."""
    mean = sample.mean(0, dtype=torch.float64 if sample.device.type != "mps" else torch.float32)
    chunks = [(rows - mean).pow(2).sum() for rows in sample.split(16_384)]
    variance = torch.stack(chunks).sum() / sample.numel()
    if not torch.isfinite(variance):
        raise BadInput(
            "the activations hold values that are not finite; look for the layer at which the model overflows."
        )
    if variance == 0:
        raise BadInput("the activations are all the same row; there is nothing to decompose.")
    return mean, variance.sqrt()


def _start(settings: dict[str, Any], dtype: torch.dtype, mean: Tensor, scale: Tensor, device: torch.device) -> Run:
    dictionary = build(
        settings["kind"],
        d_in=settings["d_in"],
        d_dict=settings["d_dict"],
        k=settings["k"],
        dtype=dtype,
        seed=settings["seed"],
    )
    assert isinstance(dictionary, TopK)
    dictionary.b_dec.data.copy_(mean)
    dictionary.to(device)
    weights, biases = [dictionary.W_enc, dictionary.W_dec], [dictionary.b_enc, dictionary.b_dec]
    # Adam's step does not depend on the size of the gradient: without a unit of its own, a bias would move by the same
    # amount whether the activations are of size 0.01 or 100.
    optimizer = torch.optim.Adam(
        [{"params": weights, "unit": 1.0}, {"params": biases, "unit": float(scale)}],
        lr=settings["lr"],
        betas=(0.9, 0.999),
        fused=True,
    )
    return Run(dictionary, optimizer, torch.zeros(dictionary.d_dict, dtype=torch.int64, device=device))


def _step(run: Run, x: Tensor, settings: dict[str, Any], scale: float) -> dict[str, int | float] | None:
    """One optimizer step on the rows x, and its entry in the history if it is due."""
    dictionary = run.dictionary
    lr = settings["lr"] * schedule(run.step, settings["steps"])
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["unit"]

    code = dictionary.encode_sparse(x)
    reconstruction = dictionary.decode(code)
    fvu = losses.squared_error(x, reconstruction) / (dictionary.d_in * scale**2)
    loss = fvu
    dead = (run.rows_since_active > settings["dead_after"]).nonzero().squeeze(1)
    if len(dead):
        loss = loss + settings["auxk_weight"] * losses.auxk(dictionary, x, dead, reconstruction=reconstruction.detach())
    run.optimizer.zero_grad()
    torch.autograd.backward(loss)  # nnsight wraps `loss.backward()`, and looks for a trace in our source at every step
    run.optimizer.step()
    dictionary.normalize_decoder()

    run.rows_since_active += len(x)
    run.rows_since_active[code.indices[code.values > 0]] = 0
    run.step += 1
    if run.step % settings["log_every"] and run.step != settings["steps"]:
        return None
    entry: dict[str, int | float] = {
        "step": run.step,
        "loss": loss.item(),
        "fvu": fvu.item(),
        "l0": (code.values > 0).sum().item() / len(x),
        "dead_share": len(dead) / dictionary.d_dict,
    }
    if not torch.isfinite(loss):
        cause = (
            "the activations of this batch are not finite"
            if not torch.isfinite(x).all()
            else f"lr={settings['lr']:g} is too high"
        )
        raise BadInput(f"the loss is {entry['loss']} at step {run.step}: {cause}.")
    for name, value in entry.items():
        run.history[name].append(value)
    return entry


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step, as a share of its peak."""
    return min(1.0, (step + 1) / max(1, steps // 20), (steps - step) / (0.8 * steps))
