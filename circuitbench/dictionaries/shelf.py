"""The dictionaries that come with the package, by the zoo's models they were trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitbench.dictionaries.formats.common import read_json
from circuitbench.dictionaries.formats.saelens import CONFIG
from circuitbench.errors import BadInput

PREFIX = "zoo:"

SHELF = Path(__file__).with_name("weights")


@dataclass(frozen=True)
class Pretrained:
    """A dictionary in the package, described by its `cfg.json`.

    Attributes:
        name: for `load_dictionary`: "zoo:<model>/<site>/<kind>", and "-to-<site_out>" behind it for a transcoder.
        model_name: of the zoo.
        site: the address it reads.
        kind: of dictionary.
        settings: such as `{"k": 32}`.
        d_in: size of what is encoded.
        d_dict: number of features.
        evaluation: what `evaluate` found on held-out text, of the numbers as they are stored.
    """

    name: str
    model_name: str
    site: str
    kind: str
    settings: dict[str, Any]
    d_in: int
    d_dict: int
    evaluation: dict[str, Any]

    def __str__(self) -> str:
        measured = ", ".join(
            f"{name} {self.evaluation[name]:.3g}"
            for name in ("fvu", "l0", "ce_recovered.mean")
            if name in self.evaluation
        )
        return f"{self.name}: {self.d_in} to {self.d_dict}{f'; {measured}' if measured else ''}"


def pretrained() -> list[Pretrained]:
    """All dictionaries in the package, by name."""
    return [_described(folder) for folder in _folders()]


def folder_of(name: str) -> Path:
    """Where a dictionary of the package lies.

    Args:
        name: "zoo:<model>/<site>/<kind>"; the kind may be left out where a site has one dictionary.

    Raises:
        BadInput: no such dictionary, or several.
    """
    wanted = name.removeprefix(PREFIX)
    names = {_name(folder).removeprefix(PREFIX): folder for folder in _folders()}
    at_site = [folder for other, folder in names.items() if other.rpartition("/")[0] == wanted]
    found = [names[wanted]] if wanted in names else at_site
    if len(found) == 1:
        return found[0]
    if not found:
        raise BadInput(f"There is no dictionary {name!r} in the package; there are: {_listed(_folders())}.")
    raise BadInput(f"{name!r} stands for several dictionaries; name one: {_listed(found)}.")


def _folders() -> list[Path]:
    return sorted(path.parent for path in SHELF.glob(f"*/*/*/{CONFIG}"))


def _listed(folders: list[Path]) -> str:
    return ", ".join(map(_name, folders)) or "none"


def _name(folder: Path) -> str:
    return PREFIX + "/".join(folder.relative_to(SHELF).parts)


def _described(folder: Path) -> Pretrained:
    config = read_json(folder / CONFIG)
    record = config["metadata"]["circuitbench"]
    return Pretrained(
        name=_name(folder),
        model_name=config["metadata"]["model_name"],
        site=record["site"],
        kind=record["kind"],
        settings=record["settings"],
        d_in=config["d_in"],
        d_dict=config["d_sae"],
        evaluation=json.loads(json.dumps(record["metadata"].get("evaluation", {}))),
    )
