"""What reading sites costs, next to raw forward hooks; and what reading the recurrent state costs in memory.

    python scripts/bench/capture.py            # the sizes of mamba2-130m and mamba-130m, random weights
    python scripts/bench/capture.py --fast     # narrower models

One thread. The contenders run in turn, and ratios are of CPU-seconds, pair by pair; medians are printed. Peak memory is
the process's own high-water mark, above what it was with the model loaded and run once.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig
from transformers.utils import logging

import circuitbench as cb

logging.set_verbosity_error()


def build(family: str, width: int, layers: int = 24) -> cb.Model:
    """A model of 24 layers with random weights."""
    torch.manual_seed(0)
    if family == "mamba2":
        config = Mamba2Config(
            vocab_size=1024,
            hidden_size=width,
            num_hidden_layers=layers,
            num_heads=2 * width // 64,
            head_dim=64,
            n_groups=1,
        )
    else:
        config = MambaConfig(vocab_size=1024, hidden_size=width, num_hidden_layers=layers)
    return cb.load_model(AutoModelForCausalLM.from_config(config).eval())


def hooked(model: cb.Model, ids: torch.Tensor, module: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """The same run with a forward pre-hook on one module of every layer that keeps its input."""
    kept: list[torch.Tensor] = []
    layers = model.hf.backbone.layers
    handles = [
        module(layer).register_forward_pre_hook(lambda _, args: kept.append(args[0].detach())) for layer in layers
    ]
    with torch.no_grad():
        model.hf(ids)
    for handle in handles:
        handle.remove()
    assert len(kept) == len(layers)


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(label: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> float:
    """Median ratio of CPU-seconds, the contenders in turn."""
    ours(), theirs()
    pairs = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{label:<58} {first:7.3f} s  hooks {second:7.3f} s  ratio {ratio:5.2f}", flush=True)
    return ratio


def overheads(width: int, length: int, rounds: int) -> None:
    """Capturing one site at every layer, against forward hooks that keep out_proj's input."""
    for family in ("mamba2", "mamba"):
        model = build(family, width)
        ids = torch.randint(1024, (1, length))
        for site in ("ssm.gated", "ssm.y", "resid_post"):
            compare(
                f"{family} d={width} t={length}: {site} at 24 layers",
                lambda model=model, ids=ids, site=site: cb.capture(model, ids, f"layers.*.{site}"),
                lambda model=model, ids=ids: hooked(model, ids, lambda layer: layer.mixer.out_proj),
                rounds,
            )


def peak() -> float:
    """High-water mark of this process's memory, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def state_memory(positions: int) -> None:
    """Reading h_t of one layer at every position, in chunks; in a process of its own, so that the mark counts."""
    model = build("mamba2", 768, layers=2)
    ids = torch.randint(1024, (1, positions))
    with torch.no_grad():
        model.hf(ids)
        with model.trace(ids):
            logits = model.logits.save()
    del logits
    before = peak()
    with torch.no_grad():
        with model.trace(ids):
            norms = []
            for _, states in model.layers[1].ssm.iter_state(chunk=32):
                norms.append(states.flatten(2).norm(dim=-1))
            norms = torch.cat(norms, 1).save()
    whole = positions * 24 * 64 * 128 * 4 / 2**20
    print(
        f"ssm.state of one layer, {positions} positions of 24 x 64 x 128, in chunks: peak {peak() - before:.0f} MB "
        f"above the model's own run (all states together: {whole:.0f} MB); {norms.shape[1]} positions read"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="narrower models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--state-memory", type=int, metavar="POSITIONS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.state_memory:
        state_memory(options.state_memory)
        return
    overheads(*((128, 64) if options.fast else (768, 128)), options.rounds)
    subprocess.run([sys.executable, __file__, "--state-memory", "2048"], check=True)


if __name__ == "__main__":
    main()
