"""What `precision="bfloat16"` gains and costs: CPU-seconds (or, on a GPU, seconds) a step, and FVU, beside float32.

Runs are interleaved, and medians are printed. `python scripts/bench/precision.py [--device cuda]`
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from circuitbench import dictionaries
from circuitbench.dictionaries.recipe import recipe
from circuitbench.dictionaries.run import Run
from circuitbench.dictionaries.synthetic import Truth

PRECISIONS = ("float32", "bfloat16")


def seconds_a_step(given: argparse.Namespace, kind: str) -> dict[str, float]:
    """Medians over rounds; each round has steps of both, one after the other."""
    rows = torch.randn(given.batch_size, given.d_in, device=given.device)
    settings = {"k": 32} if kind != "standard" else {}
    runs = {
        p: Run(recipe({"x": given.d_in}, kind=kind, d_dict=given.d_dict, steps=10**6, batch_size=given.batch_size,
                      precision=p, **settings), {"x": rows})
        for p in PRECISIONS
    }  # fmt: skip
    clock = time.process_time if given.device == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    for number in range(given.rounds + 1):
        for precision, run in runs.items():
            started = clock()
            for _ in range(given.steps):
                run.train_on({"x": rows})
            if given.device != "cpu":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                taken[precision].append((clock() - started) / given.steps)
    return {precision: statistics.median(values) for precision, values in taken.items()}


def quality(kind: str, seed: int) -> dict[str, float]:
    """FVU at the end, mean of the last tenth of the run, on activations with known features."""
    rows = Truth(d_in=64, n_features=192, l0=4.0, seed=seed).sample(20_000, seed=seed)[0]
    settings = {"k": 8} if kind != "standard" else {"l0": 8.0}
    how = {"kind": kind, "d_dict": 256, "steps": 500, "batch_size": 256, "progress": False, "seed": seed}
    found = {p: dictionaries.train(rows, **how, **settings, precision=p).history["fvu"] for p in PRECISIONS}
    return {precision: statistics.mean(fvu[-len(fvu) // 10 :]) for precision, fvu in found.items()}


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"d-in": 768, "d-dict": 6144, "batch-size": 2048, "steps": 2, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for kind in ("topk", "batchtopk", "standard"):
        taken = seconds_a_step(given, kind)
        print(
            kind,
            {p: f"{1e3 * s:.0f} ms a step" for p, s in taken.items()},
            f"{taken['float32'] / taken['bfloat16']:.2f}x",
        )
    for kind in ("topk", "standard"):
        for seed in range(3):
            print(kind, seed, {p: f"FVU {fvu:.4f}" for p, fvu in quality(kind, seed).items()})


if __name__ == "__main__":
    main()
