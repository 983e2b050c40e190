"""Makes the models of the zoo from nothing but the Python it runs in, and measures the scores stated for them.

    python scripts/train_zoo.py pylm-hybrid             # train (or go on), and put the result into the package
    python scripts/train_zoo.py mqar-mamba2 mqar-bamba  # several
    python scripts/train_zoo.py pylm-hybrid --out DIR   # put the result elsewhere

Language models leave a checkpoint in WORK/NAME/state.pt every 100 steps; the same line goes on from it and ends in
the same weights as a run that was never stopped (on one machine, with one number of threads). WORK/NAME/snapshot is
that checkpoint as a model to load.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import pathlib
import platform
import time

import torch
import torch.nn.functional as F
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging
from zoo_recipes import RECIPES, CompiledRecipe, LanguageRecipe, TaskRecipe

from circuitbench.models.zoo import compiled, corpus, scores, tasks

WEIGHTS = pathlib.Path(__file__).resolve().parents[1] / "circuitbench" / "models" / "zoo" / "weights"
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 256


def train_language_model(name: str, recipe: LanguageRecipe, work: pathlib.Path, out: pathlib.Path, device: str) -> None:
    """Trains, checkpoints, scores and saves one language model."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    train_documents, held_out_documents = corpus.split()
    train_texts, held_out = [d.text for d in train_documents], [d.text for d in held_out_documents]
    tokenizer = language_tokenizer(work / f"tokenizer-{recipe.vocabulary}", train_texts, recipe.vocabulary)
    ids = scores.join(tokenizer, train_texts)
    glance = held_out[::8]  # a fixed part of the held-out documents, for a look while training

    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(recipe.config(), dtype=torch.float32)
    initialise(model)
    model.to(device)
    optimizers = make_optimizers(model, recipe)
    step, seconds, cpu_seconds = resume(folder / "state.pt", model, optimizers, recipe)
    report(name, parameters=count(model), train_tokens=len(ids), steps=recipe.steps, starting_at=step)

    model.train()
    wall, cpu, recent = time.perf_counter(), time.process_time(), []
    while step < recipe.steps:
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = recipe.lr * schedule(step, recipe)
        loss = train_step(model, optimizers, batch_at(ids, step, recipe).to(device), recipe.micro_batch)
        recent = [*recent[-49:], loss]
        step += 1
        if step % 100 == 0 or step == recipe.steps:
            seconds, cpu_seconds = seconds + time.perf_counter() - wall, cpu_seconds + time.process_time() - cpu
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
            state |= {"seconds": seconds, "cpu_seconds": cpu_seconds, "recipe": dataclasses.asdict(recipe)}
            torch.save(state, folder / "state.tmp")
            os.replace(folder / "state.tmp", folder / "state.pt")
            model.eval()
            look = scores.bits_per_byte(model, tokenizer, glance)
            save(model, tokenizer, folder / "snapshot", {"name": name, "step": step, "steps": recipe.steps})
            model.train()
            mean = round(sum(recent) / len(recent), 4)
            look = round(look, 4)
            report(name, step=step, nats_per_token=mean, glance_bits_per_byte=look, seconds=round(seconds))
            wall, cpu = time.perf_counter(), time.process_time()

    shipped = rounded(model)
    text_tokens = ids[ids != tokenizer.eos_token_id]
    uniform = torch.arange(1, recipe.vocabulary)
    measured = {
        "held_out_bits_per_byte": scores.bits_per_byte(shipped, tokenizer, held_out),
        "induction_tokens_of_the_text": scores.induction_score(shipped, text_tokens)._asdict(),
        "induction_tokens_uniform": scores.induction_score(shipped, uniform)._asdict(),
    }
    record = {
        "data": {
            "text": "Python standard library: sources, help() topics, docstrings of C modules (models/zoo/corpus.py)",
            "python": platform.python_version(),
            "train_documents": len(train_texts),
            "train_bytes": sum(len(text.encode()) for text in train_texts),
            "train_tokens": len(ids),
            "held_out_documents": len(held_out),
            "held_out_bytes": sum(len(text.encode()) for text in held_out),
            "seen_tokens": recipe.steps * recipe.batch * CONTEXT,
            "context": CONTEXT,
        },
        "licence": "weights: MIT, as circuitbench; the text they were trained on: PSF-2.0",
    }
    finish(name, recipe, shipped, tokenizer, out, record, measured, seconds, cpu_seconds)


def train_task_model(name: str, recipe: TaskRecipe, out: pathlib.Path, device: str) -> None:
    """Trains, scores and saves one model of a synthetic task."""
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(recipe.config(), dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    samples = torch.Generator().manual_seed(recipe.seed + 1)
    glance = recipe.sample(256, 10**6)
    wall, cpu = time.perf_counter(), time.process_time()
    model.train()
    for step in range(recipe.steps):
        scale = min(1, (step + 1) / recipe.warmup, (1 - step / recipe.steps) / recipe.decay)
        optimizer.param_groups[0]["lr"] = recipe.lr * scale
        ids, labels = recipe.sample(recipe.batch, samples)
        logits = model(input_ids=ids.to(device), use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.to(device).flatten(), ignore_index=scores.IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            model.eval()
            report(name, step=step + 1, loss=round(loss.item(), 4), accuracy=round(scores.accuracy(model, *glance), 4))
            model.train()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    shipped = rounded(model)
    measured = {"accuracy_on_2048_fresh_prompts": scores.accuracy(shipped, *recipe.sample(2048, 10**6 + 1))}
    record = {
        "data": {"task": f"circuitbench.models.zoo.tasks.{recipe.task}", "seen_prompts": recipe.steps * recipe.batch},
        "licence": "weights: MIT, as circuitbench; trained on generated prompts alone",
    }
    finish(name, recipe, shipped, recipe.tokenizer(), out, record, measured, seconds, cpu_seconds)


def compile_model(name: str, recipe: CompiledRecipe, out: pathlib.Path) -> None:
    """Builds, scores and saves one model whose weights are set by code."""
    wall, cpu = time.perf_counter(), time.process_time()
    model, truth = compiled.mqar(**dataclasses.asdict(recipe))
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    prompts = tasks.mqar(2048, 10**6 + 1, keys=recipe.keys, values=recipe.values)
    record = {
        "data": {"task": "circuitbench.models.zoo.tasks.mqar", "seen_prompts": 0},
        "licence": "weights: MIT, as circuitbench; nothing was trained",
        "truth": dataclasses.asdict(truth),
    }
    measured = {"accuracy_on_2048_fresh_prompts": scores.accuracy(model, *prompts)}
    tokenizer = tasks.mqar_tokenizer(recipe.keys, recipe.values)
    finish(name, recipe, model, tokenizer, out, record, measured, seconds, cpu_seconds)


def language_tokenizer(folder: pathlib.Path, texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Returns the byte-level BPE of these texts, trained on the first call; id 0 ends a text, begins one, and pads."""
    if not (folder / "tokenizer.json").exists():
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts, vocabulary, min_frequency=2, special_tokens=[END_OF_TEXT], show_progress=False)
        PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            padding_side="left",
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def initialise(model: torch.nn.Module) -> None:
    """Spreads the heads' time constants over 10 to 1,000 tokens, and starts the residual stream quiet."""
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):  # Bamba's own start, softplus(1), forgets within a token
            dt = torch.exp(torch.linspace(math.log(1e-1), math.log(1e-3), parameter.numel()))
            parameter.data.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            parameter.data.div_(math.sqrt(2 * model.config.num_hidden_layers))


def make_optimizers(model: torch.nn.Module, recipe: LanguageRecipe) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, recipe: LanguageRecipe) -> float:
    """Warm up, hold, then fall linearly to 2 % over the last `decay` of the steps."""
    return min(1.0, (step + 1) / recipe.warmup, max(0.02, (recipe.steps - step) / (recipe.decay * recipe.steps)))


def batch_at(ids: torch.Tensor, step: int, recipe: LanguageRecipe) -> torch.Tensor:
    """Returns the batch of a step, a function of seed and step alone; offset and order of windows change by epoch."""
    windows = (len(ids) - 1 - CONTEXT) // CONTEXT
    epoch, i = divmod(step, windows // recipe.batch)
    generator = torch.Generator().manual_seed(1000 * recipe.seed + epoch)
    offset = torch.randint(CONTEXT, (1,), generator=generator)
    order = torch.randperm(windows, generator=generator)[i * recipe.batch : (i + 1) * recipe.batch]
    return ids[(offset + CONTEXT * order)[:, None] + torch.arange(CONTEXT + 1)]


def train_step(model: torch.nn.Module, optimizers: list, batch: torch.Tensor, micro_batch: int) -> float:
    """Takes one step in bfloat16 autocast and returns the loss in nats a token."""
    total = 0.0
    parts = batch.split(micro_batch)
    for part in parts:
        with torch.autocast(batch.device.type, torch.bfloat16):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()) / len(parts)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total


def resume(
    path: pathlib.Path, model: torch.nn.Module, optimizers: list, recipe: LanguageRecipe
) -> tuple[int, float, float]:
    """Loads a checkpoint if there is one; returns steps, seconds and CPU seconds spent so far."""
    if not path.exists():
        return 0, 0.0, 0.0
    state = torch.load(path, weights_only=True)
    before = state["recipe"] | {"steps": recipe.steps, "attention_layers": tuple(state["recipe"]["attention_layers"])}
    if before != dataclasses.asdict(recipe):
        raise SystemExit(f"{path} was made by another recipe ({before}); remove it or give another --work.")
    falling = min(recipe.steps, state["recipe"]["steps"]) * (1 - recipe.decay)
    if recipe.steps != state["recipe"]["steps"] and state["step"] > falling:
        raise SystemExit(
            f"{path} stands at step {state['step']}, where the learning rate already falls: leave --steps as it was."
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"], state["cpu_seconds"]


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model as it is once saved in float16 and loaded in float32: scores are those of what ships."""
    return model.half().float().eval()


def save(model, tokenizer, folder: pathlib.Path, record: dict) -> None:
    """Saves float16 weights, tokenizer and record as a folder that transformers loads; leaves the model as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokens = folder / "tokenizer.json"
    compact = json.dumps(json.loads(tokens.read_text("utf-8")), ensure_ascii=False, separators=(",", ":"))
    tokens.write_text(compact, "utf-8")  # saved indented, it is mostly spaces
    (folder / "zoo.json").write_text(json.dumps(record, indent=2) + "\n")


def finish(
    name, recipe, model, tokenizer, out: pathlib.Path, record: dict, measured: dict, seconds: float, cpu_seconds: float
) -> None:
    record = {
        "name": name,
        **record,
        "recipe": dataclasses.asdict(recipe),
        "parameters": count(model),
        "scores": {key: round_all(value) for key, value in measured.items()},
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "hardware": f"{torch.get_num_threads()} thread(s), {model.device.type}",
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": f"python scripts/train_zoo.py {name}",
    }
    save(model, tokenizer, out / name, record)
    report(name, saved=str(out / name), **record["scores"])


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def round_all(value: float | dict) -> float | dict:
    return {k: round_all(v) for k, v in value.items()} if isinstance(value, dict) else round(value, 4)


def report(name: str, **facts: object) -> None:
    print(json.dumps({"model": name, **facts}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="+", choices=sorted(RECIPES), metavar="NAME", help=f"any of: {', '.join(sorted(RECIPES))}"
    )
    parser.add_argument("--steps", type=int, help="train for another number of steps; the learning rate follows")
    parser.add_argument(
        "--work", type=pathlib.Path, default=pathlib.Path("zoo-training"), help="checkpoints and tokenizer"
    )
    parser.add_argument("--out", type=pathlib.Path, default=WEIGHTS, help="folder for the finished models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # says at every start that no CUDA kernels are installed
    for name in arguments.names:
        recipe = RECIPES[name]
        if arguments.steps and not isinstance(recipe, CompiledRecipe):
            recipe = dataclasses.replace(recipe, steps=arguments.steps)
        if isinstance(recipe, CompiledRecipe):
            compile_model(name, recipe, arguments.out)
        elif isinstance(recipe, LanguageRecipe):
            train_language_model(name, recipe, arguments.work, arguments.out, arguments.device)
        else:
            train_task_model(name, recipe, arguments.out, arguments.device)


if __name__ == "__main__":
    main()
