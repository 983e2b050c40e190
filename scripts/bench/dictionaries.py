"""Training speed, memory and quality of TopK dictionaries: circuitbench beside SAELens and sparsify, on the same rows.

Every project is driven through its own public trainer, in its own environment, one process a run, interleaved. The rows
are synthetic: x = Σ aᵢ dᵢ + b with known unit directions dᵢ, a few of them active, so that what was recovered is known.

    python scripts/bench/dictionaries.py speed   --saelens PYTHON --sparsify PYTHON
    python scripts/bench/dictionaries.py quality --saelens PYTHON --lrs 1e-3 3e-3 1e-2 --seeds 0 1 2

`PYTHON` is the interpreter of an environment that has the project (scripts/peers.sh makes them). Numbers:

* tokens per CPU-second: rows of a batch over the median process CPU time of a step, one thread;
* roofline: the share of the time that the one dense product (and the sparse ones at its rate) would take;
* peak: the largest resident memory of the process, and how much of it came after the rows were loaded;
* FVU on held-out rows; MMCS: the mean over the true directions of the largest cosine with a decoder row; recovered: the
  share of them above 0.9.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SIZES = {"speed": (768, 6144, 32), "quality": (128, 1024, 16)}  # d_in, d_dict (and number of true directions), k
N_TRAIN, N_HELD_OUT = 204_800, 4_096


def make_rows(path: Path, d_in: int, n_true: int, k: int) -> None:
    """Rows with known directions, written once."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(n_true, d_in, generator=generator), dim=1)
    offset = torch.nn.functional.normalize(torch.randn(d_in, generator=generator), dim=0)
    chunks = []
    for start in range(0, N_TRAIN + N_HELD_OUT, 4096):
        n = min(4096, N_TRAIN + N_HELD_OUT - start)
        active = torch.rand(n, n_true, generator=generator) < k / n_true
        chunks.append(((0.5 + torch.rand(n, n_true, generator=generator)) * active) @ directions + offset)
    x = torch.cat(chunks)
    path.mkdir()
    x[:N_TRAIN].numpy().tofile(path / "rows.bin")
    save_file({"x": x[N_TRAIN:].contiguous(), "directions": directions}, path / "held_out.safetensors")


class Clock:
    """Hands out batches, and notes the time whenever one is asked for: a step lasts from one request to the next."""

    fingerprint = "benchmark"

    def __init__(self, x: torch.Tensor, batch_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x, self.batch_size = x, batch_size
        self.order = torch.randperm(len(x) // batch_size, generator=generator).tolist()
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def stamp(self) -> None:
        """Note the time."""
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())

    def __iter__(self) -> Clock:
        return self

    def __next__(self) -> torch.Tensor:
        start = self.order[len(self.cpu) % len(self.order)] * self.batch_size
        self.stamp()
        return self.x[start : start + self.batch_size]

    def sample(self) -> dict[str, torch.Tensor]:
        """For circuitbench: the rows of its mean and scale."""
        return {"x": self.x[:16_384]}

    def from_step(self, step: int):
        """For circuitbench."""
        assert step == 0
        for x in self:
            yield {"x": x}


def train_ours(clock: Clock, given: argparse.Namespace, d_in: int, d_dict: int, k: int):
    from circuitbench import dictionaries

    result = dictionaries.train(
        clock, kind=given.kind, d_dict=d_dict, k=k, steps=given.steps, batch_size=given.batch, lr=given.lr,
        seed=1000 + given.seed, progress=False, **json.loads(given.settings),
    )  # fmt: skip
    return result.dictionary, result.dictionary.W_dec


def train_saelens(clock: Clock, given: argparse.Namespace, d_in: int, d_dict: int, k: int):
    os.environ["WANDB_MODE"] = "disabled"
    from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_dict, k=k))
    sae.b_dec.data[:] = clock.x[:4096].mean(0)
    lr = given.lr or 1e-3
    settings = SAETrainerConfig(
        total_training_samples=given.batch * given.steps, train_batch_size_samples=given.batch, lr=lr, lr_end=lr / 10,
        lr_decay_steps=given.steps - 1, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    SAETrainer(cfg=settings, sae=sae, data_provider=clock).fit()
    return sae.eval(), sae.W_dec


def train_sparsify(clock: Clock, given: argparse.Namespace, d_in: int, d_dict: int, k: int):
    """sparsify trains on models only: this one's single layer looks its rows up."""
    import transformers
    from datasets import Dataset
    from sparsify import SaeConfig, TrainConfig, Trainer
    from torch import nn

    class Config(transformers.PretrainedConfig):
        model_type = "rows"

    class Rows(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            clock.stamp()
            return clock.x[ids.flatten()].view(*ids.shape, d_in)

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.layers = nn.ModuleList([Rows()])
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
            return self.layers[0](input_ids)

        @property
        def dummy_inputs(self) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    config = Config()
    config.num_hidden_layers = 1
    context = 16
    batches = torch.arange(len(clock.x)).view(-1, clock.batch_size)[clock.order]
    ids = batches.flatten().repeat(given.steps * given.batch // batches.numel() + 1)[: given.steps * given.batch]
    text = Dataset.from_dict({"input_ids": ids.view(-1, context).tolist()}).with_format("torch")
    settings = TrainConfig(
        SaeConfig(expansion_factor=d_dict // d_in, k=k), batch_size=given.batch // context, optimizer="adam",
        lr=given.lr or 1e-3, lr_warmup_steps=0, hookpoints=["layers.0"], log_to_wandb=False, save_every=10**9,
        save_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer = Trainer(settings, text, Model(config))
    clock.cpu.clear()
    clock.wall.clear()
    trainer.fit()
    sae = trainer.saes["layers.0"]
    return (lambda x: sae.decode(*sae.encode(x)[:2])), sae.W_dec


TRAINERS = {"circuitbench": train_ours, "saelens": train_saelens, "sparsify": train_sparsify}


def run(given: argparse.Namespace) -> None:
    """One project, one run; a line of JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(1000 + given.seed)  # a small seed would draw the true directions themselves
    d_in, d_dict, k = SIZES[given.preset]
    # The floor first: one dense product of this size, and sparse products that cost what their non-zeros cost.
    a, b = torch.randn(given.batch, d_in), torch.randn(d_in, d_dict)
    times = []
    for _ in range(5):
        start = time.process_time()
        a @ b
        times.append(time.process_time() - start)
    floor = statistics.median(times) * (1 + 4 * k / d_dict)
    x = torch.empty(N_TRAIN, d_in)
    with open(Path(given.rows) / "rows.bin", "rb") as file:  # into its place: a copy would count as peak memory
        file.readinto(memoryview(x.numpy()).cast("B"))
    held_out, directions = (load_file(Path(given.rows) / "held_out.safetensors")[name] for name in ("x", "directions"))
    clock = Clock(x, given.batch, given.seed)
    before = peak_mb()
    reconstruct, rows = TRAINERS[given.project](clock, given, d_in, d_dict, k)
    clock.stamp()
    peak = peak_mb()
    with torch.no_grad():
        error = torch.cat([reconstruct(chunk) for chunk in held_out.split(1024)]) - held_out
        unit = torch.nn.functional.normalize(rows.detach().float(), dim=1)
        cosines = torch.cat([(some @ unit.T).amax(1) for some in directions.split(1024)])
    cpu, wall = (
        statistics.median(end - start for start, end in itertools.pairwise(times[3:]))
        for times in (clock.cpu, clock.wall)
    )
    found = {
        "project": given.project if not given.label else given.label,
        "lr": given.lr, "seed": given.seed, "steps": given.steps,
        "tokens_per_cpu_s": given.batch / cpu, "roofline": floor / cpu,
        "tokens_per_s": given.batch / wall,
        "cpu_s": clock.cpu[-1] - clock.cpu[0],
        "peak_mb": peak, "peak_above_rows_mb": peak - before,
        "fvu": float(error.pow(2).sum() / (held_out - held_out.mean(0)).pow(2).sum()),
        "mmcs": float(cosines.mean()), "recovered": float((cosines > 0.9).float().mean()),
    }  # fmt: skip
    print("RESULT " + json.dumps(found), flush=True)


def peak_mb() -> float:
    """Largest resident memory of this process so far; getrusage would count the parent's before it as well."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def drive(given: argparse.Namespace) -> None:
    """All projects, interleaved; then a table of medians."""
    d_in, d_dict, k = SIZES[given.preset]
    rows = Path(tempfile.gettempdir()) / f"dictionary-benchmark-{given.preset}"
    if not rows.exists():
        make_rows(rows, d_in, d_dict, k)
    here = os.path.abspath(__file__)
    pythons = {"circuitbench": sys.executable, "saelens": given.saelens, "sparsify": given.sparsify}
    projects = [name for name in given.projects if pythons[name]]
    results: list[dict] = []
    for round_number in range(given.reps):
        for seed in given.seeds:
            for lr in given.lrs or [None]:
                for project in projects:
                    command = [pythons[project], here, "run", "--project", project, "--preset", given.preset]
                    command += ["--rows", str(rows), "--batch", str(given.batch), "--steps", str(given.steps)]
                    command += ["--seed", str(seed), *(["--lr", str(lr)] if lr else []), "--settings", given.settings]
                    command += ["--kind", given.kind]
                    quiet = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
                    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet})
                    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                    if not lines:
                        sys.exit(f"{project} failed (round {round_number}):\n{done.stderr[-3000:]}")
                    results.append(json.loads(lines[-1][7:]))
                    print(lines[-1][7:], flush=True)
    show(results, "saelens" if "saelens" in projects else projects[0])
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


def show(results: list[dict], base: str) -> None:
    """Medians (and their spread) by project and learning rate."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["project"], result["lr"]), []).append(result)
    median = {key: {n: statistics.median(r[n] for r in runs) for n in runs[0] if isinstance(runs[0][n], float)}
              for key, runs in groups.items()}  # fmt: skip
    print(f"\n{'':28}{'tokens/CPU-s':>14}{'×':>6}{'roofline':>10}{'CPU-s':>8}{'peak MB':>9}{'+MB':>7}"
          f"{'FVU':>16}{'MMCS':>16}{'recovered':>11}")  # fmt: skip
    for (project, lr), m in sorted(median.items(), key=lambda item: item[1]["tokens_per_cpu_s"]):
        runs = groups[project, lr]
        base_speed = statistics.median(r["tokens_per_cpu_s"] for r in results if r["project"] == base)

        def spread(name: str, runs: list[dict] = runs, m: dict = m) -> str:
            values = [r[name] for r in runs]
            return f"{m[name]:.3f} ± {(max(values) - min(values)) / 2:.3f}"

        name = project + (f" lr {lr:g}" if lr else "")
        print(f"{name:28}{m['tokens_per_cpu_s']:14.0f}{m['tokens_per_cpu_s'] / base_speed:6.2f}{m['roofline']:10.0%}"
              f"{m['cpu_s']:8.1f}{m['peak_mb']:9.0f}{m['peak_above_rows_mb']:7.0f}{spread('fvu'):>16}{spread('mmcs'):>16}"
              f"{m['recovered']:11.3f}")  # fmt: skip


def main() -> None:
    """``speed``, ``quality``, or ``run`` (one process of either)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "quality", "run"])
    parser.add_argument("--project", choices=list(TRAINERS))
    parser.add_argument("--projects", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--preset", choices=list(SIZES))
    parser.add_argument("--saelens", metavar="PYTHON", default=os.environ.get("SAELENS_PYTHON"))
    parser.add_argument("--sparsify", metavar="PYTHON", default=os.environ.get("SPARSIFY_PYTHON"))
    parser.add_argument("--rows")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--reps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--lrs", type=float, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kind", default="topk", help="ours")
    parser.add_argument("--settings", default="{}", help="more arguments for circuitbench's train, as JSON")
    parser.add_argument("--label", default="")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.preset = given.preset or given.what
    speed = given.preset == "speed"
    given.batch = given.batch or (2048 if speed else 1024)
    given.steps = given.steps or (13 if speed else 800)
    given.reps = given.reps or (3 if speed and given.what == "speed" else 1)
    if given.what == "run":
        run(given)
    else:
        drive(given)


if __name__ == "__main__":
    main()
