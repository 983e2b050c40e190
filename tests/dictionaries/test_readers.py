"""Dictionaries that other projects saved: they encode as those projects' formulas say, and nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries.base import KINDS
from circuitbench.dictionaries.formats import torch_zip
from circuitbench.errors import BadInput

D, L, K = 6, 20, 3


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W_ENC, B_ENC, W_DEC, B_DEC = random(L, D, seed=1), random(L, seed=2), random(L, D, seed=3), random(D, seed=4)
W_SKIP, GATE, MAG, R = random(D, D, seed=5), random(L, seed=6), random(L, seed=7), random(L, seed=8)
THRESHOLD = random(L, seed=9).abs()
X = random(50, D, seed=10)


def top(pre: Tensor) -> Tensor:
    kept = pre.relu().topk(K)
    return torch.zeros_like(pre).scatter(1, kept.indices, kept.values)


# ---- SAELens: options that its files may ask for


def saelens(folder: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    config = {"d_in": D, "d_sae": L, "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.mlp"}} | config
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "sae_weights.safetensors")
    return folder


PLAIN = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}


def test_norms_of_decoder_rows_are_folded(tmp_path: Path) -> None:
    found = dictionaries.load_dictionary(
        saelens(tmp_path, PLAIN, architecture="topk", k=K, rescale_acts_by_decoder_norm=True)
    )
    norms = W_DEC.norm(dim=1)
    features = top(((X - B_DEC) @ W_ENC.T + B_ENC) * norms)
    torch.testing.assert_close(found.encode(X), features)
    torch.testing.assert_close(found(X), (features / norms) @ W_DEC + B_DEC)
    assert found.site is None and found.metadata["saelens"]["hook_name"] == "blocks.0.mlp"


def test_a_bias_that_is_not_subtracted_is_folded(tmp_path: Path) -> None:
    found = dictionaries.load_dictionary(saelens(tmp_path, PLAIN, architecture="topk", k=K, apply_b_dec_to_input=False))
    torch.testing.assert_close(found.encode(X), top(X @ W_ENC.T + B_ENC))


def test_the_scale_beside_a_checkpoint_is_folded(tmp_path: Path) -> None:
    """As SAELens folds it when training ends: encoder times scale, decoder and its bias divided."""
    folder = saelens(tmp_path, PLAIN, architecture="topk", k=K, normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.5}))
    found = dictionaries.load_dictionary(folder)
    features = top((2.5 * X - B_DEC) @ W_ENC.T + B_ENC)
    torch.testing.assert_close(found.encode(X), features)
    torch.testing.assert_close(found(X), (features @ W_DEC + B_DEC) / 2.5)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": None}))
    with pytest.raises(BadInput, match="scaling_factor = None; it must be a number above 0"):
        dictionaries.load_dictionary(folder)


def test_files_of_before_version_6(tmp_path: Path) -> None:
    folder = saelens(
        tmp_path,
        PLAIN,
        metadata={},
        activation_fn_str="topk",
        activation_fn_kwargs={"k": K},
        hook_point="blocks.3.hook_resid_pre",
        normalize_activations=False,
    )
    found = dictionaries.load_dictionary(folder)
    torch.testing.assert_close(found.encode(X), top((X - B_DEC) @ W_ENC.T + B_ENC))
    assert found.metadata["saelens"]["hook_name"] == "blocks.3.hook_resid_pre"
    saelens(folder, PLAIN, metadata={}, activation_fn_str="tanh-relu")
    with pytest.raises(BadInput, match="asks for activation_fn='tanh-relu'"):
        dictionaries.load_dictionary(folder)


def test_a_transcoder_that_subtracts_is_refused(tmp_path: Path) -> None:
    folder = saelens(tmp_path, PLAIN, architecture="transcoder", d_out=D)
    with pytest.raises(BadInput, match="apply_b_dec_to_input=True of a transcoder"):
        dictionaries.load_dictionary(folder)


# ---- sparsify


def sparsify(folder: Path, *, skip: bool = False, **config: Any) -> Path:
    config = {"d_in": D, "num_latents": L, "expansion_factor": 32, "k": K, "skip_connection": skip} | config
    (folder / "cfg.json").write_text(json.dumps(config))
    weights = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    save_file(weights | ({"W_skip": W_SKIP} if skip else {}), folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify(tmp_path: Path, transcode: bool, skip: bool) -> None:
    found = dictionaries.load_dictionary(sparsify(tmp_path, skip=skip, transcode=transcode, activation="topk"))
    features = top((X if transcode else X - B_DEC) @ W_ENC.T + B_ENC)
    torch.testing.assert_close(found.encode(X), features)
    torch.testing.assert_close(found(X), features @ W_DEC + B_DEC + (X @ W_SKIP.T if skip else 0))
    assert found.kind == "topk" and found.settings == {"k": K} and found.site is None
    assert found.metadata["sparsify"]["transcode"] is transcode


def test_sparsify_refused(tmp_path: Path) -> None:
    sparsify(tmp_path, activation="groupmax")
    with pytest.raises(BadInput, match="activation='groupmax'; read is activation='topk'"):
        dictionaries.load_dictionary(tmp_path)
    sparsify(tmp_path, num_latents=0, expansion_factor=3)
    with pytest.raises(BadInput, match=r"encoder.weight with shape \(20, 6\); the sizes beside it ask for \(18, 6\)"):
        dictionaries.load_dictionary(tmp_path)
    sparsify(tmp_path, skip_connection=True)
    with pytest.raises(BadInput, match="a sparsify dictionary has W_dec, W_skip"):
        dictionaries.load_dictionary(tmp_path)


# ---- dictionary_learning

LINEAR = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
OWN = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
BUFFERS = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.5)}
PRE, PRE_UNCENTRED = (X - B_DEC) @ W_ENC.T, X @ W_ENC.T
THEIRS: dict[str, tuple[str, dict[str, Tensor], Tensor]] = {
    "AutoEncoder": ("standard", LINEAR | {"bias": B_DEC}, (PRE + B_ENC).relu()),
    "AutoEncoderNew": ("standard", LINEAR | {"decoder.bias": B_DEC}, (PRE_UNCENTRED + B_ENC).relu()),
    "GatedAutoEncoder": (
        "gated",
        {"encoder.weight": W_ENC, "decoder.weight": W_DEC.T, "decoder_bias": B_DEC}
        | {"gate_bias": GATE, "mag_bias": MAG, "r_mag": R},
        (PRE + GATE > 0) * (R.exp() * PRE + MAG).relu(),
    ),
    "AutoEncoderTopK": ("topk", LINEAR | BUFFERS | {"b_dec": B_DEC}, top(PRE + B_ENC)),
    "BatchTopKSAE": (
        "batchtopk",
        LINEAR | BUFFERS | {"b_dec": B_DEC},
        (PRE + B_ENC).relu() * ((PRE + B_ENC).relu() > 0.5),
    ),
    "MatryoshkaBatchTopKSAE": (
        "matryoshka",
        OWN | BUFFERS | {"group_sizes": torch.tensor([5, 15])},
        (PRE + B_ENC).relu() * ((PRE + B_ENC).relu() > 0.5),
    ),
    "JumpReluAutoEncoder": (
        "jumprelu",
        OWN | {"threshold": THRESHOLD},
        (PRE_UNCENTRED + B_ENC).relu() * (PRE_UNCENTRED + B_ENC > THRESHOLD),
    ),
}


def learned(folder: Path, name: str, weights: Any, **trainer: Any) -> Path:
    config = {"trainer": {"dict_class": name, "k": K, "lm_name": "EleutherAI/pythia-70m"} | trainer, "buffer": {}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("name", [name for name, (kind, *_) in THEIRS.items() if kind in KINDS])
def test_dictionary_learning(tmp_path: Path, name: str) -> None:
    kind, weights, features = THEIRS[name]
    found = dictionaries.load_dictionary(learned(tmp_path, name, weights))
    torch.testing.assert_close(found.encode(X), features)
    torch.testing.assert_close(found(X), features @ W_DEC + B_DEC)
    assert found.kind == kind and found.model_name == "EleutherAI/pythia-70m" and found.site is None
    if kind == "matryoshka":
        assert found.settings == {"k": K, "prefixes": (5, 20)}


@pytest.mark.parametrize(
    ("name", "changed", "trainer", "message"),
    [
        ("CrossCoder", {}, {}, "dict_class 'CrossCoder'; of dictionary_learning's these can be read: AutoEncoder, "),
        ("AutoEncoderTopK", {"b_dec": None}, {}, "a AutoEncoderTopK has b_dec, decoder.weight"),
        ("AutoEncoderTopK", {}, {"k": 4}, "says k = 4, and ae.pt 3"),
        ("AutoEncoderTopK", {"decoder.weight": W_DEC}, {}, r"W_dec with shape \(6, 20\)"),
        ("BatchTopKSAE", {"threshold": None}, {}, "holds no threshold"),
        ("BatchTopKSAE", {"threshold": THRESHOLD}, {}, "it must be one number"),
        ("BatchTopKSAE", {"b_dec": B_DEC / 0}, {}, "values that are not finite"),
        ("AutoEncoderTopK", {"extra": B_DEC}, {}, "extra"),
    ],
)
def test_dictionary_learning_refused(
    tmp_path: Path, name: str, changed: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    weights = {n: t for n, t in (THEIRS.get(name, THEIRS["BatchTopKSAE"])[1] | changed).items() if t is not None}
    with pytest.raises(BadInput, match=message):
        dictionaries.load_dictionary(learned(tmp_path, name, weights, **trainer))


# ---- files of torch.save


def test_tensors_come_out_of_a_torch_file_as_torch_reads_them(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    saved = OrderedDict(
        plain=base,
        transposed=base.T,
        part=base[1:3, 2:5],
        shared=base,
        parameter=torch.nn.Parameter(base),
        half=base.half(),
        brain=base.bfloat16(),
        double=base.double(),
        whole=torch.tensor(7),
        flags=base > 3,
        empty=torch.empty(0, 6),
    )
    torch.save(saved, tmp_path / "a.pt")
    found, expected = torch_zip.read(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "b.pt")  # a dictionary with an attribute of its own
    assert torch_zip.read(tmp_path / "b.pt").keys() == {"weight", "bias"}


class Fired:
    """Unpickling one of these would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "fired")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """Not what a pickle asks to call, not what is merely another type, and not a pickle without the zip around it."""
    trap, path = tmp_path / "trap", tmp_path / "ae.pt"
    torch.save({"W_enc": W_ENC, "x": Fired(trap)}, path)
    with pytest.raises(BadInput, match="holds __builtin__.getattr; of a .pt file tensors by name are read"):
        torch_zip.read(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "it was a trap that works"
    for content in (Counter("a"), [W_ENC], {"k": 3}, W_ENC, {3: W_ENC}):
        torch.save(content, path)
        with pytest.raises(BadInput, match="holds collections.Counter|holds no state dict|holds more than tensors"):
            torch_zip.read(path)
    path.write_bytes(pickle.dumps({"W_enc": 1}))
    with pytest.raises(BadInput, match="truncated or not a file of torch.save"):
        torch_zip.read(path)


def test_damaged_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"
    torch.save(OWN, path)
    whole = path.read_bytes()
    with pytest.raises(BadInput, match="other.pt is missing"):
        torch_zip.read(tmp_path / "other.pt")
    for cut in range(0, len(whole), 397):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadInput, match="truncated"):
            torch_zip.read(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(entries)).split("/")[0]

    def repacked(**changed: Any) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (entries | {f"{root}/{k}": v for k, v in changed.items()}).items():
                if content is not None:
                    archive.writestr(name, content)

    program = entries[f"{root}/data.pkl"]
    for changed in (
        {"data/1": entries[f"{root}/data/1"][:-8]},  # fewer numbers than the program says
        {"data/1": None},
        {"data.pkl": program[:-1]},
        {"data.pkl": program[:40] + b"\x00" + program[41:]},
        {"data.pkl": None},
        {"byteorder": b"big"},
    ):
        repacked(**changed)
        with pytest.raises(BadInput, match="truncated|damaged|no data.pkl|big-endian|more than tensors"):
            torch_zip.read(path)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):  # a flipped byte of the program is an error or, in a name or a shape, another state dict
        place = int(torch.randint(len(program), (1,), generator=generator))
        flipped = bytes([program[place] ^ int(torch.randint(1, 256, (1,), generator=generator))])
        repacked(**{"data.pkl": program[:place] + flipped + program[place + 1 :]})
        with contextlib.suppress(BadInput):
            assert all(isinstance(tensor, Tensor) for tensor in torch_zip.read(path).values())
