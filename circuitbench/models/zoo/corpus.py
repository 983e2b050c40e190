"""Real text that every machine with Python already has: the standard library's sources and documentation.

The text is a function of the Python version alone. It consists of

- the sources of the standard library, without its tests, the character maps in `encodings` and anything installed
  later;
- the language reference behind `help()` (`pydoc_data.topics`), one document a topic;
- the docstrings of the modules written in C, one document a module.

Whether a document is held out depends on the SHA-256 of its name and on nothing else, so a document that was held out
when a model was trained is held out under every Python version: the text of a name may change a little, its side of
the split never.

The text is Copyright (c) Python Software Foundation and is licensed under the PSF License Version 2 (PSF-2.0).
"""

from __future__ import annotations

import ast  # noqa: F401  (importing it rewrites docstrings of `_ast`: better always before they are read)
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import pathlib
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

HELD_OUT_EVERY = 20
"""One document in this many is held out."""

_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__", "lib-dynload"),  # not the standard library's own sources
    *("encodings", "pydoc_data"),  # tables, and the topics that are documents of their own
    *("test", "tests", "idle_test"),
}
_NOT_IMPORTED = {"antigravity", "this", "__main__"}  # importing these opens a browser, prints, or means ourselves
_SHORTEST = 200  # characters: shorter documents (empty `__init__.py` files) teach nothing


class Document(NamedTuple):
    """One piece of text and the name that decides its side of the split."""

    name: str
    text: str


def documents() -> Iterator[Document]:
    """Yields every document of the running Python: sources, topics, docstrings of C modules, each sorted by name."""
    yield from _sources()
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield Document(f"topics/{topic}", topics[topic].strip() + "\n")
    # In an interpreter of its own, for packages change what is built in: nnsight, say, gives `object` a method.
    command = [sys.executable, "-I", __file__]
    docstrings = json.loads(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout)
    yield from (Document(*document) for document in docstrings)


def is_held_out(name: str) -> bool:
    """Whether the document of this name is kept from training."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % HELD_OUT_EVERY == 0


def split() -> tuple[list[Document], list[Document]]:
    """Returns the documents to train on and the documents held out."""
    train, held_out = [], []
    for document in documents():
        (held_out if is_held_out(document.name) else train).append(document)
    return train, held_out


def _sources() -> Iterator[Document]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    seen = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(name.parts) or any(part.startswith("config-") for part in name.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:  # a handful of files in older encodings
            continue
        if len(text) >= _SHORTEST and text not in seen:
            seen.add(text)
            yield Document(str(name), text)


def _docstrings() -> Iterator[Document]:
    seen: set[str] = set()
    for name in sorted(sys.stdlib_module_names - _NOT_IMPORTED):
        if name.startswith(("_test", "_xx")):
            continue
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        if spec.origin != "built-in" and not isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # listed for every platform, present on some
            continue
        text = "\n".join(_entries(name, module, seen))
        if len(text) > _SHORTEST:
            yield Document(f"docs/{name}", text)


def _entries(name: str, module: ModuleType, seen: set[str]) -> Iterator[str]:
    """Yields 'qualified name, newline, indented docstring' for a module, its members and the methods of its classes."""
    found = [(name, module.__doc__)]
    for attribute, value in sorted(vars(module).items()):
        if attribute in ("__loader__", "__spec__"):  # the import system's, not the module's
            continue
        if type(value) in (int, str, float, bytes, tuple, dict, list):  # their docstring is their type's
            continue
        found.append((f"{name}.{attribute}", getattr(value, "__doc__", None)))
        if isinstance(value, type):
            members = sorted(vars(value).items())
            found += [(f"{name}.{attribute}.{k}", getattr(v, "__doc__", None)) for k, v in members if k[:2] != "__"]
    for qualified, text in found:
        if isinstance(text, str) and len(text) > 20 and text not in seen:
            seen.add(text)
            yield f"{qualified}\n    {text.strip()}\n"


if __name__ == "__main__":  # the interpreter that `documents` starts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # modules on their way out warn when imported
        json.dump(list(_docstrings()), sys.stdout)
