"""Feature examples on disk: tensors in safetensors, the rest in JSON. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import BadInput
from .examples import NO_TOKEN, FeatureExamples

if TYPE_CHECKING:
    from torch import Tensor

TENSORS, DESCRIPTION = "examples.safetensors", "examples.json"
FORMAT = "circuitbench feature examples, 1"
PLAIN = ("active_tokens", "exponents", "histogram", "ranks")
TABLES = ("values", "sequences", "positions", "tokens", "activations")
COUNTS = ("n", "before", "after", "per_interval", "n_tokens", "n_sequences")


def save(examples: FeatureExamples, path: str | Path) -> None:
    """Write the folder `path`, made if need be; examples already there are replaced.

    Raises:
        BadInput: `path` is a file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; examples are saved as a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format": FORMAT,
        **{name: getattr(examples, name) for name in COUNTS},
        "about": examples.about,
        "words": {str(i): word for i, word in examples.words.items()},
    }
    for name, write in (
        (TENSORS, lambda file: save_file(tensors_of(examples), file)),
        (DESCRIPTION, lambda file: file.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")),
    ):
        unfinished = folder / f"{name}.unfinished"
        write(unfinished)
        os.replace(unfinished, folder / name)


def load_examples(path: str | Path) -> FeatureExamples:
    """Examples that `FeatureExamples.save` wrote.

    Raises:
        BadInput: A file missing or damaged, a tensor missing or of another shape, or another format.
    """
    folder = Path(path)
    for name in (DESCRIPTION, TENSORS):
        if not (folder / name).is_file():
            raise BadInput(f"{folder} has no {name}; give a folder that FeatureExamples.save wrote.")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        given = load_file(folder / TENSORS)
    except (ValueError, OSError, SafetensorError) as error:
        raise BadInput(f"{folder} is damaged, and cannot be read ({error}); gather the examples again.") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise BadInput(f"{folder / DESCRIPTION} is not of the format {FORMAT!r}.")
    examples = rebuilt(description, given, folder)
    used = torch.cat([t.flatten() for name, t in given.items() if name.endswith("tokens") and name != "active_tokens"])
    unnamed = set(used.unique().tolist()) - {NO_TOKEN} - set(examples.words)
    if unnamed and examples.words:
        raise BadInput(f"{folder / DESCRIPTION} has no words for the tokens {sorted(unnamed)[:5]}; it is damaged.")
    return examples


def rebuilt(description: dict[str, Any], given: dict[str, Tensor], folder: Path) -> FeatureExamples:
    """The examples, if everything is there and has its shape."""
    try:
        counts = {name: int(description[name]) for name in COUNTS}
        words = {int(i): str(word) for i, word in description["words"].items()}
        about = dict(description["about"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{folder / DESCRIPTION} lacks an entry or has a wrong one: {error}.") from None
    d_dict = len(given["active_tokens"]) if "active_tokens" in given and given["active_tokens"].dim() else 0
    examples = FeatureExamples(d_dict, **{name: counts[name] for name in COUNTS[:4]})
    examples.n_tokens, examples.n_sequences = counts["n_tokens"], counts["n_sequences"]
    examples.words, examples.about = words, about
    blank = tensors_of(examples)
    for name, expected in blank.items():
        shape = tuple(expected.shape)
        tensor = given.get(name)
        free = name.split(".")[0] in ("promoted", "suppressed")  # as many tokens as were asked for
        if (
            tensor is None
            or tensor.dtype != expected.dtype
            or (tuple(tensor.shape[:1]), tensor.dim())
            != (
                shape[:1],
                len(shape),
            )
            or (not free and tuple(tensor.shape) != shape)
        ):
            found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise BadInput(f"{folder / TENSORS}: {name} is {found}; it must be {expected.dtype} {shape}.")
    for name in PLAIN:
        setattr(examples, name, given[name])
    for table in ("top", "spread"):
        for name in TABLES:
            setattr(getattr(examples, table), name, given[f"{table}.{name}"])
    for side in ("promoted", "suppressed"):
        setattr(examples, side, (given[f"{side}.tokens"], given[f"{side}.values"]))
    return examples


def tensors_of(examples: FeatureExamples) -> dict[str, Tensor]:
    """All tensors by name."""
    out = {name: getattr(examples, name) for name in PLAIN}
    for table in ("top", "spread"):
        out |= {f"{table}.{name}": getattr(getattr(examples, table), name) for name in TABLES}
    for side in ("promoted", "suppressed"):
        tokens, values = getattr(examples, side)
        out |= {f"{side}.tokens": tokens, f"{side}.values": values}
    return {name: tensor.contiguous() for name, tensor in out.items()}
