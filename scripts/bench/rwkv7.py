"""RWKV-7 on one thread: the chunked recurrence against loops over positions, and the whole model with either.

    python scripts/bench/rwkv7.py

Sizes are those of the 0.1B model: 12 heads of 64 × 64, 12 layers of width 768, 65,536 tokens. Times are CPU-seconds,
medians of interleaved runs over 512 positions. The loop is the quickest we know in torch: one small matrix product to
ask the state and one to read it, no indexing. flash-linear-attention's naive loop is measured too where it is installed
(its import needs triton).
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from circuitbench.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM, layers
from circuitbench.recurrences import rwkv7

LENGTH, HEADS, SIZE = 512, 12, 64
NAIVE = "fla.ops.generalized_delta_rule.dplr.naive"

Run = Callable[[], object]


def seconds(function: Run) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def loop(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, a position at a time."""
    S = v.new_zeros(*v.shape[:1], *v.shape[2:3], r.shape[-1], v.shape[-1]) if state is None else state
    decay, ask, read = w.exp()[..., None].unbind(1), a[..., None, :].unbind(1), r[..., None, :].unbind(1)
    put, key, value = b[..., None].unbind(1), k[..., None].unbind(1), v[..., None, :].unbind(1)
    outputs = []
    for t in range(v.shape[1]):
        S = decay[t] * S + put[t] * (ask[t] @ S) + key[t] * value[t]
        outputs.append(read[t] @ S)
    return torch.cat(outputs, -2).transpose(1, 2), S


def operands(batch: int) -> list[Tensor]:
    """r, w, k, v, a, b as a layer makes them."""
    shape = (batch, LENGTH, HEADS, SIZE)
    r, k, v = (torch.randn(shape) for _ in range(3))
    removal = F.normalize(torch.randn(shape), dim=-1)
    w = -math.exp(-0.5) * torch.randn(shape).sigmoid()
    return [r, w, k / 8, v, -removal, removal * torch.rand(shape)]


def chunked(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return rwkv7.forward(v, r, w, k, a, b)[0]


def row(what: str, tokens: int, runs: int, ours: Run, *others: Run) -> None:
    """Tokens a second of each, and how many times ours is those of the others."""
    for function in (ours, *others):
        function()
    times = [[seconds(function) for function in (ours, *others)] for _ in range(runs)]
    middle = [statistics.median(column) for column in zip(*times, strict=True)]
    ratios = [statistics.median(run[i] / run[0] for run in times) for i in range(1, len(middle))]
    rates = "".join(f"{tokens / value:12,.0f}" for value in middle)
    print(f"{what:44}{rates}   {', '.join(f'{ratio:.1f} ×' for ratio in ratios)}", flush=True)


def naive() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """flash-linear-attention's loop, where it can be imported."""
    try:
        return importlib.import_module(NAIVE).dplr_recurrence
    except ImportError:
        return None


def bench_recurrence(batch: int) -> None:
    given = operands(batch)
    with torch.no_grad():
        off = (chunked(*given) - loop(*given)[0]).abs().max() / loop(*given)[0].abs().max()
        theirs = naive()
        others: list[Run] = [lambda: loop(*given)]
        if theirs is not None:
            r, w, k, v, a, b = (value.transpose(1, 2) for value in given)
            others.append(lambda: theirs(r / SIZE**-0.5, k, v, a, b, w))
        row(f"recurrence, {batch} × {LENGTH}, forward", batch * LENGTH, 7, lambda: chunked(*given), *others)
    for value in given:
        value.requires_grad_()
    weights = torch.randn_like(given[3])
    row(
        f"recurrence, {batch} × {LENGTH}, forward + backward",
        batch * LENGTH,
        5,
        lambda: torch.autograd.grad(chunked(*given), given, weights),
        lambda: torch.autograd.grad(loop(*given)[0], given, weights),
    )
    print(f"    outputs differ by {off.item():.1e} of the largest", flush=True)


def bench_model() -> None:
    config = RWKV7Config(
        vocab_size=65536, hidden_size=HEADS * SIZE, num_hidden_layers=12, head_dim=SIZE, v_low_rank_dim=32
    )
    hf = RWKV7ForCausalLM(config).eval()
    ids = torch.randint(0, 65536, (1, LENGTH))
    ours = layers.rwkv7_scan

    def run(scan: Callable[..., tuple[Tensor, Tensor | None]]) -> Tensor:
        layers.rwkv7_scan = scan
        with torch.no_grad():
            logits = hf(ids, use_cache=False).logits
        layers.rwkv7_scan = ours
        return logits

    def by_loop(*given: Tensor, initial_state: Tensor | None, output_final_state: bool) -> tuple[Tensor, Tensor]:
        return loop(*given, state=initial_state)

    off = (run(ours) - run(by_loop)).abs().max()
    row(f"whole model, {LENGTH} tokens, forward", LENGTH, 5, lambda: run(ours), lambda: run(by_loop))
    print(f"    logits differ by {off.item():.1e}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Once a tensor of this size has come and gone, as in any run of a model, the C library keeps freed memory, instead
    # of giving it back to the system after every call and asking for it again.
    torch.zeros(30 * 2**20, dtype=torch.uint8)
    columns = ["ours", "a loop"] + (["fla, naive"] if naive() is not None else [])
    print(f"{'tokens a second':44}{''.join(f'{name:>12}' for name in columns)}   ratio")
    bench_recurrence(1)
    bench_recurrence(4)
    bench_model()


if __name__ == "__main__":
    main()
