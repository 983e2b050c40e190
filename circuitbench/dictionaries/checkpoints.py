"""A training run on disk: one file that is always whole, and the finished dictionary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from circuitbench.dictionaries.files import load_dictionary, write_safetensors, write_text
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from circuitbench.dictionaries.training import Run, TrainResult

CHECKPOINT = "checkpoint.safetensors"
FINISHED = "training.json"

_MOMENTS = ("exp_avg", "exp_avg_sq")


def begin(folder: Path, settings: dict[str, Any], run: Run) -> None:
    """Make the folder ready for a new run, and write its step 0, so that it can be resumed from then on."""
    if (folder / CHECKPOINT).exists() and not (folder / FINISHED).exists():
        raise BadInput(
            f"{folder} holds an unfinished run; continue it with resume=True, or give another folder, or delete it."
        )
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"out={str(folder)!r} is a file; give a folder, which is made if need be.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINISHED).unlink(missing_ok=True)
    save(folder, settings, run)


def save(folder: Path, settings: dict[str, Any], run: Run) -> None:
    """Write the checkpoint, whole or not at all."""
    tensors = {"rows_since_active": run.rows_since_active}
    for name, parameter in run.dictionary.named_parameters():
        tensors[name] = parameter.detach()
        state = run.optimizer.state.get(parameter, {})
        tensors |= {f"{name}.{moment}": state[moment] for moment in _MOMENTS if moment in state}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"step": str(run.step), "settings": json.dumps(settings), "history": json.dumps(run.history)}
    write_safetensors(folder / CHECKPOINT, tensors, metadata)


def load(folder: Path, settings: dict[str, Any], run: Run) -> None:
    """Put the checkpoint into `run`, if it is one of the same settings and activations."""
    path = folder / CHECKPOINT
    if not path.is_file():
        raise BadInput(f"{folder} holds no checkpoint to resume from; start without resume=True.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            _check_same(json.loads(metadata["settings"]), settings, folder)
            run.step, run.history = int(metadata["step"]), json.loads(metadata["history"])
            run.rows_since_active.copy_(file.get_tensor("rows_since_active"))
            for name, parameter in run.dictionary.named_parameters():
                parameter.data.copy_(file.get_tensor(name))
                if run.step:
                    moments = {m: torch.zeros_like(parameter).copy_(file.get_tensor(f"{name}.{m}")) for m in _MOMENTS}
                    step = torch.tensor(float(run.step), device=parameter.device)
                    run.optimizer.state[parameter] = {"step": step, **moments}
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged ({error}); delete it and start without resume=True.") from error


def _check_same(saved: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    differing = [name for name in given if saved.get(name) != given[name]]
    if differing:
        listed = ", ".join(f"{name} = {saved.get(name)!r}, now {given[name]!r}" for name in differing)
        raise BadInput(
            f"the run in {folder} was begun with {listed}; resume with the same, or start in another folder."
        )


def finish(folder: Path, result: TrainResult) -> None:
    """Write the dictionary and the record of the run; the checkpoint is no longer needed."""
    result.dictionary.save(folder)
    write_text(folder / FINISHED, json.dumps({"settings": result.settings, "history": result.history}, indent=1) + "\n")
    (folder / CHECKPOINT).unlink()


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the end of a run, which must then be one of these settings."""
    if not (folder / FINISHED).is_file():
        return False
    _check_same(json.loads((folder / FINISHED).read_text(encoding="utf-8"))["settings"], settings, folder)
    return True


def load_finished(folder: Path) -> TrainResult:
    """The result of a run that had nothing left to do."""
    from circuitbench.dictionaries.training import TrainResult

    record = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    dictionary = load_dictionary(folder).requires_grad_(False).eval()
    return TrainResult(dictionary, record["history"], record["settings"]["steps"], True, 0.0, record["settings"])
