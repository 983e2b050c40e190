"""Recipes for many dictionaries, every combination of what is given as a list; their names and folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from circuitbench.dictionaries.building import kind_of
from circuitbench.errors import BadInput

_OF_SOME_KINDS = ("k", "k_start")


def grid(**arguments: Any) -> list[dict[str, Any]]:
    """Recipes for `train_many`: one for every combination of the arguments that are lists, in their order.

    `grid(site=["layers.1.ssm.gated", "layers.2.ssm.gated"], kind=["topk", "standard"], k=[16, 32], expansion=8)` are
    six: a kind without `k` is there once for each site. Each has a `name` made of what distinguishes it, such as
    "layers.1.ssm.gated-topk-k16".

    Args:
        **arguments: what `train` takes. A list is gone through; to give a list as a value (the `sites` of a
            crosscoder), make it a tuple.

    Raises:
        BadInput: an empty list, an unknown kind, or an argument that no kind in the grid has.
    """
    axes = {name: value if isinstance(value, list) else [value] for name, value in arguments.items()}
    empty = [name for name, values in axes.items() if not values]
    if empty:
        raise BadInput(f"{', '.join(empty)}=[] was given; a list in a grid needs at least one value.")
    kinds = {kind: kind_of(kind) for kind in axes.get("kind", ["topk"])}
    special = {name for cls in kinds.values() for name in (*cls.settings_names, *cls.training_options)} | {
        name for name in _OF_SOME_KINDS if name in axes
    }
    for name in special & set(axes):
        if not any(_has(cls, name) for cls in kinds.values()):
            raise BadInput(f"{name}={axes[name]} was given; {', '.join(map(repr, kinds))} has none.")
    recipes: list[dict[str, Any]] = []
    for values in product(*axes.values()):
        one = dict(zip(axes, values, strict=True))
        cls = kinds[one.get("kind", "topk")]
        one = {name: value for name, value in one.items() if name not in special or _has(cls, name)}
        if one not in recipes:
            recipes.append(one)
    several = [name for name, values in axes.items() if len(values) > 1]
    named = [{**one, "name": _name(one, several)} for one in recipes]
    return named if len(named) > 1 else recipes


def _has(cls: Any, name: str) -> bool:
    return (name if name != "k_start" else "k") in (*cls.settings_names, *cls.training_options)


def _name(recipe: dict[str, Any], several: list[str]) -> str:
    """Of what distinguishes a recipe; also a folder's name."""
    parts = []
    for name in several:
        if name in recipe:
            value = recipe[name]
            said = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
            short = {"seed": "seed", "k": "k"}.get(name, f"{name}=")
            parts.append(said if name in ("site", "sites", "kind", "site_out") else f"{short}{said}")
    return "-".join(parts).replace("/", "_")


def names_of(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What recipes are called: their `name`, or their number and kind; "" for one that is alone and has none."""
    if len(recipes) == 1:
        return [recipes[0].get("name", "")]
    names = [one.get("name", f"{number}-{one.get('kind', 'topk')}") for number, one in enumerate(recipes)]
    if len(set(names)) != len(names) or not all(names) or any("/" in name for name in names):
        raise BadInput(f"the recipes are called {', '.join(map(repr, names))}; give each its own name, without '/'.")
    return names


def folders_of(names: Sequence[str], out: Sequence[str | Path] | str | Path | None) -> dict[str, Path | None]:
    """Name -> folder: of those given, or one with the dictionary's name in the one given."""
    if out is None:
        return dict.fromkeys(names)
    if isinstance(out, (str, Path)):
        return {name: Path(out) / name for name in names}
    if len({Path(folder) for folder in out}) != len(names):
        raise BadInput(
            f"{len(names)} recipes were given and out={list(map(str, out))}; give each a folder of its own, or one "
            "folder for all."
        )
    return {name: Path(folder) for name, folder in zip(names, out, strict=True)}


@contextmanager
def called(name: str) -> Iterator[None]:
    """Put a dictionary's name before what is wrong with it."""
    try:
        yield
    except BadInput as error:
        if not name:
            raise
        raise BadInput(f"{name}: {error}") from error
