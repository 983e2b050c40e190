"""The fixture `ndif_server`: the test server, in a process and an environment of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from nnsight.modeling.huggingface import _ID_CACHE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SERVER = Path(__file__).with_name("server.py")


class NdifServer:
    """A running test server: pass `url` as `remote=`.

    Attributes:
        log: the file its warnings and errors go to.
    """

    def __init__(self, python: Path, log: Path) -> None:
        self.python, self.log = python, log
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [self.python, "-Es", SERVER]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self._url = ""

    @property
    def url(self) -> str:
        """Where it listens, once it does; another address after a restart."""
        self._url = self._url or self.process.stdout.readline().decode().strip()
        if not self._url:
            pytest.fail(f"the test server did not start: {self.log.read_text()}")
        return self._url

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    @contextlib.contextmanager
    def misbehaving(self, **how: Any) -> Iterator[None]:
        """Fail inside the block as `server.Misbehaviour` describes; a server that died is replaced after it."""
        httpx.post(f"{self.url}/misbehave", json=how).raise_for_status()
        try:
            yield
        finally:
            if how.get("die"):
                self.stop()
                self.start()
            else:
                httpx.post(f"{self.url}/misbehave", json={}).raise_for_status()


def make_environment(folder: Path) -> Path:
    """A virtual environment with everything installed here except editable packages; returns its Python.

    One `.pth` line adds the packages of this environment. Python does not process the `.pth` files found along such a
    line, so what an editable install adds (circuitbench) stays unknown.
    """
    packages = Path(sysconfig.get_path("purelib"))
    if (packages / "circuitbench").exists():
        pytest.fail(f"{packages} holds a copy of circuitbench, which the test server must not see: `pip install -e .`")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    target = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True).stdout.strip()
    Path(target, "shared.pth").write_text(f"{packages}\n")
    return python


@pytest.fixture(scope="session")
def ndif_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NdifServer]:
    """The test server, one for the whole session."""
    folder = tmp_path_factory.mktemp("ndif")
    server = NdifServer(make_environment(folder / "venv"), folder / "server.log")
    yield server
    server.stop()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, 256 in all, and `<eos>` as number 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )


def save_for_server(model: PreTrainedModel, folder: Path) -> str:
    """Save a model (with a vocabulary of at least 257) and a byte tokenizer where the server can load them.

    Returns:
        The folder, for `load_model` or `TransformersModel`; the server finds the same weights under that name.
    """
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    _ID_CACHE[str(folder)] = str(folder)  # nnsight asks the Hub for the spelling of a name, except when it knows it
    return str(folder)
