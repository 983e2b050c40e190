"""Activations on disk: shards of safetensors that several processes can write, and that a kill cannot damage.

A store is a folder: `store.json` says what is in it, and every part (one for each process that writes) has a folder of
shards, each with the rows of so many sequences. A shard appears whole or not at all, and which sequences it holds
depends on its number alone, so that writing goes on after the last one without a gap or a repeat.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as to_bytes

from ..errors import BadInput
from .numbers import check_format, decoded, encoded
from .shuffle import joined
from .stream import ActivationStream, Rows, only

RECORD = "store.json"
FINISHED = "finished.json"
BESIDE = ("token_ids", "sequence", "position")


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

    Args:
        stream: What to store.
        folder: Where; made if need be.
        dtype: ``"float32"``, ``"bfloat16"``, or ``"int8"`` and ``"int4"`` with a scale for every channel and shard.
        sequences_per_shard: Sequences in a file.
        part: (this process's number, how many processes there are); process p takes every n-th sequence.
        compress: Pack the shards with zstd (needs the package `zstandard`).

    Returns:
        The store. It can be read once all parts are finished.

    Raises:
        BadInput: If the folder holds another store, or the settings are out of range.
    """
    number, parts = part
    if not 0 <= number < parts or sequences_per_shard < 1:
        raise BadInput(f"part={part}, sequences_per_shard={sequences_per_shard}; part is (0 to n - 1, n), a shard 1.")
    folder = Path(folder)
    record = record_of(stream, check_format(dtype), sequences_per_shard, parts, compress)
    begin(folder, record)
    home = folder / part_name(number, parts)
    home.mkdir(exist_ok=True)
    if (home / FINISHED).exists():
        return StoredActivations(folder)
    done = shard_files(home)
    # Whole shards only: the numbers of their sequences follow from how many there are.
    first = number + parts * sequences_per_shard * len(done)
    sequences = stream.sequences(first, (number, parts))
    shard = len(done)
    while group := list(islice(sequences, sequences_per_shard)):
        rows = joined(list(stream.run(iter(group))))
        tensors = {name: getattr(rows, name).to(torch.int32) for name in BESIDE}
        for address, value in rows.items():
            tensors |= {f"{address}{suffix}": tensor for suffix, tensor in encoded(value, dtype).items()}
        write(home / shard_name(shard, compress), to_bytes(tensors), compress)
        shard += 1
    if shard == 0 and number == 0:
        raise BadInput("The text has no tokens; give some text.")
    write(home / FINISHED, json.dumps({"shards": shard}).encode(), False)
    return StoredActivations(folder)


class StoredActivations:
    """Activations on disk, as an iterable of `Rows`, a shard at a time; printing it says what is there.

    Args:
        folder: The store.

    Raises:
        BadInput: If it is none; when it is read: if it is unfinished, or a shard is damaged or missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / RECORD
        if not path.is_file():
            raise BadInput(f"{folder} holds no activations: it has no {RECORD}.")
        try:
            self.record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.sites: list[str] = list(self.record["sites"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} is damaged ({error}); store the activations again.") from error

    @property
    def finished(self) -> bool:
        """Whether every part has been written to its end."""
        return all((home / FINISHED).exists() for home in self.parts())

    def parts(self) -> list[Path]:
        """Folders of the parts."""
        return [self.folder / part_name(number, self.record["parts"]) for number in range(self.record["parts"])]

    def shards(self) -> list[Path]:
        """Files of all shards, in the order of their sequences."""
        by_part = [shard_files(home) for home in self.parts()]
        longest = max(map(len, by_part), default=0)
        return [files[index] for index in range(longest) for files in by_part if index < len(files)]

    def __iter__(self) -> Iterator[Rows]:
        self.check_finished()
        for path in self.shards():
            yield self.read(path)

    def check_finished(self) -> None:
        """Refuse to read a part of the text for the whole."""
        for home in self.parts():
            if not (home / FINISHED).exists():
                raise BadInput(f"{self.folder} is unfinished: {home.name} is still to be written; call store(…) again.")
            wanted = json.loads((home / FINISHED).read_text())["shards"]
            if len(shard_files(home)) != wanted:
                raise BadInput(
                    f"{home} has {len(shard_files(home))} of its {wanted} shards; copy the missing ones, or delete "
                    f"{home / FINISHED} and the shards after the gap, and call store(…) again."
                )

    def read(self, path: Path) -> Rows:
        """One shard."""
        try:
            data = path.read_bytes()
            tensors = load_bytes(unpacked(data) if path.suffix == ".zst" else data)
            widths, name = self.record["sites"], self.record["dtype"]
            values = {
                address: decoded(
                    {key.removeprefix(address): value for key, value in tensors.items() if key.startswith(address)},
                    name,
                    widths[address],
                )
                for address in self.sites
            }
            return Rows(values, *(tensors[key].long() for key in BESIDE))
        except (SafetensorError, KeyError, OSError) as error:
            raise BadInput(f"{path} is damaged ({error}); delete it and those after it, and store again.") from error

    def site(self, address: str | None = None) -> StoredSite:
        """One site's activations, as `dictionaries.train` takes them."""
        return StoredSite(self, only(self.sites, address))

    @property
    def n_bytes(self) -> int:
        """Size of all shards."""
        return sum(path.stat().st_size for path in self.shards())

    def __repr__(self) -> str:
        record = self.record
        widths = ", ".join(f"{address} ({width})" for address, width in record["sites"].items())
        state = "finished" if self.finished else "unfinished"
        return (
            f"activations of {record['model']} in {self.folder}, {state}\n"
            f"  {widths}\n"
            f"  {record['dtype']}{', zstd' if record['compress'] else ''}; {len(self.shards())} shards of "
            f"{record['sequences_per_shard']} sequences of {record['context']} tokens, {record['parts']} part(s), "
            f"{self.n_bytes / 1e6:.1f} MB"
        )


class StoredSite:
    """One site of a store: an iterable of `(n, d)`, a shard at a time."""

    def __init__(self, stored: StoredActivations, address: str) -> None:
        self.stored = stored
        self.address = address

    def __iter__(self) -> Iterator[torch.Tensor]:
        for rows in self.stored:
            yield rows[self.address]


def record_of(stream: ActivationStream, dtype: str, per_shard: int, parts: int, compress: bool) -> dict[str, Any]:
    """What a store is made of, and what has to be the same for writing to go on."""
    hf = stream.model.hf
    return {
        "format": 1,
        "model": hf.name_or_path or hf.config.model_type,
        "sites": stream.widths(),
        "dtype": dtype,
        "context": stream.context,
        "keep_special": stream.keep_special,
        "max_sequences": stream.max_sequences,
        "sequences_per_shard": per_shard,
        "parts": parts,
        "compress": compress,
    }


def begin(folder: Path, record: dict[str, Any]) -> None:
    """Make the folder, or make sure that it is the same store."""
    path = folder / RECORD
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in record if there.get(name) != record[name]]
        if differing:
            listed = ", ".join(f"{name} = {there.get(name)!r}, now {record[name]!r}" for name in differing)
            raise BadInput(f"{folder} was begun with {listed}; go on with the same, or give another folder.")
        return
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; give a folder, which is made if need be.")
    folder.mkdir(parents=True, exist_ok=True)
    write(path, (json.dumps(record, indent=1) + "\n").encode(), False)


def part_name(number: int, parts: int) -> str:
    return f"part-{number:04d}-of-{parts:04d}"


def shard_name(number: int, compress: bool) -> str:
    return f"shard-{number:06d}.safetensors{'.zst' if compress else ''}"


def shard_files(home: Path) -> list[Path]:
    """The shards of a part, without a gap in their numbers."""
    files = sorted(path for path in home.glob("shard-*.safetensors*") if not path.name.endswith(".unfinished"))
    for number, path in enumerate(files):
        if not path.name.startswith(f"shard-{number:06d}."):
            raise BadInput(f"{home} has {path.name}, but no shard {number}; copy it, or delete those after the gap.")
    return files


def write(path: Path, data: bytes, compress: bool) -> None:
    """Write a file whole or not at all, through a power cut too."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    with open(unfinished, "wb") as file:
        file.write(zstd().ZstdCompressor().compress(data) if compress else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def unpacked(data: bytes) -> bytes:
    """Data packed with zstd."""
    error = zstd().ZstdError
    try:
        return zstd().ZstdDecompressor().decompress(data)
    except error as problem:
        raise OSError(str(problem)) from problem


def zstd() -> Any:
    """The package that packs, if it is there."""
    try:
        import zstandard
    except ImportError as error:
        raise BadInput(
            "compress=True needs the package zstandard: pip install zstandard; or store without it."
        ) from error
    return zstandard
