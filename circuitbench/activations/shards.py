"""Activations on disk: shards of safetensors that several processes can write, and that a kill cannot damage.

A store is a folder: `store.json` says what is in it, and every part (one for each process that writes) has a folder of
shards, each with the rows of so many sequences, and at its end a `finished.json`. `writing.store` writes it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes

from ..errors import BadInput
from .numbers import FLOATS, decoded, suffixes
from .rows import Rows
from .stream import Counts, SiteRows, check_among, only

FORMAT = 2
RECORD = "store.json"
FINISHED = "finished.json"
ABOUT = "circuitbench"  # of the header's metadata
BESIDE = ("token_ids", "sequence", "position")


class StoredActivations:
    """Activations on disk, as an iterable of `Rows`, a shard at a time; printing it says what is there.

    Reading changes nothing, so that any number of processes and threads can read one store.

    Args:
        folder: The store.
        sites: Read these alone; default: all of them.

    Raises:
        BadInput: If it is none, or lacks a site; when it is read: if it is unfinished, or a shard damaged or missing.
    """

    def __init__(self, folder: str | Path, sites: str | Sequence[str] | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / RECORD
        if not path.is_file():
            raise BadInput(f"{folder} holds no activations: it has no {RECORD}.")
        try:
            self.record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known = list(self.record["sites"])
            version = self.record["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} is damaged ({error}); store the activations again.") from error
        if version != FORMAT:
            raise BadInput(f"{path} is of format {version}, this version reads {FORMAT}; store the activations again.")
        self.sites: list[str] = known if sites is None else [sites] if isinstance(sites, str) else list(sites)
        check_among(self.sites, known)

    def of(self, sites: str | Sequence[str]) -> StoredActivations:
        """The same store, of these sites alone: the others are not read."""
        return StoredActivations(self.folder, sites)

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
        return map(self.read, self.shards())

    def in_random_order(self, seed: int) -> Iterator[Rows]:
        """As iteration, the shards in random order."""
        self.check_finished()
        paths = self.shards()
        random.Random(seed).shuffle(paths)
        return map(self.read, paths)

    def check_finished(self) -> None:
        """Refuse to read a part of the text for the whole."""
        for home in self.parts():
            if not (home / FINISHED).exists():
                raise BadInput(f"{self.folder} is unfinished: {home.name} is still to be written; call store(…) again.")
            wanted = end_of(home)["shards"]
            if len(shard_files(home)) != wanted:
                raise BadInput(
                    f"{home} has {len(shard_files(home))} of its {wanted} shards; copy the missing ones, or delete "
                    f"{home / FINISHED} and the shards after the gap, and call store(…) again."
                )

    def read(self, path: Path) -> Rows:
        """One shard."""
        name = self.record["dtype"]
        wanted = [*BESIDE, *(f"{address}{suffix}" for address in self.sites for suffix in suffixes(name))]
        try:
            if path.suffix == ".zst":
                with opened(path) as file:
                    tensors = load_bytes(file.read())
            else:
                with safe_open(path, "pt") as file:
                    tensors = {key: file.get_tensor(key) for key in wanted}
            values = {
                address: decoded({suffix: tensors[f"{address}{suffix}"] for suffix in suffixes(name)}, name, width)
                for address, width in self.widths().items()
            }
            return Rows(values, *(tensors[key].long() for key in BESIDE))
        except (SafetensorError, KeyError, OSError) as error:
            raise damaged(path, error) from error

    def site(self, address: str | None = None) -> SiteRows:
        """One site's activations as plain tensors, as `dictionaries.train` takes them."""
        address = only(self.sites, address)
        return SiteRows(self.of(address), address)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Address -> shape of what the site holds for one token; its product is the width of a row."""
        return {address: tuple(self.record["sites"][address]) for address in self.sites}

    def widths(self) -> dict[str, int]:
        """Address -> numbers in a row."""
        return {address: prod(shape) for address, shape in self.shapes().items()}

    def row_bytes(self) -> int:
        """Memory of one row of all sites, once it is read."""
        dtype = FLOATS.get(self.record["dtype"], torch.float32)
        return dtype.itemsize * sum(self.widths().values())

    def counts(self) -> Counts:
        """Sequences, tokens and rows that are there, without reading them."""
        found = []
        for home in self.parts():
            whole = (home / FINISHED).exists()
            found += [end_of(home)] if whole else [header(path) for path in shard_files(home)]
        return Counts(*(sum(one[name] for one in found) for name in Counts._fields))

    @property
    def n_rows(self) -> int:
        """Rows that are there."""
        return self.counts().rows

    @property
    def n_bytes(self) -> int:
        """Size of all shards."""
        return sum(path.stat().st_size for path in self.shards())

    def to_dict(self) -> dict[str, Any]:
        """What there is, as `info` says it."""
        return {
            **self.record,
            "finished": self.finished,
            "shards": len(self.shards()),
            **self.counts()._asdict(),
            "bytes": self.n_bytes,
        }

    def __repr__(self) -> str:
        record, counts = self.record, self.counts()
        split = "" if record["parts"] == 1 else f", in {record['parts']} parts"
        shapes = (f"{address} ({', '.join(map(str, shape))})" for address, shape in self.shapes().items())
        return (
            f"activations of {record['model']} in {self.folder}, {'finished' if self.finished else 'unfinished'}\n"
            f"  {', '.join(shapes)}\n"
            f"  {counts.rows:,} rows of {counts.tokens:,} tokens, {record['dtype']}"
            f"{', zstd' if record['compress'] else ''}, {self.n_bytes / 1e6:.1f} MB\n"
            f"  {len(self.shards())} shards of {record['sequences_per_shard']} sequences of {record['context']} tokens"
            f"{split}"
        )


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


def end_of(home: Path) -> dict[str, int]:
    """What a finished part has."""
    try:
        found = json.loads((home / FINISHED).read_text(encoding="utf-8"))
        return {name: int(found[name]) for name in ("shards", *Counts._fields)}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BadInput(f"{home / FINISHED} is damaged ({error}); delete it, and call store(…) again.") from error


def header(path: Path) -> dict[str, Any]:
    """What a shard says about itself, without reading its tensors."""
    try:
        with opened(path) as file:
            length = int.from_bytes(file.read(8), "little")
            about = json.loads(json.loads(file.read(length))["__metadata__"][ABOUT])
            return {name: about[name] for name in (*Counts._fields, "text")}
    except (ValueError, KeyError, OSError) as error:
        raise damaged(path, error) from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A shard's file, unpacked while it is read."""
    with open(path, "rb") as raw:
        if path.suffix != ".zst":
            yield raw
            return
        problem = zstd().ZstdError
        try:
            with zstd().ZstdDecompressor().stream_reader(raw) as file:
                yield file
        except problem as error:
            raise OSError(str(error)) from error


def damaged(path: Path, error: Exception) -> BadInput:
    """The error for a shard that cannot be read."""
    return BadInput(f"{path} is damaged ({error}); delete it and those after it, and store again.")


def zstd() -> Any:
    """The package that packs, if it is there."""
    try:
        import zstandard
    except ImportError as error:
        raise BadInput(
            "compress=True needs the package zstandard: pip install zstandard; or store without it."
        ) from error
    return zstandard
