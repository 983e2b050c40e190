"""Tensors from a file that `torch.save` wrote, without unpickling: its few instructions are followed, none is run.

Such a file is a zip archive: `data.pkl` says by which names and in which shapes, `data/0`, `data/1`, … hold numbers.
The program in `data.pkl` is read as data. It may build dictionaries, tuples, strings and numbers, and name the storage
of a tensor; whatever else it asks for is refused by name, and no object of its choice is ever made or called.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitbench.errors import BadInput

_ORDERED = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch BFloat16Storage": torch.bfloat16,
    "torch HalfStorage": torch.float16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch BoolStorage": torch.bool,
}
_ALLOWED = {_ORDERED, _TENSOR, _PARAMETER, *_STORAGES}


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in the file.

    Raises:
        BadInput: no such file, one that is truncated or was not written by `torch.save` of torch 1.6 or later, or one
            that holds anything but tensors by name.
    """
    if not path.is_file():
        raise BadInput(f"{path} is missing.")
    try:
        with zipfile.ZipFile(path) as archive:
            return _state(_Program(archive, path).run(), path)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise BadInput(f"{path} is truncated or not a file of torch.save ({error}); copy it again.") from error


def _state(found: Any, path: Path) -> dict[str, Tensor]:
    named = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not named or not all(isinstance(value, Tensor) for value in found.values()):
        raise BadInput(f"{path} holds no state dict: tensors by name are read, and nothing else.")
    return found


class _Program:
    """What `data.pkl` says, instruction by instruction."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        self.archive = archive
        self.path = path
        programs = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise BadInput(f"{path} is a zip archive, but not one of torch.save: it has no data.pkl.")
        self.root = programs[0].removesuffix("data.pkl")
        order = self.root + "byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise BadInput(f"{path} was written on a big-endian machine; save it again on another.")
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Tensor] = {}

    def run(self) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(self.archive.read(self.root + "data.pkl")):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{self.path} is damaged ({error}); copy it again.") from error
        raise BadInput(f"{self.path} is damaged: its data.pkl does not end; copy it again.")

    def step(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO":
                pass
            case "GLOBAL":
                if argument not in _ALLOWED:
                    raise BadInput(
                        f"{self.path} holds {argument.replace(' ', '.')}; of a .pt file tensors by name are read, and "
                        "nothing else is unpickled. Save it as safetensors."
                    )
                self.stack.append(argument)
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "NONE":
                self.stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                self.stack.append(name == "NEWTRUE")
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                self.stack.append(argument)
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                self.stack.append(tuple(self.from_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(name[-1])
                self.stack[-n:] = [tuple(self.stack[-n:])]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "SETITEM":
                key, value = self.stack.pop(-2), self.stack.pop()
                self.stack[-1][key] = value
            case "SETITEMS":
                items = self.from_mark()
                self.stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BUILD":
                self.stack.pop()  # versions of modules, which a state dict carries as an attribute
            case "BINPERSID":
                self.stack.append(self.storage(*self.stack.pop()))
            case "REDUCE":
                arguments = self.stack.pop()
                self.stack.append(self.made(self.stack.pop(), arguments))
            case _:
                raise BadInput(
                    f"{self.path} holds more than tensors by name ({name} in data.pkl); nothing is unpickled."
                )

    def from_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def storage(self, tag: str, kind: str, key: str, location: str, size: int) -> Tensor:
        """The numbers of `data/<key>`, flat."""
        if tag != "storage" or kind not in _STORAGES:
            raise BadInput(f"{self.path} is damaged: {tag!r} {kind!r} is no storage.")
        if key not in self.storages:
            entry = self.archive.getinfo(f"{self.root}data/{key}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise BadInput(f"{self.path} is a compressed archive, which torch.save does not write.")
            numbers = bytearray(self.archive.read(entry))
            dtype = _STORAGES[kind]
            flat = torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
            if len(flat) != size:
                raise BadInput(f"{self.path} is truncated: data/{key} has {len(flat)} numbers of {size}.")
            self.storages[key] = flat
        return self.storages[key]

    def made(self, what: str, arguments: tuple[Any, ...]) -> Any:
        if what == _ORDERED and not arguments:
            return {}
        if what == _TENSOR:
            flat, offset, shape, stride, *_ = arguments
            return torch.as_strided(flat, shape, stride, offset)
        if what == _PARAMETER:
            return arguments[0]
        raise BadInput(f"{self.path} is damaged: {what!r} is not made of {len(arguments)} arguments.")
