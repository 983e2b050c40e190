"""Dictionaries on disk: what is saved comes back, in SAELens' layout, and what is damaged says so."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitbench import dictionaries
from circuitbench.errors import BadInput


@pytest.fixture
def dictionary() -> dictionaries.Dictionary:
    built = dictionaries.build("topk", d_in=6, d_dict=20, k=3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += torch.randn_like(parameter)
    built.site, built.model_name = "layers.3.ssm.gated", "zoo:pylm-hybrid"
    return built


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_dictionary_comes_back_to_the_last_bit(
    dictionary: dictionaries.Dictionary, dtype: torch.dtype, tmp_path: Path
) -> None:
    dictionary = dictionary.to(dtype)
    dictionary.save(tmp_path / "new" / "folder")
    loaded = dictionaries.load_dictionary(tmp_path / "new" / "folder")
    assert type(loaded) is type(dictionary) and loaded.settings == {"k": 3}
    assert (loaded.site, loaded.model_name) == ("layers.3.ssm.gated", "zoo:pylm-hybrid")
    for name, parameter in dictionary.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter), name
    x = torch.randn(9, 6, dtype=dtype)
    assert torch.equal(loaded.encode(x), dictionary.encode(x))
    assert torch.equal(loaded(x), dictionary(x))


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


def damage(folder: Path, what: str) -> None:
    config, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    tensors = load_file(weights)
    match what:
        case "no folder":
            for path in (config, weights):
                path.unlink()
            folder.rmdir()
        case "no config":
            config.unlink()
        case "config not JSON":
            config.write_text("{")
        case "unknown kind":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"architecture": "temporal"}))
        case "no k":
            config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "k"}))
        case "other sizes":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"d_sae": 21}))
        case "normalized activations":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"normalize_activations": "layer_norm"}))
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


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no folder", "is not a folder; give the one that holds cfg.json"),
        ("no config", "cfg.json is missing"),
        ("config not JSON", "not valid JSON"),
        ("unknown kind", "says architecture 'temporal'; the kinds known here are: 'topk'"),
        ("no k", "does not describe a 'topk' dictionary: KeyError\\('k'\\)"),
        ("other sizes", r"holds W_enc with shape \(6, 20\); the sizes in cfg.json ask for \(6, 21\)"),
        ("normalized activations", "asks for normalize_activations='layer_norm'"),
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


def test_building_refuses_what_does_not_fit() -> None:
    with pytest.raises(BadInput, match="kind='relu' is not a kind of dictionary; there are: 'topk'"):
        dictionaries.build("relu", d_in=4, d_dict=8)
    with pytest.raises(BadInput, match="takes the settings k; given: none"):
        dictionaries.build("topk", d_in=4, d_dict=8)
    with pytest.raises(BadInput, match="takes the settings k; given: k, l1"):
        dictionaries.build("topk", d_in=4, d_dict=8, k=2, l1=0.1)
    with pytest.raises(BadInput, match="d_in=0 and d_dict=8"):
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
