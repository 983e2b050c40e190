"""The dictionaries in the package: names that load, errors that list, and what is shipped is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import circuitbench as cb
from circuitbench import dictionaries
from circuitbench.dictionaries import shelf
from circuitbench.errors import BadInput
from circuitbench.models import zoo
from tests.dictionaries.examples import example


@pytest.fixture
def shelved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dictionaries.Dictionary]:
    """A shelf with three dictionaries of two sites."""
    monkeypatch.setattr(shelf, "SHELF", tmp_path)
    made = {}
    for seed, name in enumerate(
        ["layers.2.ssm.gated/topk", "layers.2.ssm.gated/batchtopk", "layers.1.resid_post/topk"]
    ):
        made[f"zoo:tiny/{name}"] = dictionary = example(name.split("/")[1], seed=seed)
        dictionary.site, dictionary.model_name = name.split("/")[0], "zoo:tiny"
        dictionary.save(tmp_path / "tiny" / name, dtype=torch.float16)
    return made


def test_names_load(shelved: dict[str, dictionaries.Dictionary]) -> None:
    for name, expected in shelved.items():
        found = cb.load_dictionary(name)
        assert (found.kind, found.site, found.model_name) == (expected.kind, expected.site, "zoo:tiny")
        assert found.W_enc.dtype == torch.float32 and torch.equal(found.W_enc, expected.W_enc.half().float())
    only = cb.load_dictionary("zoo:tiny/layers.1.resid_post")
    assert torch.equal(only.W_enc, cb.load_dictionary("zoo:tiny/layers.1.resid_post/topk").W_enc)


def test_the_list_says_what_there_is(shelved: dict[str, dictionaries.Dictionary]) -> None:
    listed = {one.name: one for one in dictionaries.pretrained()}
    assert listed.keys() == shelved.keys()
    one = listed["zoo:tiny/layers.2.ssm.gated/topk"]
    assert (one.model_name, one.site, one.kind, one.settings) == ("zoo:tiny", "layers.2.ssm.gated", "topk", {"k": 3})
    assert (one.d_in, one.d_dict, one.evaluation) == (6, 20, {"fvu": 0.25, "l0": 3.0})
    assert str(one) == "zoo:tiny/layers.2.ssm.gated/topk: 6 to 20; fvu 0.25, l0 3"


@pytest.mark.usefixtures("shelved")
@pytest.mark.parametrize(
    "name", ["zoo:other", "zoo:tiny", "zoo:tiny/layers.2", "zoo:tiny/layers.2.ssm.gated/gated", "zoo:"]
)
def test_an_unknown_name_is_answered_with_the_list(name: str) -> None:
    with pytest.raises(BadInput, match="there are: zoo:tiny/layers.1.resid_post/topk, zoo:tiny/layers.2.ssm.gated/ba"):
        cb.load_dictionary(f"zoo:{name}")


@pytest.mark.usefixtures("shelved")
def test_a_site_with_several_dictionaries_needs_a_kind() -> None:
    with pytest.raises(BadInput, match="stands for several dictionaries; name one: zoo:tiny/layers.2.ssm.gated/batch"):
        cb.load_dictionary("zoo:tiny/layers.2.ssm.gated")
    with pytest.raises(BadInput, match="is not on the Hub, and has none"):
        cb.load_dictionary("zoo:tiny/layers.1.resid_post", revision="main")


def test_what_is_shipped_is_what_it_says() -> None:
    """Every dictionary loads, is of a model of the zoo, was measured, and all of them are small."""
    for one in dictionaries.pretrained():
        found = cb.load_dictionary(one.name)
        assert one.model_name.removeprefix("zoo:") in zoo.names()
        assert one.name == "/".join([one.model_name, one.site, found.kind])
        assert 0 < one.evaluation["fvu"] < 1 and 0 < one.evaluation["l0"] < found.d_dict
        assert one.evaluation["ce_spliced"] < one.evaluation["ce_ablated.mean"]
    assert sum(path.stat().st_size for path in shelf.SHELF.rglob("*") if path.is_file()) <= 8_000_000
