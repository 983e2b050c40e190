"""What the way from text to activations costs, next to the bare forward; and how well a pool of rows mixes.

    python scripts/bench/activations.py            # Mamba-2 of width 768 (random weights), and zoo:pylm-hybrid
    python scripts/bench/activations.py --only hybrid

The bare forward is Hugging Face's module under `torch.no_grad()`, with a forward hook on the last layer that is needed
which raises: nothing later runs, and nothing is kept. It is given token ids in tensors; the stream is given text (token
ids for the random model, which has no tokenizer), and packs, masks and hands out rows. One thread. The contenders run
in turn; the shares are of tokens per CPU-second, round by round; medians are printed, with the least and the largest.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Mamba2Config
from transformers.utils import logging

import circuitbench as cb
from circuitbench.activations import FORMATS, ActivationStream, Rows, Shuffled, mixing, store
from circuitbench.models.zoo import corpus

logging.set_verbosity_error()


class Reached(Exception):
    """The layer has run."""


def truncated(model: cb.Model, layer: torch.nn.Module, batches: list[torch.Tensor]) -> None:
    """Forwards that end after a layer."""

    def stop(*_: object) -> None:
        raise Reached

    handle = layer.register_forward_hook(stop)
    with torch.no_grad():
        for ids in batches:
            try:
                model.hf(ids, use_cache=False)
            except Reached:
                continue
    handle.remove()


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def drained(rows: object) -> None:
    """Read to the end, keeping nothing."""
    for _ in rows:  # pyright: ignore[reportGeneralTypeIssues]
        pass


def compare(title: str, model: cb.Model, layer: torch.nn.Module, sites: list[str], text: object, rounds: int) -> None:
    """The bare forward against the stream and what is made of it."""
    settings = {"context": 256, "sequences_per_forward": 8}
    one, several = (ActivationStream(model, wanted, text, **settings) for wanted in (sites[-1], sites))
    batches = [ids for ids, _ in one.forwards()]
    n_tokens = one.counts().tokens
    with tempfile.TemporaryDirectory() as folder:
        places = iter(range(1_000_000))

        def stored(dtype: str) -> None:
            store(one, Path(folder) / str(next(places)), dtype=dtype, sequences_per_shard=8)

        contenders: dict[str, Callable[[], object]] = {
            "bare forward": lambda: truncated(model, layer, batches),
            "one site": lambda: drained(one),
            "three sites": lambda: drained(several),
            "one site, shuffled": lambda: drained(Shuffled(one, batch_size=512, buffer=2048)),
            **{f"one site, stored as {dtype}": lambda dtype=dtype: stored(dtype) for dtype in FORMATS},
        }
        for run in contenders.values():
            run()
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds):
            order = list(contenders)
            random.Random(number).shuffle(order)
            for name in order:
                taken[name].append(cpu_seconds(contenders[name]))
    print(f"{title}: {n_tokens} tokens, {len(batches)} forwards of 8 × 256", flush=True)
    for name, seconds in taken.items():
        shares = [bare / mine for bare, mine in zip(taken["bare forward"], seconds, strict=True)]
        speed = n_tokens / statistics.median(seconds)
        spread = f"{statistics.median(shares):5.2f}  ({min(shares):.2f} to {max(shares):.2f})"
        print(f"  {name:<28} {speed:8.0f} tokens/CPU-s   {spread}", flush=True)


def mix(model: cb.Model, text: list[str]) -> None:
    """How well pools of some sizes mix a text; the model does not run."""
    stream = ActivationStream(model, model.sites[0], text, context=256)
    parts = [
        Rows({}, ids.flatten(), numbers.repeat_interleave(ids.shape[1]), torch.arange(ids.shape[1]).repeat(len(ids)))
        for ids, numbers in stream.forwards()
    ]
    n, batch = sum(rows.n for rows in parts), 1024
    print(f"mixing, {n} rows in sequences of 256, batches of {batch} (1 is a full shuffle)")
    straight = torch.cat([rows.sequence for rows in parts])
    print(f"  no shuffle     {mixing(straight.split(batch)):7.4f}")
    for pool in (2048, 8192, 32_768, 131_072):
        found = mixing(rows.sequence for rows in Shuffled(parts, batch_size=batch, buffer=pool))
        print(f"  pool {pool:>8}  {found:7.4f}   (2 − batch/pool) · pool/n = {(2 - batch / pool) * pool / n:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("hybrid", "mamba2"), help="one of the two")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != "mamba2":
        texts = [document.text for document in corpus.split()[1]]
        hybrid = cb.load_model("zoo:pylm-hybrid")
        mix(hybrid, texts)
        sites = ["layers.2.ssm.gated", "layers.2.ssm.out", "layers.2.resid_post"]
        some = [text[:4000] for text in texts[:8]]
        compare("zoo:pylm-hybrid, layers 0 to 2", hybrid, hybrid.hf.model.layers[2], sites, some, options.rounds)
    if options.only != "hybrid":
        torch.manual_seed(0)
        config = Mamba2Config(
            vocab_size=1024, hidden_size=768, num_hidden_layers=4, num_heads=24, head_dim=64, n_groups=1
        )
        model = cb.load_model(AutoModelForCausalLM.from_config(config).eval())
        ids = random.Random(0).choices(range(3, 1024), k=8 * 256)
        sites = [f"layers.1.{name}" for name in ("ssm.gated", "ssm.out", "resid_post")]
        layer = model.hf.backbone.layers[1]
        compare("Mamba-2, width 768, layers 0 and 1", model, layer, sites, [ids], options.rounds)


if __name__ == "__main__":
    main()
