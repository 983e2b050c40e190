"""The command line: ``circuitbench info | sites | check | capture | store | demo``.

What was asked for goes to standard output, as text or with ``--json``; bars and errors go to standard error. The exit
code is 1 if a check failed, and 2 if it could not be done as asked.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers

from . import __version__
from .activations import FORMATS, ActivationStream, StoredActivations, store
from .activations.shards import RECORD
from .dictionaries import load_dictionary
from .dictionaries.formats.saelens import CONFIG
from .errors import BadInput, CircuitbenchError
from .models import Model, kernels, load_model
from .tracing import capture, check, resolve
from .tracing.addresses import shapes_by_address
from .tracing.checks.report import where_layers

MODEL = 'a Hub id, a folder, "zoo:<name>" (shipped), or "random:<model_type>" (tiny random weights)'


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows ``circuitbench``; default: this process's own.

    Returns:
        The exit code.
    """
    given = parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return given.run(given)
    except CircuitbenchError as error:
        print(f"circuitbench: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    top = argparse.ArgumentParser(
        prog="circuitbench", description="Mechanistic interpretability of state-space, recurrent and hybrid models."
    )
    top.add_argument("--version", action="version", version=f"circuitbench {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    info = command(commands, "info", run_info, "what a model is, or what a folder of ours holds")
    sites = command(commands, "sites", run_sites, "every tensor that can be read, by address and shape")
    checks = command(commands, "check", run_check, "verify on the live model that every site is what it is said to be")
    captures = command(commands, "capture", run_capture, "write a model's activations to safetensors files")
    stores = command(commands, "store", run_store, "write the activations of a text to shards, and go on after a kill")
    demo = command(commands, "demo", run_demo, "the whole way on real text, into one HTML report")

    info.add_argument("model", metavar="MODEL", help=f"{MODEL}; or a folder of activations, or of a dictionary")
    for one in (sites, captures, stores):
        one.add_argument("model", metavar="MODEL", help=MODEL)
    checks.add_argument("models", metavar="MODEL", nargs="+", help=MODEL)
    for one in (info, sites, checks, captures, stores):
        one.add_argument("--device", help="where to put the weights (default: cpu)")
        one.add_argument("--dtype", help="floating-point type of the weights (default: float32)")
    for one in (checks, captures, stores):
        one.add_argument("--remote", nargs="?", const=True, default=False, metavar="ADDRESS", help="run on a server")
    checks.add_argument("--sites", nargs="+", metavar="SITE", help='only these, as "layers.*.ssm.y" (default: all)')
    checks.add_argument("--every-layer", action="store_true", help="edit in every layer, not in one of those alike")
    captures.add_argument("--prompt", action="append", default=[], help="a prompt (repeat for more)")
    captures.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt on each line")
    captures.add_argument("--sites", nargs="+", metavar="SITE", required=True, help='as "layers.*.ssm.gated"')
    captures.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty or new folder")
    captures.add_argument("--positions", metavar="N", help='tokens to keep: "last", or indices as "0,1,-1"')
    captures.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts at once (default: 32)")
    stores.add_argument("--text", nargs="+", type=Path, metavar="FILE", required=True, help="text files")
    stores.add_argument("--sites", nargs="+", metavar="SITE", required=True, help='as "layers.*.ssm.gated"')
    stores.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one to go on in")
    stores.add_argument("--format", default="float32", choices=FORMATS, help="of the stored numbers (default: float32)")
    stores.add_argument("--part", default="0/1", metavar="P/N", help="write part P of N, counted from 0 (default: 0/1)")
    stores.add_argument("--context", type=int, default=256, metavar="N", help="tokens of a sequence (default: 256)")
    stores.add_argument("--compress", action="store_true", help="pack the shards with zstd")
    demo.add_argument("--fast", action="store_true", help="less text and fewer steps")
    demo.add_argument("--model", default="zoo:pylm-hybrid", help=f"{MODEL} (default: zoo:pylm-hybrid)")
    demo.add_argument("--text", help="a text file to work on (default: text that ships with Python)")
    demo.add_argument("--out", type=Path, default=Path("circuitbench-demo"), metavar="DIR", help="where to write")
    return top


def command(commands: Any, name: str, run: Any, what: str) -> argparse.ArgumentParser:
    """One command's parser."""
    made = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    made.add_argument("--json", action="store_true", help="write JSON")
    made.set_defaults(run=run)
    return made


def run_info(given: argparse.Namespace) -> int:
    """``circuitbench info MODEL``, or a folder of activations, or of a dictionary"""
    folder = Path(given.model)
    if (folder / RECORD).is_file():
        stored = StoredActivations(folder)
        return put(given, stored.to_dict(), repr(stored))
    if (folder / CONFIG).is_file():
        return info_of_dictionary(given, folder)
    model = load_model(given.model, device=given.device, dtype=given.dtype)
    hf = model.hf
    found = {
        "model": given.model,
        "class": type(hf).__name__,
        "architecture": model.architecture,
        "parameters": sum(parameter.numel() for parameter in hf.parameters()),
        "dtype": str(hf.dtype).removeprefix("torch."),
        "device": str(model.device),
        "d_model": hf.config.get_text_config().hidden_size,
        "vocabulary": hf.config.get_text_config().vocab_size,
        "layers": [layer.kind for layer in model.layers],
        "scans": scans(model),
        "versions": {name: version(name) for name in ("torch", "transformers", "nnsight")},
    }
    layers: dict[str, list[int]] = {}
    for layer in model.layers:
        layers.setdefault(layer.kind, []).append(layer.index)
    lines = [
        f"{given.model}: {found['class']} ({found['architecture']})",
        f"  parameters  {found['parameters']:,} in {found['dtype']} on {found['device']}",
        f"  layers      {len(found['layers'])}",
        *(f"    {kind:<10}{where_layers(indices)}" for kind, indices in layers.items()),
        f"  d_model     {found['d_model']}",
        f"  vocabulary  {found['vocabulary']}",
        *(f"  scan        {name}: {code}" for name, code in found["scans"].items()),
        f"  versions    {', '.join(f'{name} {number}' for name, number in found['versions'].items())}",
    ]
    return put(given, found, "\n".join(lines))


def info_of_dictionary(given: argparse.Namespace, folder: Path) -> int:
    """What a dictionary in a folder is."""
    dictionary = load_dictionary(folder)
    found = {
        "kind": dictionary.kind,
        "model": dictionary.model_name,
        "site": dictionary.site or list(dictionary.blocks),
        "site_out": dictionary.site_out,
        "d_in": dictionary.d_in,
        "d_out": dictionary.d_out,
        "d_dict": dictionary.d_dict,
        **dictionary.settings,
    }
    said = {name: ", ".join(value) if isinstance(value, list) else value for name, value in found.items()}
    lines = [f"{folder}: a dictionary", *(f"  {name:<10}{'unknown' if v is None else v}" for name, v in said.items())]
    return put(given, found, "\n".join(lines))


def scans(model: Model) -> dict[str, str]:
    """Whose code runs each of the family's scans."""
    module = kernels.modeling_module(model.hf)
    found = {}
    for name in kernels.KERNEL_FUNCTIONS:
        function = getattr(module, name, None)
        if function is not None:
            package = kernels.kernel_package(function)
            found[name] = "circuitbench" if hasattr(function, kernels.MARK) else package or "transformers (torch)"
    return found


def run_sites(given: argparse.Namespace) -> int:
    """``circuitbench sites MODEL``"""
    model = load_model(given.model, device=given.device, dtype=given.dtype)
    return put(given, {"model": given.model, "sites": shapes_by_address(model)}, repr(model))


def run_check(given: argparse.Namespace) -> int:
    """``circuitbench check MODEL``"""
    reports = [
        check(
            name,
            sites=given.sites,
            every_layer=given.every_layer,
            remote=given.remote,
            device=given.device,
            dtype=given.dtype,
            progress=sys.stderr.isatty(),
        )
        for name in given.models
    ]
    found = [report.to_dict() for report in reports]
    put(given, found if len(found) > 1 else found[0], "\n\n".join(map(str, reports)))
    return 0 if all(report.ok for report in reports) else 1


def run_capture(given: argparse.Namespace) -> int:
    """``circuitbench capture MODEL --prompt … --sites … --out DIR``"""
    prompts = list(given.prompt)
    if given.prompts is not None:
        try:
            prompts += [line for line in given.prompts.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--prompts {given.prompts} cannot be read as text ({error}).") from None
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise BadInput(f"--out {given.out} is not empty; name a new folder, so that no older files mix with these.")
    model = load_model(given.model, device=given.device, dtype=given.dtype, remote=given.remote not in (False, "local"))
    captured = capture(
        model,
        prompts,
        given.sites,
        positions=positions(given.positions),
        batch_size=given.batch_size,
        out=given.out,
        remote=given.remote,
        progress=sys.stderr.isatty(),
    )
    files = sorted(given.out.iterdir())
    found = {
        "model": given.model,
        "sites": resolve(model, given.sites),
        "lengths": captured.lengths.tolist(),
        "files": [str(file) for file in files],
    }
    text = f"{len(prompts)} prompts, {len(found['sites'])} sites: {len(files)} files in {given.out}"
    return put(given, found, text)


def run_store(given: argparse.Namespace) -> int:
    """``circuitbench store MODEL --text … --sites … --out DIR``"""
    model = load_model(given.model, device=given.device, dtype=given.dtype, remote=given.remote not in (False, "local"))
    stream = ActivationStream(
        model,
        given.sites,
        given.text,
        context=given.context,
        remote=given.remote,
        progress=sys.stderr.isatty(),
    )
    stored = store(stream, given.out, dtype=given.format, part=part(given.part), compress=given.compress)
    return put(given, stored.to_dict(), repr(stored))


def part(given: str) -> tuple[int, int]:
    """``--part`` as `store` takes it."""
    match = re.fullmatch(r"(\d+)/(\d+)", given)
    if match is None:
        raise BadInput(f'--part {given!r} is not like "0/4", the first of four parts.')
    return int(match[1]), int(match[2])


def positions(given: str | None) -> str | list[int] | None:
    """``--positions`` as `capture` takes it."""
    if given in (None, "last"):
        return given
    try:
        return [int(word) for word in given.split(",")]
    except ValueError:
        raise BadInput(f'--positions {given!r} is neither "last" nor indices like "0,1,-1".') from None


def run_demo(given: argparse.Namespace) -> int:
    """``circuitbench demo``"""
    from .demo import run_demo as demo

    page = demo(fast=given.fast, model=given.model, text=given.text, out=given.out, progress=sys.stderr.isatty())
    return put(given, {"report": str(page)}, f"The report: {page}")


def put(given: argparse.Namespace, found: Any, text: str) -> int:
    """Write the outcome, as asked for."""
    print(json.dumps(found, indent=2) if given.json else text)
    return 0
