"""Trains the dictionaries that come with the package, on the zoo's language models, and measures them.

    python scripts/train_dictionaries.py                                       # all of RECIPES, into the package
    python scripts/train_dictionaries.py pylm-hybrid/layers.2.ssm.gated/topk   # some
    python scripts/train_dictionaries.py --out DIR --steps 2000                # elsewhere, longer

Text is the standard library (`circuitbench.models.zoo.corpus`): dictionaries are trained on the documents that the
models were trained on, and measured on those that were held out from both. Numbers are stored in float16, thresholds
in float32; what is measured is what is stored. All of them together must stay below `LIMIT`.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import tempfile
import time
from typing import Any

import torch

import circuitbench as cb
from circuitbench.dictionaries import shelf
from circuitbench.dictionaries.model_card import measures
from circuitbench.models.zoo import corpus

LIMIT = 8_000_000  # bytes of all dictionaries in the package
HELD_OUT = 200_000  # characters they are measured on

# What `train_sae` is given, besides the text: zoo model/site/kind -> settings.
RECIPES: dict[str, dict[str, Any]] = {
    "pylm-hybrid/layers.2.ssm.gated/topk": {"k": 32, "expansion": 4},
    "pylm-hybrid/layers.2.resid_post/batchtopk": {"k": 32, "expansion": 4},
    "pylm-mamba2/layers.3.ssm.gated/topk": {"k": 32, "expansion": 4},
    "pylm-mamba2/layers.3.resid_post/batchtopk": {"k": 32, "expansion": 4},
}
STEPS, BATCH_SIZE, SEED = 6000, 1024, 0


def train(name: str, out: pathlib.Path, steps: int, settings: dict[str, Any]) -> pathlib.Path:
    """Trains one dictionary, measures what was stored of it, and puts it where `load_dictionary` finds it."""
    model_name, site, kind = name.split("/")
    model = cb.load_model(f"zoo:{model_name}")
    train_documents, held_out_documents = corpus.split()
    began = time.process_time()
    dictionary = cb.train_sae(
        model,
        site,
        [document.text for document in train_documents],
        kind=kind,
        steps=steps,
        batch_size=BATCH_SIZE,
        seed=SEED,
        **settings,
    )
    seconds = time.process_time() - began
    dictionary.model_name = f"zoo:{model_name}"
    with tempfile.TemporaryDirectory() as stored:
        dictionary.save(stored, dtype=torch.float16)
        dictionary = cb.load_dictionary(stored)
    held_out = "\n".join(document.text for document in held_out_documents)[:HELD_OUT]
    evaluation = cb.evaluate(dictionary, model, held_out)
    dictionary.metadata |= {
        "evaluation": measures(evaluation),
        "recipe": {"kind": kind, "steps": steps, "batch_size": BATCH_SIZE, "seed": SEED, **settings},
        "text": "the Python standard library (PSF License Version 2), circuitbench.models.zoo.corpus",
        "cpu_seconds": round(seconds),
    }
    folder = out / model_name / site / kind
    shutil.rmtree(folder, ignore_errors=True)
    dictionary.save(folder, dtype=torch.float16)
    print(f"{name}: {evaluation}; {bytes_in(folder) / 1e6:.2f} MB, {seconds:.0f} seconds of CPU")
    return folder


def bytes_in(folder: pathlib.Path) -> int:
    """Size of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Reads the arguments, trains what they name, and refuses to have filled the package beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of: {', '.join(RECIPES)}; all, if none is named")
    parser.add_argument("--out", type=pathlib.Path, default=shelf.SHELF)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(RECIPES))
    if unknown:
        parser.error(f"there is no recipe for {', '.join(unknown)}; there are: {', '.join(RECIPES)}")
    for name in arguments.names or RECIPES:
        train(name, arguments.out, arguments.steps, RECIPES[name])
    size = bytes_in(arguments.out)
    print(f"{arguments.out} holds {size / 1e6:.2f} MB of dictionaries")
    if size > LIMIT:
        parser.error(f"that is more than {LIMIT / 1e6:.0f} MB; take fewer features")


if __name__ == "__main__":
    main()
