"""Which handling of the decoder rows' length recovers most of known features? Prints a table in Markdown.

python scripts/bench/decoder_norm.py --size small      # d_in 64, 256 features, 500 steps of 512 rows
python scripts/bench/decoder_norm.py --size large      # d_in 128, 1024 features, 800 steps of 1024 rows
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import torch

from circuitbench import dictionaries
from circuitbench.dictionaries import synthetic

SIZES = {
    "small": {"d_in": 64, "n_features": 256, "l0": 8.0, "rows": 60_000, "steps": 500, "batch_size": 512},
    "large": {"d_in": 128, "n_features": 1024, "l0": 16.0, "rows": 204_800, "steps": 800, "batch_size": 1024},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--kinds", nargs="+", default=["topk", "batchtopk"])
    parser.add_argument("--norms", nargs="+", default=["unit", "tangent", "free"])
    parser.add_argument("--lr", nargs="+", type=float, default=[0.06, 0.11, 0.18], help="times 1 / sqrt(d_in)")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    size = SIZES[given.size]
    truths = [
        synthetic.Truth(d_in=size["d_in"], n_features=size["n_features"], l0=size["l0"], shift=1.0, seed=seed)
        for seed in range(given.seeds)
    ]
    samples = [truth.sample(size["rows"])[0] for truth in truths]
    print("| kind | rows of the decoder | lr · √d_in | MMCS | recovered | FVU |\n|---|---|---|---|---|---|")
    for kind, lr, norm in itertools.product(given.kinds, given.lr, given.norms):
        scores = []
        for seed, (truth, x) in enumerate(zip(truths, samples, strict=True)):
            result = dictionaries.train(
                x, kind=kind, d_dict=size["n_features"], k=int(size["l0"]), steps=size["steps"],
                batch_size=size["batch_size"], lr=lr / size["d_in"] ** 0.5, decoder_norm=norm, seed=seed,
                progress=False,
            )  # fmt: skip
            scores.append(synthetic.score(result.dictionary, truth, n=8192))
        columns = (spread([getattr(score, name) for score in scores]) for name in ("mmcs", "recovered", "fvu"))
        print(f"| {kind} | {norm} | {lr:g} | {' | '.join(columns)} |", flush=True)


def spread(values: list[float]) -> str:
    """Mean and range."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
