"""Dictionaries on disk: saved in SAELens' layout, read from it and from other projects'. Nothing is unpickled."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from circuitbench.dictionaries import hub, shelf
from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.formats import dictionary_learning, saelens, sparsify
from circuitbench.dictionaries.formats.common import DTYPES
from circuitbench.dictionaries.formats.saelens import CONFIG, WEIGHTS
from circuitbench.errors import BadInput


def save(dictionary: Dictionary, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the folder `path`, which is made if need be; a dictionary already there is replaced.

    Args:
        dictionary: what is saved.
        path: the folder.
        dtype: of the numbers in the file, such as torch.float16 for half the size; what is loaded computes in the
            dictionary's own. Thresholds stay as they are.

    Raises:
        BadInput: `path` is a file, metadata that JSON cannot hold, weights that are not finite (in `dtype`).
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; a dictionary is saved as a folder.")
    if dtype is not None and dtype not in DTYPES.values():
        raise BadInput(f"dtype={dtype} was given; weights are saved in one of {', '.join(DTYPES)}.")
    tensors = {}
    for name, tensor in dictionary.state_dict().items():
        stored = tensor.detach().cpu() if dtype is None or name == "threshold" else tensor.detach().cpu().to(dtype)
        if not torch.isfinite(stored).all():
            raise BadInput(f"{name} has values that are not finite in {stored.dtype}; such a dictionary is not saved.")
        tensors[name] = stored.contiguous()
    fingerprint = _fingerprint(tensors)
    config = saelens.config_of(dictionary, fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt", "circuitbench": fingerprint})
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def load_dictionary(source: str | Path, *, revision: str | None = None) -> Dictionary:
    """A dictionary from a folder, from the package or from the Hub.

    Args:
        source: a folder that we, SAELens, sparsify or dictionary_learning wrote; the name of one in the package, such
            as "zoo:pylm-hybrid/layers.2.ssm.gated" (`dictionaries.pretrained()` lists them); or a Hub id, "org/name",
            "org/name/subfolder", with "@revision" behind it if need be.
        revision: branch, tag or commit on the Hub.

    Raises:
        BadInput: nothing there, a file missing, damaged or truncated, a tensor missing or of the wrong shape, an
            unknown kind, or an option that changes what the weights mean and cannot be brought into them.
    """
    folder = Path(source)
    on_hub = isinstance(source, str) and not folder.exists() and hub.is_id(source)
    if revision is not None and not on_hub:
        raise BadInput(f"revision={revision!r} was given; {source} is not on the Hub, and has none.")
    if on_hub:
        folder = hub.download(str(source), revision)
    elif isinstance(source, str) and source.startswith(shelf.PREFIX):
        folder = shelf.folder_of(source)
    if not folder.is_dir():
        raise BadInput(
            f"{folder} is not a folder; give the one that holds {CONFIG} and {WEIGHTS}, a Hub id such as "
            '"org/name", or a name of dictionaries.pretrained().'
        )
    return _read(folder)


def _read(folder: Path) -> Dictionary:
    """By the files that are there."""
    if (folder / sparsify.WEIGHTS).is_file():
        return sparsify.read(folder)
    if (folder / dictionary_learning.WEIGHTS).is_file():
        return dictionary_learning.read(folder)
    return saelens.read(folder)


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    """Told apart from that of other weights, so that a config and weights of two saves are not taken for one."""
    sums = "".join(f"{name} {zlib.crc32(_bytes(tensors[name])):08x}\n" for name in sorted(tensors))
    return f"{zlib.crc32(sums.encode()):08x}"


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    _put_in_place(unfinished, path)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    save_file(tensors, unfinished, metadata)
    _put_in_place(unfinished, path)


def _put_in_place(unfinished: Path, path: Path) -> None:
    """Give a file its name once its bytes are on the disk: a name must not survive a power cut that they do not."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
