"""A training run on disk: one file that is always whole, and the finished dictionary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from circuitbench.dictionaries.files import load_dictionary, write_safetensors, write_text
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from circuitbench.dictionaries.base import Dictionary
    from circuitbench.dictionaries.run import History, Run

CHECKPOINT = "checkpoint.safetensors"
FINISHED = "training.json"


def begin(folder: Path, run: Run) -> None:
    """Make the folder ready for a new run, and write its step 0, so that it can be resumed from then on."""
    if (folder / CHECKPOINT).exists() and not (folder / FINISHED).exists():
        raise BadInput(
            f"{folder} holds an unfinished run; continue it with resume=True, or give another folder, or delete it."
        )
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"out={str(folder)!r} is a file; give a folder, which is made if need be.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINISHED).unlink(missing_ok=True)
    save(folder, run)


def save(folder: Path, run: Run) -> None:
    """Write the checkpoint, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in run.tensors().items()}
    settings = json.dumps(run.recipe.to_dict())
    metadata = {"step": str(run.step), "settings": settings, "history": json.dumps(run.history)}
    write_safetensors(folder / CHECKPOINT, tensors, metadata)


def load(folder: Path, run: Run) -> None:
    """Put the checkpoint into `run`, if it is one of the same settings and activations."""
    path = folder / CHECKPOINT
    if not path.is_file():
        raise BadInput(f"{folder} holds no checkpoint to resume from; start without resume=True.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            check_same(json.loads(metadata["settings"]), run.recipe.to_dict(), folder)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged ({error}); delete it and start without resume=True.") from error
    run.restore(tensors, int(metadata["step"]), json.loads(metadata["history"]))


def check_same(saved: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with other settings."""
    given = json.loads(json.dumps(given))
    differing = [name for name in given if saved.get(name) != given[name]]
    if differing:
        listed = ", ".join(f"{name} = {saved.get(name)!r}, now {given[name]!r}" for name in differing)
        raise BadInput(
            f"the run in {folder} was begun with {listed}; resume with the same, or start in another folder."
        )


def finish(folder: Path, dictionary: Dictionary, run: Run) -> None:
    """Write the dictionary and the record of the run; the checkpoint is no longer needed."""
    dictionary.save(folder)
    record = {"settings": run.recipe.to_dict(), "history": run.history, "diagnostics": run.diagnostics}
    write_text(folder / FINISHED, json.dumps(record, indent=1) + "\n")
    (folder / CHECKPOINT).unlink(missing_ok=True)


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the end of a run, which must then be one of these settings."""
    if not (folder / FINISHED).is_file():
        return False
    check_same(json.loads((folder / FINISHED).read_text(encoding="utf-8"))["settings"], settings, folder)
    return True


def load_finished(folder: Path) -> tuple[Dictionary, History, dict[str, float]]:
    """The dictionary, the history and the diagnostics of a run that had nothing left to do."""
    record = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    return load_dictionary(folder).requires_grad_(False).eval(), record["history"], record["diagnostics"]
