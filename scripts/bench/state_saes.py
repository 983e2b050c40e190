"""State dictionaries on the zoo's models: what they leave unexplained, and the substitution experiment beside deletion.

    python scripts/bench/state_saes.py                    # the table of docs/state_saes.md
    python scripts/bench/state_saes.py --steps 1000 --sequences 2000 --features 1024

Trained on Python's standard library, substituted on documents held out; one head a dictionary. Columns: FVU on the last
batch of training; KL of the deletion in nats, mean over the positions from the deleted write on; then for each
replacement its KL as a share of the deletion's, and how often it is nearer to the clean run.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch

import circuitbench as cb
from circuitbench.dictionaries import state_rows, substitution
from circuitbench.dictionaries.states import train_on_rows
from circuitbench.models import Model
from circuitbench.models.zoo import corpus

UNIT = {"atoms": "rank1", "unit_rows": True}
PLAN: list[tuple[str, str, int, dict[str, dict[str, Any]]]] = [
    ("zoo:pylm-hybrid", "layers.2.ssm.write", 3, {"rank1, unit rows": UNIT, "rank1": {"atoms": "rank1"},
                                                  "vector, topk": {"atoms": "vector"}}),
    ("zoo:pylm-hybrid", "layers.0.ssm.write", 3, {"rank1, unit rows": UNIT}),
    ("zoo:pylm-mamba2", "layers.2.ssm.write", 3, {"rank1, unit rows": UNIT}),
    ("zoo:pylm-hybrid", "layers.2.ssm.state", 3, {"rank1": {"atoms": "rank1"}, "vector, topk": {"atoms": "vector"}}),
]  # fmt: skip
SHOWN = ("atom", "code", "random", "mean")


def prompts_of(model: Model, texts: list[str], n: int, length: int) -> torch.Tensor:
    """The beginnings of some documents that are long enough."""
    assert model.tokenizer is not None
    found = (model.tokenizer(text)["input_ids"][:length] for text in texts)
    return torch.tensor([ids for ids in found if len(ids) == length][:n])


def main() -> None:
    """Train, substitute, print a row for each dictionary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=600, help="of 128 tokens, 16 random positions of each")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=16, help="of 64 tokens, 8 random positions of each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    training, held_out = ([document.text for document in part] for part in corpus.split())
    for texts in (training, held_out):
        random.Random(0).shuffle(texts)
    heads = " | ".join(f"{name}: KL ratio, nearer" for name in SHOWN)
    print(f"| model, site, head | atoms | FVU | dead | deletion KL | {heads} | CPU s |")
    print("|---" * (6 + len(SHOWN)) + "|")
    for name, site, head, forms in PLAN:
        model = cb.load_model(name)
        prompts = prompts_of(model, held_out, options.prompts, 64)
        reading: dict[str, Any] = {"positions_per_sequence": 16, "context": 128, "sequences_per_forward": 8}
        rows = state_rows(
            model, site, training, head=head, max_sequences=options.sequences, seed=options.seed, **reading
        )
        for label, form in forms.items():
            started = time.process_time()
            result = train_on_rows(
                model,
                rows,
                d_dict=options.features,
                k=options.k,
                steps=options.steps,
                batch_size=options.batch_size,
                seed=options.seed,
                progress=False,
                **form,
            )
            seconds = time.process_time() - started
            found = substitution(model, result.dictionary, prompts, n_positions=8, seed=options.seed)
            cells = " | ".join(f"{found.ratio(one):.2f}, {found.wins(one):.0%}" for one in SHOWN)
            history = result.history
            print(
                f"| {name} {site} {head} | {label} | {history['fvu'][-1]:.2f} | {history['dead_share'][-1]:.0%} | "
                f"{found.kl_deletion.mean():.1e} | {cells} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
