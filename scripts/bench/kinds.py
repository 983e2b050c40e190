"""Every kind of dictionary on one site of a shipped model, at one L0, from one pass over one text: a table.

    python scripts/bench/kinds.py                  # zoo:pylm-hybrid, layers.2.ssm.gated, L0 32
    python scripts/bench/kinds.py --steps 3000 --seeds 0 1 2

All kinds see the same rows in the same order. Kinds with a k have k = L0; the others are steered to it (`l0=`). Judged
on text that neither the model nor the dictionaries have seen.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

import circuitbench as cb
from circuitbench import dictionaries
from circuitbench.demo import cut
from circuitbench.models.zoo import corpus

KINDS = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:pylm-hybrid")
    parser.add_argument("--site", default="layers.2.ssm.gated")
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--characters", type=int, default=1_500_000, help="of text to train on")
    parser.add_argument("--held-out", type=int, default=60_000, help="characters to judge on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=sorted(dictionaries.KINDS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)

    model = cb.load_model(given.model)
    train, held_out = corpus.split()
    random.Random(0).shuffle(train)  # documents come sorted by name: not all of one package
    random.Random(0).shuffle(held_out)
    text, judged = cut([d.text for d in train], given.characters), cut([d.text for d in held_out], given.held_out)
    has_k = {kind: "k" in dictionaries.KINDS[kind].settings_names for kind in given.kinds}
    recipes = [
        {
            "site": given.site,
            "kind": kind,
            "expansion": given.expansion,
            "seed": seed,
            "log_every": 50,
            **({"k": given.l0} if has_k[kind] else {"l0": float(given.l0)}),
        }
        for kind in given.kinds
        for seed in given.seeds
    ]
    started = time.process_time()
    results = dictionaries.train_many_on_text(model, text, recipes, steps=given.steps, batch_size=1024)
    print(f"{len(recipes)} dictionaries in {time.process_time() - started:.0f} CPU-seconds")
    found: dict[str, list[dict[str, float]]] = {}
    for recipe, result in zip(recipes, results, strict=True):
        judgement = cb.evaluate(result.dictionary, model, judged, progress=False)
        numbers = {
            "l0": judgement.l0,
            "fvu": judgement.fvu,
            "recovered": judgement.ce_recovered("mean"),
            "recovered_zero": judgement.ce_recovered("zero"),
            "kl": judgement.kl,
            "dead": judgement.dead_share,
        }
        found.setdefault(str(recipe["kind"]), []).append(numbers)
        print(recipe["kind"], recipe["seed"], {name: round(value, 4) for name, value in numbers.items()}, flush=True)
    print(table(found))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown; with several seeds, the mean and half the range."""

    def said(runs: list[dict[str, float]], name: str, form: str) -> str:
        values = [run[name] for run in runs]
        spread = f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{spread}"

    columns = {
        "L0": ("l0", ".1f"),
        "FVU": ("fvu", ".3f"),
        "CE recovered (mean ablation)": ("recovered", ".3f"),
        "CE recovered (zero ablation)": ("recovered_zero", ".3f"),
        "KL, nats": ("kl", ".3f"),
        "dead": ("dead", ".1%"),
    }
    lines = [f"| kind | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for kind, runs in found.items():
        lines.append(f"| {kind} | " + " | ".join(said(runs, *column) for column in columns.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
