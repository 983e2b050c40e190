"""Where the numbers of a run go while it trains. Anything with `start`, `log` and `finish` will do."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from circuitbench.dictionaries import diagnostics
from circuitbench.errors import BadInput

Numbers = Mapping[str, float]


@runtime_checkable
class Logger(Protocol):
    """What training tells. Of many dictionaries, names and numbers have the dictionary's name before them: "a/fvu"."""

    def start(self, settings: Mapping[str, Any]) -> None:
        """Before the first step.

        Args:
            settings: dictionary's name ("" where there is one) -> everything that determines it, and `diagnostics`.
        """
        ...

    def log(self, step: int, numbers: Numbers) -> None:
        """After a step that the history has.

        Args:
            step: steps done.
            numbers: `loss`, `fvu`, `l0`, `dead_share`, and `rows_per_second`, of all dictionaries together.
        """
        ...

    def finish(self) -> None:
        """When the run ends, however it ends."""
        ...


class ToStdout:
    """A line of text for each dictionary and step that is logged: for terminals without a cursor, and for CI."""

    def start(self, settings: Mapping[str, Any]) -> None:
        """Sizes and steps of each dictionary, and what its activations say."""
        for name, one in settings.items():
            made = f"{one['kind']}, {one['d_dict']} features, {one['steps']} steps of {one['batch_size']} rows"
            self._line(name, made)
            self._line(name, diagnostics.said(one["diagnostics"]["gamma"], one["diagnostics"]["rows"]))

    def log(self, step: int, numbers: Numbers) -> None:
        """One line for each dictionary."""
        speed = f"{numbers['rows_per_second']:.0f} rows/s"
        for prefix in dict.fromkeys(name.rpartition("/")[0] for name in numbers if name != "rows_per_second"):
            of = {
                name.rpartition("/")[2]: value for name, value in numbers.items() if name.rpartition("/")[0] == prefix
            }
            told = f"loss {of['loss']:.4g}  fvu {of['fvu']:.4f}  l0 {of['l0']:.1f}  dead {of['dead_share']:.1%}"
            self._line(prefix, f"step {step}  {told}  {speed}")

    def finish(self) -> None:
        """Let the lines out."""
        sys.stdout.flush()

    @staticmethod
    def _line(name: str, text: str) -> None:
        sys.stdout.write(f"{name}: {text}\n" if name else f"{text}\n")


class ToTensorBoard:
    """Scalars in TensorBoard's event files.

    Args:
        folder: where they are written.

    Raises:
        BadInput: the package is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        _package("tensorboard", "ToTensorBoard")
        self.folder = str(folder)

    def start(self, settings: Mapping[str, Any]) -> None:
        """Open the files; the settings are a text in them."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(self.folder)
        self._writer.add_text("settings", f"```json\n{json.dumps(settings, indent=1)}\n```")

    def log(self, step: int, numbers: Numbers) -> None:
        """One scalar for each number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Close the files."""
        self._writer.close()


class ToWandb:
    """A run at Weights & Biases.

    Args:
        project: its project.
        **options: of `wandb.init`: name, group, mode, …

    Raises:
        BadInput: the package is not installed.
    """

    def __init__(self, project: str, **options: Any) -> None:
        self._wandb = _package("wandb", "ToWandb")
        self.options = {"project": project, **options}

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin a run with the settings as its config."""
        self._run = self._wandb.init(config=dict(settings), **self.options)

    def log(self, step: int, numbers: Numbers) -> None:
        """One entry."""
        self._run.log(dict(numbers), step=step)

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


class ToTrackio:
    """A run in trackio's dashboard.

    Args:
        project: its project.
        **options: of `trackio.init`: name, space_id, …

    Raises:
        BadInput: the package is not installed.
    """

    def __init__(self, project: str, **options: Any) -> None:
        self._trackio = _package("trackio", "ToTrackio")
        self.options = {"project": project, **options}

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin a run with the settings as its config."""
        self._run = self._trackio.init(config=dict(settings), **self.options)

    def log(self, step: int, numbers: Numbers) -> None:
        """One entry."""
        self._run.log(dict(numbers), step=step)

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


def _package(name: str, asked_by: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f"{asked_by} needs the package {name}, which is not installed: `pip install {name}`.") from error


def checked(loggers: Any) -> list[Logger]:
    """Loggers as a list; BadInput for something that is none."""
    found = list(loggers)
    for logger in found:
        if isinstance(logger, type) or not isinstance(logger, Logger):
            raise BadInput(
                f"loggers= holds {logger!r}; a logger is an object with start, log and finish, such as ToStdout()."
            )
    return found
