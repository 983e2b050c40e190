"""Dictionaries against SAELens itself, in an environment of its own: it cannot be installed beside us.

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
from circuitbench.errors import BadInput
from tests.peers.saelens_side import REFUSED, SAES, TRAINED

PYTHON = os.environ.get("SAELENS_PYTHON")
SIDE = Path(__file__).with_name("saelens_side.py")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PYTHON is None, reason="SAELENS_PYTHON names no Python that has sae-lens"),
]

D_IN, D_OUT, D_DICT = 32, 24, 128
SETTINGS = {
    "rank1": {"k": 8, "shape": (4, 8)},
    "topk": {"k": 8},
    "abstopk": {"k": 8},
    "matching_pursuit": {"max_iterations": 12},
    "batchtopk": {"k": 8},
    "matryoshka": {"k": 8, "prefixes": (32, 128)},
}
KINDS = ("standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka", "abstopk", "matching_pursuit")
TRANSCODERS = ("standard", "batchtopk", "jumprelu", "matryoshka")  # SAELens has no topk and no gated one
OURS = {
    **{kind: {} for kind in KINDS},
    **{f"{kind} transcoder": {"d_out": D_OUT} for kind in TRANSCODERS},
    **{f"{kind} skip transcoder": {"d_out": D_OUT, "skip": True} for kind in TRANSCODERS},
    "matryoshka crosscoder": {"blocks": {"layers.0.resid_post": 12, "layers.1.resid_post": 20}},
    "topk crosscoder": {"blocks": {"layers.0.resid_post": 12, "layers.1.resid_post": 20}},
}

ONLY_OURS = {"topk transcoder": {"d_out": D_OUT}, "abstopk transcoder": {"d_out": D_OUT}} | {
    "gated skip transcoder": {"d_out": D_OUT, "skip": True},
    "rank1": {},
}


def made(name: str) -> dictionaries.Dictionary:
    kind = name.split()[0]
    dictionary = dictionaries.build(
        kind, d_in=D_IN, d_dict=D_DICT, **(OURS | ONLY_OURS)[name], **SETTINGS.get(kind, {})
    )
    generator = torch.Generator().manual_seed(1)
    for key, tensor in dictionary.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(0.3 + 0.1 * noise if key == "threshold" else 0.3 * noise)
    if kind == "matching_pursuit":
        dictionary.normalize_decoder()
    dictionary.site, dictionary.model_name = "layers.2.ssm.gated", "zoo:pylm-hybrid"
    if dictionary.transcodes:
        dictionary.site_out = "layers.2.ssm.out"
    dictionary.metadata = {"evaluation": {"fvu": 0.25}, "text": "the standard library"}
    return dictionary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saelens")
    save_file({"x": torch.randn(64, D_IN, generator=torch.Generator().manual_seed(2))}, root / "x.safetensors")
    for name in OURS:
        made(name).save(root / "ours" / name)
    for name in ONLY_OURS:
        made(name).save(root / "only ours" / name)
    assert PYTHON is not None
    subprocess.run([PYTHON, str(SIDE), str(root)], check=True)
    return root


def compare(dictionary: dictionaries.Dictionary, root: Path, answer: str) -> None:
    theirs = load_file(root / "answers" / f"{answer}.safetensors")
    x = load_file(root / "x.safetensors")["x"]
    with torch.no_grad():
        ours = {"features": dictionary.encode(x), "out": dictionary(x)}
    off = {key: ((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()).item() for key in ours}
    print(f"{answer}: features off by {off['features']:.1e}, reconstruction by {off['out']:.1e}")
    assert max(off.values()) <= 1e-6, off
    assert torch.equal(ours["features"] != 0, theirs["features"] != 0)
    assert 0 < (theirs["features"] != 0).double().mean() < 1


@pytest.mark.parametrize("name", OURS)
def test_saelens_loads_what_we_save(folder: Path, name: str) -> None:
    compare(made(name), folder, f"ours/{name}")


@pytest.mark.parametrize("name", ONLY_OURS)
def test_saelens_refuses_by_name_what_it_has_no_architecture_for(folder: Path, name: str) -> None:
    error = (folder / f"{name}.error").read_text()
    print(error)
    assert f"circuitbench_{name.replace(' ', '_')}" in error
    found = dictionaries.load_dictionary(folder / "only ours" / name)
    assert all(torch.equal(tensor, made(name).state_dict()[key]) for key, tensor in found.state_dict().items())


@pytest.mark.parametrize("name", OURS)
def test_what_saelens_saves_again_is_still_ours(folder: Path, name: str) -> None:
    expected, found = made(name), dictionaries.load_dictionary(folder / "resaved" / name)
    assert type(found) is type(expected) and found.settings == expected.settings and found.blocks == expected.blocks
    assert (found.site, found.site_out, found.model_name) == (expected.site, expected.site_out, expected.model_name)
    assert found.metadata["evaluation"] == expected.metadata["evaluation"]
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", [*SAES, *(f"trained {name}" for name in TRAINED)])
def test_we_load_what_saelens_saves(folder: Path, name: str, tmp_path: Path) -> None:
    dictionary = dictionaries.load_dictionary(folder / "theirs" / name)
    compare(dictionary, folder, f"theirs/{name}")
    dictionary.save(tmp_path)
    compare(dictionaries.load_dictionary(tmp_path), folder, f"theirs/{name}")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_ours_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(BadInput, match="run it with SAELens|cannot be brought into the weights"):
        dictionaries.load_dictionary(folder / "theirs" / name)
