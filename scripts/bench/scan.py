"""The recurrences against Hugging Face's torch code, on one thread: time, gradients and memory.

    python scripts/bench/scan.py          # one of Hugging Face's S6 backward passes takes minutes
    python scripts/bench/scan.py --fast   # S6 forward + backward on 64 positions instead of 512

Times are CPU-seconds, medians of interleaved runs. The floor of a scan is what its arithmetic alone takes at the speed
this machine shows on it, memory left out. For S6 that is, per state number, one `exp2` and six operations (dt·A, the
write, the state, the read), timed as three `addcmul` in the cache; backward computes the states again and does about
twice as much besides. For SSD and the gated delta rule it is their matrix products, at the speed of one of 1024 × 1024;
backward has twice those of forward.
"""

from __future__ import annotations

import argparse
import inspect
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from circuitbench.recurrences import gated_delta, s6, ssd

Scan = Callable[..., Tensor]


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def speed(function: Callable[[], object], work: float) -> float:
    """Units of work a second, at the best of many runs."""
    return work / min(seconds(lambda: [function() for _ in range(20)]) / 20 for _ in range(15))


def forward(scan: Scan, operands: Sequence[Tensor]) -> None:
    with torch.no_grad():
        scan(*operands)


def backward(scan: Scan, operands: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(scan(*operands), operands, weights))


def row(what: str, ours: Callable[[], object], theirs: Callable[[], object], floor: float, runs: int = 7) -> None:
    """One line of the table, from `runs` runs of each in turn."""
    times = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(f"{what:60}{mine * 1e3:9.0f} ms{other * 1e3:10.0f} ms{ratio:9.1f} ×{floor * 1e3:10.0f} ms", flush=True)


def compare(what: str, ours: Scan, theirs: Scan, operands: Sequence[Tensor], floor: float) -> None:
    weights = torch.randn_like(operands[0])
    row(f"{what}, forward", lambda: forward(ours, operands), lambda: forward(theirs, operands), floor)
    both = (lambda: backward(ours, operands, weights)), (lambda: backward(theirs, operands, weights))
    row(f"{what}, forward + backward", *both, 3 * floor)
    report_gradients(both[0](), both[1]())


def report_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]
    print(
        f"    gradients differ by at most {max(errors):.1e} (norm of the difference / norm, worst operand)", flush=True
    )


def s6_operands(batch: int, length: int, channels: int, n: int) -> list[Tensor]:
    x, dt = torch.randn(batch, length, channels), F.softplus(torch.randn(batch, length, channels) - 3)
    A = -torch.arange(1.0, n + 1).expand(channels, n).contiguous()
    B, C = torch.randn(batch, length, n), torch.randn(batch, length, n)
    return [v.requires_grad_() for v in (x, dt, A, B, C)]


def bench_s6(fast: bool) -> None:
    def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return s6.forward(x, dt, A, B, C)[0]

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        x, dt, B, C = (v.transpose(1, 2) for v in (x, dt, B, C))
        return inspect.unwrap(mamba_selective_scan)(x, dt, A, B, C).transpose(1, 2)

    block = torch.rand(24_576)
    out = torch.empty_like(block)
    per_number = 1 / speed(lambda: torch.exp2(block, out=out), block.numel())
    per_number += 3 / speed(lambda: torch.addcmul(block, block, block, out=out), block.numel())
    floor = 4 * 512 * 1536 * 16 * per_number
    operands = s6_operands(4, 512, 1536, 16)
    what = "S6, 1536 × 16, 4 × {} positions"
    row(what.format(512) + ", forward", lambda: forward(ours, operands), lambda: forward(theirs, operands), floor)
    length = 64 if fast else 512
    operands = s6_operands(4, length, 1536, 16)
    weights = torch.randn_like(operands[0])
    found: dict[str, list[Tensor]] = {}
    row(
        what.format(length) + ", forward + backward",
        lambda: found.update(ours=backward(ours, operands, weights)),
        lambda: found.update(theirs=backward(theirs, operands, weights)),
        4 * floor * length / 512,
        runs=3 if fast else 1,
    )
    report_gradients(found["ours"], found["theirs"])


def bench_ssd(flops: float) -> None:
    batch, length, heads, p, n = 4, 512, 24, 64, 128
    x, dt = torch.randn(batch, length, heads, p), F.softplus(torch.randn(batch, length, heads) - 3)
    A, B, C = -1 - 15 * torch.rand(heads), torch.randn(batch, length, 1, n), torch.randn(batch, length, 1, n)
    work = 2 * batch * length * heads * p * (2 * n + ssd.CHUNK)
    compare(
        "SSD, 24 × 64 × 128, 4 × 512 positions",
        lambda *operands: ssd.forward(*operands)[0],
        lambda *operands: inspect.unwrap(mamba2_chunk_scan)(*operands, 256),
        [v.requires_grad_() for v in (x, dt, A, B, C)],
        work / flops,
    )


def bench_gated_delta(flops: float) -> None:
    batch, length, heads, d = 1, 512, 16, 128
    x = torch.randn(batch, length, heads, d)
    k, q = (F.normalize(torch.randn(batch, length, heads, d), dim=-1) for _ in range(2))
    g, beta = -F.softplus(torch.randn(batch, length, heads) - 2), torch.rand(batch, length, heads)
    work = 2 * batch * length * heads * d * (3 * d + 2.5 * gated_delta.CHUNK)
    compare(
        "Gated delta, 16 × 128 × 128, 512 positions",
        lambda x, k, q, g, beta: gated_delta.forward(x, k, q * d**-0.5, g, beta)[0],
        lambda x, k, q, g, beta: inspect.unwrap(torch_chunk_gated_delta_rule)(q, k, x, g, beta)[0],
        [v.requires_grad_() for v in (x, k, q, g, beta)],
        work / flops,
    )


def bench_memory() -> None:
    """The peak of the whole process: before anything else has used memory."""
    length, heads, p, n = 2048, 24, 64, 128
    x, dt = torch.randn(1, length, heads, p), torch.rand(1, length, heads)
    B, C = torch.randn(1, length, 1, n), torch.randn(1, length, 1, n)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    for _ in ssd.iter_states(x, dt, -torch.rand(heads), B, C):
        pass
    spent = time.process_time() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    total = length * heads * p * n * 4
    print(
        f"All states of one layer, SSD 24 × 64 × 128, {length} positions, in chunks: {spent:.1f} s, "
        f"peak {peak / 1e6:.0f} MB above the operands (all at once: {total / 1e6:.0f} MB)\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="S6 forward + backward on 64 positions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench_memory()
    matrix = torch.randn(1024, 1024)
    flops = speed(lambda: matrix @ matrix, 2 * 1024**3)
    print(f"{'':60}{'ours':>12}{'transformers':>13}{'ratio':>11}{'floor':>13}")
    bench_s6(arguments.fast)
    bench_ssd(flops)
    bench_gated_delta(flops)


if __name__ == "__main__":
    main()
