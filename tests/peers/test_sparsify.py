"""Dictionaries of sparsify and dictionary_learning against their own code, in an environment of its own.

scripts/peers.sh
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitbench import dictionaries
from tests.peers.sparsify_side import LEARNED, SPARSIFY, D

PYTHON = os.environ.get("SPARSIFY_PYTHON")
SIDE = Path(__file__).with_name("sparsify_side.py")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PYTHON is None, reason="SPARSIFY_PYTHON names no Python that has sparsify"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sparsify")
    save_file({"x": torch.randn(64, D, generator=torch.Generator().manual_seed(2))}, root / "x.safetensors")
    assert PYTHON is not None
    subprocess.run([PYTHON, str(SIDE), str(root)], check=True)
    return root


@pytest.mark.parametrize("name", [*SPARSIFY, *LEARNED])
def test_we_encode_as_they_do(folder: Path, name: str) -> None:
    theirs = load_file(folder / "answers" / f"{name}.safetensors")
    x = load_file(folder / "x.safetensors")["x"]
    dictionary = dictionaries.load_dictionary(folder / "theirs" / name)
    with torch.no_grad():
        ours = {"features": dictionary.encode(x), "out": dictionary(x)}
    off = {key: ((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()).item() for key in ours}
    print(f"{name}: features off by {off['features']:.1e}, reconstruction by {off['out']:.1e}")
    assert max(off.values()) <= 1e-6, off
    assert torch.equal(ours["features"] > 0, theirs["features"] > 0)
    assert 0 < (theirs["features"] > 0).double().mean() < 1
