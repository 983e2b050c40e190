"""Writing activations to disk: by several processes, through kills, without a gap or a repeat."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save as to_bytes
from tqdm.auto import tqdm

from ..errors import BadInput
from ..models.marks import config_mark, weights_mark
from .numbers import check_format, encoded
from .rows import Rows, joined
from .shards import (
    ABOUT,
    BESIDE,
    FINISHED,
    FORMAT,
    RECORD,
    StoredActivations,
    end_of,
    header,
    part_name,
    shard_files,
    shard_name,
    zstd,
)
from .stream import NO_TOKENS, ActivationStream, Counts, dtype_of, name_of

Sequences = list[tuple[int, list[int]]]


def store(
    stream: ActivationStream,
    folder: str | Path,
    *,
    dtype: str = "float32",
    sequences_per_shard: int = 64,
    part: tuple[int, int] = (0, 1),
    compress: bool = False,
) -> StoredActivations:
    """Write the activations of a text, or go on writing where an earlier call was stopped.

    Which sequences a shard holds depends on its number alone, and a shard appears whole or not at all: so a store that
    was killed and called again is, bit for bit, the one of an unbroken call. What is there already is compared with the
    text, without running the model.

    Args:
        stream: What to store.
        folder: Where; made if need be.
        dtype: ``"float32"``, ``"bfloat16"``, or ``"int8"`` and ``"int4"`` with a scale for every channel and shard.
        sequences_per_shard: Sequences in a file; best a multiple of the stream's `sequences_per_forward`.
        part: (this process's number, how many processes there are); process p takes every n-th sequence.
        compress: Pack the shards with zstd (needs the package `zstandard`).

    Returns:
        The store. It can be read once all parts are finished.

    Raises:
        BadInput: If the folder holds another store, or the activations of another text or model; if another process
            writes this part; if settings are out of range; for activations that are not finite, as integers.
    """
    number, parts = part
    if not 0 <= number < parts or sequences_per_shard < 1:
        raise BadInput(f"part={part}, sequences_per_shard={sequences_per_shard}; part is (0 to n - 1, n), a shard 1.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; give a folder, which is made if need be.")
    if compress:
        zstd()  # before anything is written
    record = record_of(stream, check_format(dtype), sequences_per_shard, parts, compress)
    home = folder / part_name(number, parts)
    home.mkdir(parents=True, exist_ok=True)
    with locked(folder / "store.lock", -1.0, "is being begun"):
        begin(folder, record)
    with locked(home / "part.lock", 0.0, "is being written by another process; give each its own part="):
        for left in home.glob("*.unfinished"):
            left.unlink()
        write_part(stream, home, number, record)
    return StoredActivations(folder)


def write_part(stream: ActivationStream, home: Path, number: int, record: dict[str, Any]) -> None:
    """The shards of one part that are not there yet."""
    done = shard_files(home)
    finished = (home / FINISHED).exists() and end_of(home)["shards"] == len(done)
    sequences = stream.sequences((number, record["parts"]))
    headers: list[dict[str, Any]] = []
    with tqdm(disable=not stream.progress, desc="stored", unit="row", unit_scale=True) as bar:
        while group := list(islice(sequences, record["sequences_per_shard"])):
            if len(headers) < len(done):
                path = done[len(headers)]
                about = header(path)
                if about["text"] != text_mark(group):
                    raise BadInput(f"{path} holds another text than this; give the text it was begun with.")
            elif finished:
                raise BadInput(f"{home} was finished with less text than there is now; give another folder.")
            else:
                about = write_shard(stream, home / shard_name(len(headers), record["compress"]), group, record)
            headers.append(about)
            bar.update(about["rows"])
    if len(headers) < len(done):
        raise BadInput(f"{home} holds {len(done)} shards, and this text has {len(headers)}; give the same text.")
    if not headers and number == 0:
        raise BadInput(NO_TOKENS)
    if not finished:
        sums = {name: sum(about[name] for about in headers) for name in Counts._fields}
        write(home / FINISHED, json.dumps({"shards": len(headers), **sums}).encode(), False)


def write_shard(stream: ActivationStream, path: Path, group: Sequences, record: dict[str, Any]) -> dict[str, Any]:
    """One shard, and what its header says."""
    rows = joined(list(stream.run(group)))
    counts = Counts(len(group), sum(len(ids) for _, ids in group), rows.n)
    about = {**counts._asdict(), "text": text_mark(group)}
    # One entry: safetensors writes several in any order, and a shard has to be the same whoever writes it.
    data = to_bytes(as_tensors(rows, record["dtype"]), metadata={ABOUT: json.dumps(about)})
    write(path, data, record["compress"])
    return about


def as_tensors(rows: Rows, dtype: str) -> dict[str, torch.Tensor]:
    """What a shard holds."""
    tensors = {name: getattr(rows, name).to(torch.int32) for name in BESIDE}
    for address, value in rows.items():
        tensors |= {f"{address}{suffix}": tensor.cpu() for suffix, tensor in encoded(value, dtype, address).items()}
    return tensors


def text_mark(group: Sequences) -> str:
    """A checksum of a shard's sequences."""
    mark = 0
    for number, ids in group:
        mark = zlib.crc32(torch.tensor([number, len(ids), *ids], dtype=torch.int64).numpy().tobytes(), mark)
    return f"{mark:08x}"


def record_of(stream: ActivationStream, dtype: str, per_shard: int, parts: int, compress: bool) -> dict[str, Any]:
    """What a store is made of, and what has to be the same for writing to go on."""
    model = stream.model
    return {
        "format": FORMAT,
        "model": name_of(model),
        "config": config_mark(model),
        "weights": weights_mark(model),
        "model_dtype": dtype_of(model),
        "sites": {address: list(shape) for address, shape in stream.shapes().items()},
        "dtype": dtype,
        "context": stream.context,
        "sequences_per_forward": stream.sequences_per_forward,
        "keep_special": stream.keep_special,
        "max_sequences": stream.max_sequences,
        "sequences_per_shard": per_shard,
        "parts": parts,
        "compress": compress,
    }


def begin(folder: Path, record: dict[str, Any]) -> None:
    """Write what the store is, or make sure that it is the same one."""
    path = folder / RECORD
    if not path.exists():
        write(path, (json.dumps(record, indent=1) + "\n").encode(), False)
        return
    there = StoredActivations(folder).record
    differing = [name for name in record if there.get(name) != record[name]]
    if differing:
        listed = ", ".join(f"{name} = {there.get(name)!r}, now {record[name]!r}" for name in differing)
        raise BadInput(f"{folder} was begun with {listed}; go on with the same, or give another folder.")


@contextmanager
def locked(path: Path, timeout: float, what: str) -> Iterator[None]:
    """Alone; the lock of a process that is killed is released."""
    try:
        with FileLock(path, timeout=timeout):
            yield
    except Timeout:
        raise BadInput(f"{path.parent} {what}.") from None


def write(path: Path, data: bytes, compress: bool) -> None:
    """Write a file whole or not at all, through a power cut too."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    with open(unfinished, "wb") as file:
        file.write(zstd().ZstdCompressor().compress(data) if compress else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
