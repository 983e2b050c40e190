"""`check`: is a map right about the model it names? Verified on the live model, with advice where it is not."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..architectures import architecture_of
from ..models import Model, kernels
from ..models.load import bind, nnsight_model, prepared
from .addresses import resolve, shapes_by_address
from .checks.live import Failure, Live, guarded, relative
from .checks.maps import missing
from .checks.relations import check_gates, check_heads, check_residuals
from .checks.report import CheckReport, Row
from .checks.scans import check_scans, check_states
from .checks.sites import check_edits, check_identities, check_reading

LEFT_OUT = 2  # tokens
SMALL = 30_000_000  # parameters; at a dozen tokens, one thread is then as fast as several


def check(
    model: Model | PreTrainedModel | str | os.PathLike[str],
    *,
    sites: str | Sequence[str] | None = None,
    every_layer: bool = False,
    remote: bool | str = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = False,
) -> CheckReport:
    """Verify a model's map on the live model, with two prompts of different length.

    Every site reads, in the map's order and with the shape it says; its own value written back, assigned or in place,
    changes not a bit; another value moves the logits of its own prompt from there on, in place as by assignment. Every
    scan is the recurrence it is said to be: replayed, as a matrix, frozen; a changed state goes on as a changed cache
    does. Branches add up to the residual stream, heads are their own, and installed kernels fit the device.

    Args:
        model: A model, or whatever `load_model` takes. A name is loaded even where its map is broken, to say where.
        sites: Check these addresses only (as for `capture`); default all.
        every_layer: Edit sites in every layer, instead of the first of those that are alike.
        remote: ``True``, ``"local"`` or a server's address: where the traces run. What needs the weights at hand is
            left out where they are not, and the report says so.
        device, dtype: As for `load_model`, for a model that is loaded here.
        progress: Show a bar.

    Returns:
        The report: `.ok`, `.rows`, a table when printed, `.raise_if_failed()`.

    Raises:
        SiteNotFound: For an address in `sites` that is not there.
        BadInput, UnsupportedModel, VersionMismatch: As `load_model`.
        RemoteError: If the server fails.
    """
    start = time.perf_counter()
    if isinstance(model, Model):
        nn, name = model.nn, model.hf.name_or_path
    elif isinstance(model, PreTrainedModel):
        nn, name = nnsight_model(*prepared(model, device=device, dtype=dtype)), model.name_or_path
    else:
        meta = remote not in (False, "local")
        nn, name = nnsight_model(*prepared(model, device=device, dtype=dtype, remote=meta)), os.fspath(model)
    hf: PreTrainedModel = nn._module
    report = CheckReport(name or type(hf).__name__)
    with fitting_kernels(hf, report), few_threads(hf):
        rows, architecture = missing(nn, architecture_of(hf.config))
        report.rows += rows
        if architecture is None:
            return finished(report, None, hf, start)
        if not isinstance(model, Model) or any(row.ok is False for row in rows):
            model = bind(nn, architecture)
        addresses = resolve(model, sites) if sites is not None else model.sites
        live = guarded(Live, model, addresses, remote, every_layer)
        if isinstance(live, Failure):
            report.rows.append(Row("model", "runs", False, advice=f"{live.why}. Nothing is known about its sites."))
            return finished(report, None, hf, start)
        steps = [
            check_reading,
            Live.measure_noise,  # what follows is compared with it
            check_forward,
            check_padding,
            check_identities,
            check_edits,
            check_scans,
            check_states,
            check_residuals,
            check_heads,
            check_gates,
        ]
        bar = tqdm(steps, desc="check", unit="step", disable=not progress)
        for step in bar:
            bar.set_postfix_str(step.__name__.removeprefix("check_").replace("_", " "))
            step(live)
        report.rows += live.rows
    return finished(report, live, hf, start)


def finished(report: CheckReport, live: Live | None, hf: PreTrainedModel, start: float) -> CheckReport:
    """The report with what it is about."""
    parameter = next(hf.parameters())
    report.facts = {
        "architecture": hf.config.model_type,
        "class": type(hf).__name__,
        "parameters": sum(p.numel() for p in hf.parameters()),
        "layers": len(live.model.layers) if live else 0,
        "kinds": [layer.kind for layer in live.model.layers] if live else [],
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "versions": {package: version(package) for package in ("torch", "transformers", "nnsight")},
        "lengths": list(live.lengths) if live else [],
        "noise": live.noise if live else 0.0,
        "seconds": time.perf_counter() - start,
    }
    if live:
        report.groups = live.groups
        report.shapes = shapes_by_address(live.model)
    return report


@contextlib.contextmanager
def fitting_kernels(hf: PreTrainedModel, report: CheckReport) -> Iterator[None]:
    """Note kernels that cannot run where the model is, and check the rest on transformers' torch code."""
    wrong = kernels.mismatched(hf)
    module = kernels.modeling_module(hf)
    installed = {name: getattr(module, name) for name in wrong}
    advice = (
        f"{', '.join(sorted(set(wrong.values())))} is installed, so transformers runs {', '.join(wrong)} with CUDA "
        f"code on {next(hf.parameters()).device}: call circuitbench.models.kernels.use_torch_kernels(hf_model) before "
        "load_model(hf_model), or move the model to a GPU, or uninstall the package. (The rest of this table ran on "
        "transformers' torch code.)"
    )
    report.rows.append(Row("model", "installed kernels fit the device", not wrong, advice=advice if wrong else ""))
    if wrong:
        kernels.use_torch_kernels(hf)
    kernels.use_fast_s6(hf)
    try:
        yield
    finally:
        for name, function in installed.items():
            setattr(module, name, function)


@contextlib.contextmanager
def few_threads(hf: PreTrainedModel) -> Iterator[None]:
    """One thread for a small model: on a busy machine, threads that wait for each other take ten times as long."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in hf.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_forward(live: Live) -> None:
    """The logits are those of the model called without any of this."""
    if live.weights_here:
        measured = live.distance(live.base, live.own_logits(live.inputs))
        advice = "The traced logits are not the model's own: correct the map's logits."
        live.note("logits", "the model's own", measured, live.tolerance if live.remote else 0.0, advice)


def check_padding(live: Live) -> None:
    """The shorter prompt's logits are those it has alone; or padding does leak into them, where it is refused."""
    long, short = live.lengths
    if long == short and live.weights_here:
        ids, mask = live.inputs["input_ids"], torch.ones_like(live.inputs["input_ids"])
        mask[:, :LEFT_OUT] = 0
        check, padded = (
            "padding leaks, and is refused",
            guarded(live.own_logits, {"input_ids": ids, "attention_mask": mask}),
        )
        if isinstance(padded, Failure):  # by the model's own guard
            live.note("model", check, "padding" in padded.why or padded, None, "It is refused for another reason.")
            return
        leaked = relative(padded[:, LEFT_OUT:], live.own_logits({"input_ids": ids[:, LEFT_OUT:]}))
        advice = "Padding changes nothing in this model, so that it need not be refused (models.prompts.padding_leak)."
        live.note("model", check, leaked > live.tolerance, None, advice)
    elif live.weights_here:
        padded = live.own_logits(live.inputs)[1:, -short:]
        alone = live.own_logits({"input_ids": live.inputs["input_ids"][1:, -short:]})
        advice = "Left padding changes a prompt's logits: give this model prompts of one length at a time."
        live.note("model", "padding is inert", relative(padded, alone), live.tolerance, advice)
