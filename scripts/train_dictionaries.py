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
from circuitbench.dictionaries.on_model import train_many_on_text
from circuitbench.models.zoo import corpus

LIMIT = 8_000_000  # bytes of all dictionaries in the package
HELD_OUT = 200_000  # characters they are measured on

# What `train_many_on_text` is given, besides site and kind: zoo model/site/kind -> settings.
RECIPES: dict[str, dict[str, Any]] = {
    "pylm-hybrid/layers.2.ssm.gated/topk": {"k": 32, "expansion": 4},
    "pylm-hybrid/layers.2.resid_post/batchtopk": {"k": 32, "expansion": 4},
    "pylm-mamba2/layers.3.ssm.gated/topk": {"k": 32, "expansion": 4},
    "pylm-mamba2/layers.3.resid_post/batchtopk": {"k": 32, "expansion": 4},
}
STEPS, BATCH_SIZE, SEED = 6000, 1024, 0


def train(model_name: str, names: list[str], out: pathlib.Path, steps: int) -> None:
    """Trains a model's dictionaries from one stream; puts them, measured as stored, where `load_dictionary` looks."""
    model = cb.load_model(f"zoo:{model_name}")
    train_documents, held_out_documents = corpus.split()
    held_out = "\n".join(document.text for document in held_out_documents)[:HELD_OUT]
    recipes = [{"site": name.split("/")[1], "kind": name.split("/")[2], **RECIPES[name]} for name in names]
    texts = [document.text for document in train_documents]
    began = time.process_time()
    results = train_many_on_text(model, texts, recipes, steps=steps, batch_size=BATCH_SIZE, seed=SEED)
    seconds = time.process_time() - began
    for name, recipe, result in zip(names, recipes, results, strict=True):
        result.dictionary.model_name = f"zoo:{model_name}"
        result.dictionary.metadata |= {
            "recipe": {**recipe, "steps": steps, "batch_size": BATCH_SIZE, "seed": SEED},
            "text": "the Python standard library (PSF License Version 2), circuitbench.models.zoo.corpus",
            "cpu_seconds": round(seconds),
            "trained_together": len(names),
        }
        with tempfile.TemporaryDirectory() as stored:
            result.dictionary.save(stored, dtype=torch.float16)
            dictionary = cb.load_dictionary(stored)
        evaluation = cb.evaluate(dictionary, model, held_out)
        dictionary.metadata["evaluation"] = measures(evaluation)
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        dictionary.save(folder, dtype=torch.float16)
        print(f"{name}: {evaluation}; {bytes_in(folder) / 1e6:.2f} MB")


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
    names = arguments.names or list(RECIPES)
    for model_name in dict.fromkeys(name.split("/")[0] for name in names):
        of_model = [name for name in names if name.split("/")[0] == model_name]
        train(model_name, of_model, arguments.out, arguments.steps)
    size = bytes_in(arguments.out)
    print(f"{arguments.out} holds {size / 1e6:.2f} MB of dictionaries")
    if size > LIMIT:
        parser.error(f"that is more than {LIMIT / 1e6:.0f} MB; take fewer features")


if __name__ == "__main__":
    main()
