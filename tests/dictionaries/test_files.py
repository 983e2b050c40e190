"""Dictionaries on disk: what is saved comes back, in SAELens' layout, and what is damaged says so."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitbench import dictionaries
from circuitbench.dictionaries import files
from circuitbench.errors import BadInput
from tests.dictionaries.examples import CASES, FORMS, example


@pytest.fixture
def dictionary() -> dictionaries.Dictionary:
    return example("topk")


def same(found: dictionaries.Dictionary, expected: dictionaries.Dictionary) -> None:
    """Kind, settings, what goes in and out, every number, and what it does."""
    assert type(found) is type(expected) and found.settings == expected.settings
    assert (found.transcodes, found.blocks) == (expected.transcodes, expected.blocks)
    assert (found.site, found.site_out, found.model_name) == (expected.site, expected.site_out, expected.model_name)
    assert found.metadata == expected.metadata
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(found.state_dict()[name], tensor), name
    x = torch.randn(9, expected.d_in, dtype=expected.W_enc.dtype)
    assert torch.equal(found.encode(x), expected.encode(x))
    assert torch.equal(found(x), expected(x))


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_a_saved_dictionary_comes_back_to_the_last_bit(kind: str, form: str, tmp_path: Path) -> None:
    expected = example(kind, **FORMS[form])
    expected.save(tmp_path / "new" / "folder")
    same(dictionaries.load_dictionary(tmp_path / "new" / "folder"), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_every_dtype(dictionary: dictionaries.Dictionary, dtype: torch.dtype, tmp_path: Path) -> None:
    dictionary.to(dtype).save(tmp_path)
    same(dictionaries.load_dictionary(str(tmp_path)), dictionary)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_can_be_stored_smaller_than_they_compute(tmp_path: Path, dtype: torch.dtype) -> None:
    """What comes back is rounded once and computes in float32; thresholds are not rounded."""
    expected = example("batchtopk")
    files.save(expected, tmp_path, dtype=dtype)
    found = dictionaries.load_dictionary(tmp_path)
    assert torch.equal(found.threshold, expected.threshold)
    for name, parameter in expected.named_parameters():
        assert dict(found.named_parameters())[name].dtype == torch.float32
        assert torch.equal(dict(found.named_parameters())[name], parameter.to(dtype).float())
    with torch.no_grad():
        expected.W_dec[0, 0] = 1e5
    if dtype == torch.float16:
        with pytest.raises(BadInput, match="W_dec has values that are not finite in torch.float16"):
            files.save(expected, tmp_path, dtype=dtype)


def test_weights_and_description_of_two_saves_are_not_taken_for_one(tmp_path: Path) -> None:
    """As they would lie there after a kill between the two files."""
    example("topk", seed=1).save(tmp_path)
    described = (tmp_path / "cfg.json").read_text()
    example("topk", seed=2).save(tmp_path)
    (tmp_path / "cfg.json").write_text(described)
    with pytest.raises(BadInput, match="the cfg.json of one dictionary and the weights of another"):
        dictionaries.load_dictionary(tmp_path)


def test_metadata_is_json(dictionary: dictionaries.Dictionary, tmp_path: Path) -> None:
    dictionary.metadata = {"text": object()}
    with pytest.raises(BadInput, match="metadata of a dictionary is saved as JSON"):
        dictionary.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_layout_is_that_of_saelens(dictionary: dictionaries.Dictionary, tmp_path: Path) -> None:
    """Names, orientation and options as SAELens reads them: relu(topk((x − b_dec) @ W_enc + b_enc)) @ W_dec + b_dec."""
    dictionary.save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert {key: config[key] for key in ("architecture", "d_in", "d_sae", "k", "dtype")} == {
        "architecture": "topk", "d_in": 6, "d_sae": 20, "k": 3, "dtype": "float32",
    }  # fmt: skip
    assert config["metadata"]["hook_name"] == "layers.3.ssm.gated"
    saved = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in saved.items()} == {
        "W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,),
    }  # fmt: skip
    x = torch.randn(9, 6)
    pre = (x - saved["b_dec"]) @ saved["W_enc"] + saved["b_enc"]
    top = pre.topk(3)
    code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(dictionary(x), code @ saved["W_dec"] + saved["b_dec"])


def test_options_of_saelens_are_folded_into_the_weights(dictionary: dictionaries.Dictionary, tmp_path: Path) -> None:
    """A file with free decoder norms, and one whose encoder does not subtract b_dec, reconstruct as SAELens would."""
    dictionary.save(tmp_path)
    path = tmp_path / "cfg.json"
    config = json.loads(path.read_text())
    weights = load_file(tmp_path / "sae_weights.safetensors")
    x = torch.randn(50, 6)

    path.write_text(json.dumps(config | {"rescale_acts_by_decoder_norm": True}))
    norms = weights["W_dec"].norm(dim=1)
    scaled = ((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]) * norms
    top = scaled.topk(3)
    code = torch.zeros_like(scaled).scatter(1, top.indices, top.values.relu())
    loaded = dictionaries.load_dictionary(tmp_path)
    torch.testing.assert_close(loaded.encode(x), code)
    torch.testing.assert_close(loaded(x), (code / norms) @ weights["W_dec"] + weights["b_dec"])

    path.write_text(json.dumps(config | {"apply_b_dec_to_input": False}))
    pre = x @ weights["W_enc"] + weights["b_enc"]
    top = pre.topk(3)
    code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(dictionaries.load_dictionary(tmp_path).encode(x), code)


def test_saving_replaces_what_was_there_and_leaves_nothing_else(
    dictionary: dictionaries.Dictionary, tmp_path: Path
) -> None:
    dictionary.save(tmp_path)
    with torch.no_grad():
        dictionary.b_enc += 1
    dictionary.save(tmp_path)
    assert torch.equal(dictionaries.load_dictionary(tmp_path).b_enc, dictionary.b_enc)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def rewrite(folder: Path, **changed: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def damage(folder: Path, what: str) -> None:
    config, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    tensors = load_file(weights)
    record = json.loads(config.read_text())["metadata"]
    match what:
        case "no folder":
            for path in (config, weights):
                path.unlink()
            folder.rmdir()
        case "a file":
            damage(folder, "no folder")
            folder.write_text("")
        case "no config":
            config.unlink()
        case "config not JSON":
            config.write_text("{")
        case "config no object":
            config.write_text("[1]")
        case "metadata no object":
            rewrite(folder, metadata=[1])
        case "unknown kind":
            rewrite(folder, architecture="relu6", metadata={})
        case "of sequences":
            rewrite(folder, architecture="temporal", metadata={})
        case "another number of rounds":
            example("matching_pursuit").save(folder)
            rewrite(folder, max_iterations=4)
        case "no kind":
            rewrite(folder, architecture=None)
        case "another kind than recorded":
            rewrite(folder, architecture="jumprelu")
        case "no k":
            record["circuitbench"]["settings"] = {}
            rewrite(folder, metadata=record)
        case "another k than recorded":
            rewrite(folder, k=4)
        case "k too large":
            record["circuitbench"]["settings"] = {"k": 21}
            rewrite(folder, k=21, metadata=record)
        case "no size":
            rewrite(folder, d_in=None)
        case "other sizes":
            rewrite(folder, d_sae=21)
        case "normalized activations":
            rewrite(folder, normalize_activations="layer_norm")
        case "an unknown scale":
            rewrite(folder, normalize_activations="expected_average_only_in")
        case "an unknown dtype":
            rewrite(folder, dtype="int8")
        case "no weights":
            weights.unlink()
            (folder / "sae_weights.pt").write_bytes(b"\x80\x04.")
        case "truncated in the header":
            weights.write_bytes(weights.read_bytes()[:20])
        case "truncated in the data":
            weights.write_bytes(weights.read_bytes()[:-4])
        case "a pickle":
            weights.write_bytes(b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.")
        case "a tensor missing":
            save_file({name: t for name, t in tensors.items() if name != "b_enc"}, weights)
        case "a tensor too many":
            save_file(tensors | {"threshold": torch.ones(20)}, weights)
        case "a wrong shape":
            save_file(tensors | {"W_dec": torch.ones(20, 5)}, weights)
        case "whole numbers":
            save_file(tensors | {"W_dec": torch.ones(20, 6, dtype=torch.int64)}, weights)
        case "not a number":
            save_file(tensors | {"b_dec": torch.tensor([0.0, 1, 2, torch.nan, 4, 5])}, weights)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no folder", "is not a folder; give the one that holds cfg.json"),
        ("a file", "is not a folder; give the one that holds cfg.json"),
        ("no config", "cfg.json is missing"),
        ("config not JSON", "not valid JSON"),
        ("config no object", "holds a JSON list; a dictionary is described by an object"),
        ("metadata no object", "metadata that are no object"),
        ("unknown kind", "says architecture 'relu6'; of SAELens' architectures these can be read: 'abstopk', 'gat"),
        ("of sequences", "says architecture 'temporal': its code of a token depends on the tokens before it"),
        ("another number of rounds", "says max_iterations = 4, and records 5; one of them was changed"),
        ("no kind", "says architecture None"),
        ("another kind than recorded", "records kind 'topk', which is saved as 'topk'; one of them was changed"),
        ("no k", "it has the settings none, and must have k"),
        ("another k than recorded", "says k = 4, and records 3"),
        ("k too large", "does not describe a 'topk' dictionary: k=21 was given"),
        ("no size", "says d_in = None; it must be a whole number"),
        ("other sizes", r"holds W_enc with shape \(6, 20\); the sizes beside it ask for \(6, 21\)"),
        ("normalized activations", "asks for normalize_activations='layer_norm'"),
        ("an unknown scale", "without saying by which factor"),
        ("an unknown dtype", "says dtype = 'int8'; known are float64, float32"),
        ("no weights", "weights are read from safetensors only, never from a pickle"),
        ("truncated in the header", "truncated or not a safetensors file"),
        ("truncated in the data", "truncated or not a safetensors file"),
        ("a pickle", "truncated or not a safetensors file"),
        (
            "a tensor missing",
            "holds the tensors W_dec, W_enc, b_dec; a 'topk' dictionary has W_dec, W_enc, b_dec, b_enc",
        ),
        ("a tensor too many", "threshold"),
        ("a wrong shape", r"holds W_dec with shape \(20, 5\)"),
        ("whole numbers", "holds W_dec in torch.int64"),
        ("not a number", "holds b_dec with values that are not finite"),
    ],
)
def test_damaged_files_say_what_is_wrong(
    dictionary: dictionaries.Dictionary, tmp_path: Path, what: str, message: str
) -> None:
    folder = tmp_path / "sae"
    dictionary.save(folder)
    damage(folder, what)
    with pytest.raises(BadInput, match=message):
        dictionaries.load_dictionary(folder)


def test_a_dictionary_is_not_saved_as_a_file_or_with_numbers_that_are_none(
    dictionary: dictionaries.Dictionary, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file; a dictionary is saved as a folder"):
        dictionary.save(tmp_path / "file")
    with torch.no_grad():
        dictionary.b_enc[3] = torch.nan
    with pytest.raises(BadInput, match="b_enc has values that are not finite"):
        dictionary.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_building_refuses_what_does_not_fit() -> None:
    with pytest.raises(BadInput, match="kind='relu' is not a kind of dictionary; there are: 'abstopk', 'batchtopk'"):
        dictionaries.build("relu", d_in=4, d_dict=8)
    with pytest.raises(BadInput, match="takes the settings k; given: none"):
        dictionaries.build("topk", d_in=4, d_dict=8)
    with pytest.raises(BadInput, match="takes the settings k; given: k, l1"):
        dictionaries.build("topk", d_in=4, d_dict=8, k=2, l1=0.1)
    with pytest.raises(BadInput, match="d_in=0, d_dict=8"):
        dictionaries.build("topk", d_in=0, d_dict=8, k=2)
    with pytest.raises(BadInput, match="needs a floating-point one"):
        dictionaries.build("topk", d_in=4, d_dict=8, k=2, dtype=torch.int64)
    with pytest.raises(BadInput, match=r"W_dec has shape \(7, 4\)"):
        # Without the tests' own shape check, which would speak first; users have none.
        inspect.unwrap(dictionaries.from_weights)("topk", W_enc=torch.ones(4, 8), W_dec=torch.ones(7, 4), k=2)


def test_wrong_activations_are_refused(dictionary: dictionaries.Dictionary) -> None:
    with pytest.raises(BadInput, match=r"x has shape \(2, 5\); the last axis must be d_in = 6"):
        dictionary.encode(torch.ones(2, 5))
    with pytest.raises(BadInput, match="torch.int64; a dictionary encodes floating-point"):
        inspect.unwrap(dictionaries.TopK.encode)(dictionary, torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(BadInput, match="the last axis must be d_dict = 20"):
        dictionary.decode(torch.ones(2, 6))


def test_a_reconstruction_has_the_dtype_of_its_input(dictionary: dictionaries.Dictionary) -> None:
    x = torch.randn(2, 3, 6, dtype=torch.bfloat16)
    assert dictionary(x).dtype == torch.bfloat16
    torch.testing.assert_close(dictionary(x).float(), dictionary(x.float()), rtol=1e-2, atol=1e-2)


def test_initial_directions_are_tied_of_length_one_and_not_those_of_plain_randn() -> None:
    built = dictionaries.build("topk", d_in=16, d_dict=64, k=2, seed=0)
    torch.testing.assert_close(built.W_dec.norm(dim=1), torch.ones(64))
    assert torch.equal(built.W_enc.T, built.W_dec)
    plain = torch.nn.functional.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    assert (built.W_dec @ plain.T).amax() < 0.999, (
        "synthetic truth drawn with the same seed must not be found at the start"
    )
