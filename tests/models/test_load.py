"""load_model: from a module in memory, a folder, a name, an original checkpoint, a map of one's own."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import circuitbench as cb
from circuitbench.architectures import ARCHITECTURES, registry
from circuitbench.architectures.blocks import attention, attention_part, mlp, mlp_part, resid_mid, resid_post, resid_pre
from circuitbench.models import kernels
from circuitbench.models.random import random_model
from tests.architectures.cases import FAMILIES, TWINS, plain, prompts

IDS = torch.tensor(prompts(9))


def logits(model: cb.Model) -> torch.Tensor:
    with torch.no_grad():
        with model.trace(IDS):
            out = model.logits.save()
    return out


# Where models come from -----------------------------------------------------------------------------------------------


def test_a_module_in_memory_is_held_not_copied() -> None:
    hf = plain("mamba2").train()
    expected = plain("mamba2")(IDS).logits.detach()
    model = cb.load_model(hf)
    assert model.hf is hf
    assert not hf.training
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        hf.lm_head.weight.zero_()
    assert (logits(model) == 0).all()


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1", "jamba", "qwen3_next", "gpt2"])
def test_a_folder_gives_the_model_that_was_saved(family: str, tmp_path: Path) -> None:
    hf = plain(family)
    hf.save_pretrained(tmp_path)
    expected = hf(IDS).logits.detach()
    for source in (tmp_path, str(tmp_path)):
        model = cb.load_model(source)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    half = cb.load_model(tmp_path, dtype="bfloat16")
    assert next(half.hf.parameters()).dtype == torch.bfloat16
    assert (logits(half).float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_model_that_sees_is_loaded_as_its_language_model(tmp_path: Path) -> None:
    text = ARCHITECTURES["qwen3_5_text"].random_config
    eyes = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    seeing = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["qwen3_5"](text_config=text, vision_config=eyes))
    seeing.save_pretrained(tmp_path)
    model = cb.load_model(tmp_path)
    assert model.architecture == model.hf.config.model_type == "qwen3_5_text"
    torch.testing.assert_close(logits(model), seeing.eval()(IDS).logits.detach(), rtol=1e-4, atol=1e-5)
    assert cb.load_model("random:qwen3_5").architecture == "qwen3_5_text"
    with pytest.raises(
        cb.UnsupportedModel, match=r"Qwen3_5ForConditionalGeneration has no 'model.layers'.*ForCausalLM"
    ):
        cb.load_model(seeing)


def test_half_precision_on_disk_is_computed_in_float32_unless_asked(tmp_path: Path) -> None:
    plain("mamba2", torch.bfloat16).save_pretrained(tmp_path)
    assert next(cb.load_model(tmp_path).hf.parameters()).dtype == torch.float32
    assert next(cb.load_model(tmp_path, dtype=torch.float16).hf.parameters()).dtype == torch.float16


@pytest.mark.parametrize("family", [*FAMILIES, *TWINS])
def test_every_family_comes_with_random_weights(family: str) -> None:
    """The same ones every time, kept apart from the caller's random state, and no two layers alike."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model = cb.load_model(f"random:{family}")
    assert torch.equal(torch.rand(2), expected)
    again = cb.load_model(f"random:{family}")
    assert torch.equal(logits(model), logits(again))
    assert logits(model).std() > 0.05
    assert sum(parameter.numel() for parameter in model.hf.parameters()) < 100_000
    assert model.hf.config.model_type == model.architecture == family


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_is_the_weights(dtype: torch.dtype) -> None:
    model = cb.load_model("random:mamba2", dtype=dtype)
    assert {parameter.dtype for parameter in model.hf.parameters()} == {dtype}
    assert cb.capture(model, IDS, "layers.0.ssm.out")["layers.0.ssm.out"].dtype == dtype


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    zoo = cb.load_model("zoo:pylm-mamba2")
    assert zoo.tokenizer is not None
    mine = copy.deepcopy(zoo.tokenizer)
    mine.padding_side = "right"
    mine.save_pretrained(tmp_path)
    for tokenizer in (mine, str(tmp_path)):
        model = cb.load_model("random:mamba2", tokenizer=tokenizer)
        assert model.tokenizer is not None
        assert model.tokenizer("def f")["input_ids"] == zoo.tokenizer("def f")["input_ids"]
        assert model.tokenizer.padding_side == "left"


def test_without_weights_for_remote_use(tmp_path: Path) -> None:
    hf = plain("mamba2")
    hf.save_pretrained(tmp_path)
    model = cb.load_model(tmp_path, remote=True)
    assert {parameter.device.type for parameter in model.hf.parameters()} == {"meta"}
    assert model.sites == cb.load_model(tmp_path).sites
    for call in (cb.capture, cb.generate_text, cb.intervene):
        arguments: list[Any] = [["logits"]] if call is cb.capture else [[]] if call is cb.intervene else []
        with pytest.raises(cb.BadInput, match="its weights are not here; run with remote=True"):
            call(model, "5 3", *arguments)


# Checkpoints of the original code -------------------------------------------------------------------------------------


def original(folder: Path, config: dict[str, Any], hf: Any, safe: bool = False) -> Path:
    """Write a model as the original code's repositories hold it."""
    state = {key.replace("embeddings.weight", "embedding.weight"): value for key, value in hf.state_dict().items()}
    if safe:
        save_file(
            {key: value.clone() for key, value in state.items() if key != "lm_head.weight"},
            folder / "model.safetensors",
        )
    else:
        torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


RAW = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
MAMBA = {"d_model": 32, "n_layer": 2, "vocab_size": 93, "ssm_cfg": {}, **RAW}
MAMBA2 = {
    "d_model": 64, "d_intermediate": 0, "n_layer": 2, "vocab_size": 93, "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": True, **RAW,
}  # fmt: skip


def spread(hf: Any) -> Any:
    """Weights that matter."""
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    hf.tie_weights()
    return hf.eval()


def mamba1() -> Any:
    """The published sizes: state 16, dt_rank d_model / 16, vocabulary padded to a multiple of 8."""
    return spread(MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)))


def mamba2(**changes: Any) -> Any:
    settings = {"num_heads": 2, "head_dim": 64, "state_size": 128, "n_groups": 1, "chunk_size": 256} | changes
    config = Mamba2Config(vocab_size=96, hidden_size=64, num_hidden_layers=2, tie_word_embeddings=True, **settings)
    return spread(Mamba2ForCausalLM(config))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    ("config", "make"),
    [
        (MAMBA, mamba1),
        (MAMBA2, mamba2),
        (
            {**MAMBA2, "ssm_cfg": {"layer": "Mamba2", "headdim": 32, "d_state": 16, "ngroups": 2, "chunk_size": 64}},
            lambda: mamba2(num_heads=4, head_dim=32, state_size=16, n_groups=2, chunk_size=64),
        ),
    ],
    ids=["mamba", "mamba2", "mamba2 with settings"],
)
def test_checkpoints_of_the_original_code(tmp_path: Path, config: Any, make: Any, safe: bool) -> None:
    hf = make()
    source = original(tmp_path, config, hf, safe)
    model = cb.load_model(source)
    assert model.architecture == hf.config.model_type
    assert torch.equal(logits(model), hf(IDS).logits)
    assert model.hf.lm_head.weight.data_ptr() == model.hf.get_input_embeddings().weight.data_ptr()
    without = cb.load_model(source, remote=True)
    assert without.device.type == "meta"
    assert [p.shape for p in without.hf.parameters()] == [p.shape for p in model.hf.parameters()]
    assert next(cb.load_model(source, dtype="bfloat16").hf.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({**MAMBA2, "attn_layer_idx": [1]}, "attention layers or MLPs.*pure mamba or mamba2"),
        ({**MAMBA2, "d_intermediate": 64}, "attention layers or MLPs"),
        ({**MAMBA2, "ssm_cfg": {"layer": "Mamba3"}}, "layer is 'Mamba3'; there are converters for Mamba1 and Mamba2"),
        ({**MAMBA2, "ssm_cfg": {"layer": "Mamba2", "d_ssm": 8, "A_init_range": [1, 2]}}, "sets A_init_range, d_ssm"),
    ],
)
def test_what_transformers_cannot_hold_is_refused(tmp_path: Path, config: Any, sentence: str) -> None:
    with pytest.raises(cb.UnsupportedModel, match=sentence):
        cb.load_model(original(tmp_path, config, mamba2()))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    hf = mamba2()
    source = original(tmp_path, MAMBA2, hf)
    with pytest.raises(cb.UnsupportedModel, match="do not have the shapes .* a mamba2 of d_model=64"):
        cb.load_model(original(tmp_path, MAMBA2, mamba1()))
    torch.save(hf.state_dict(), source / "pytorch_model.bin")
    with pytest.raises(cb.UnsupportedModel, match="have no backbone.embedding.weight"):
        cb.load_model(source)
    state = torch.load(original(tmp_path, MAMBA2, hf) / "pytorch_model.bin")
    state["backbone.layers.0.mixer.bias"] = state.pop("backbone.layers.0.mixer.dt_bias")
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(cb.UnsupportedModel, match="do not fit a mamba2: missing .*dt_bias.*, unexpected .*mixer.bias"):
        cb.load_model(source)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(cb.UnsupportedModel, match="holds neither model.safetensors nor pytorch_model.bin"):
        cb.load_model(tmp_path)


# A map of one's own ---------------------------------------------------------------------------------------------------


@pytest.fixture
def restored_registry() -> Iterator[None]:
    before = dict(ARCHITECTURES)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)


@pytest.mark.usefixtures("restored_registry")
def test_a_map_of_ones_own_is_found_by_its_model_type() -> None:
    config = transformers.StableLmConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    hf = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(cb.UnsupportedModel, match="model_type 'stablelm'.*register_architecture"):
        cb.load_model(hf)
    cb.register_architecture(
        cb.Architecture(
            model_type="stablelm",
            layers="model.layers",
            parts={"attn": attention_part("self_attn"), "mlp": mlp_part("mlp")},
            sites={**resid_pre(), **attention(), **resid_mid("post_attention_layernorm"), **mlp(), **resid_post()},
            final_norm="model.norm",
            random_config={"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
            | {"num_attention_heads": 4, "num_key_value_heads": 2},
        )
    )
    model = cb.load_model(hf)
    got = cb.capture(model, IDS, ["layers.*.resid_mid", "layers.*.mlp.out", "layers.*.resid_post"])
    for layer in range(2):
        total = got[f"layers.{layer}.resid_mid"] + got[f"layers.{layer}.mlp.out"]
        torch.testing.assert_close(total, got[f"layers.{layer}.resid_post"])
    assert cb.intervene(model, IDS, cb.Ablate("layers.0.attn.z", heads=1)).delta_norm > 1e-4
    assert cb.load_model("random:stablelm").sites == model.sites


@pytest.mark.usefixtures("restored_registry")
def test_a_map_that_names_what_is_not_there_says_so() -> None:
    from dataclasses import replace

    wrong = replace(ARCHITECTURES["mamba2"], layers="backbone.blocks")
    cb.register_architecture(wrong)
    with pytest.raises(cb.UnsupportedModel, match="Mamba2ForCausalLM has no 'backbone.blocks'"):
        cb.load_model(random_model(wrong))
    site = cb.Site("/no_such_operation_0:output")
    wrong = replace(ARCHITECTURES["mamba"], sites={**ARCHITECTURES["mamba"].sites, "ssm.conv": site})
    cb.register_architecture(wrong)
    with pytest.raises(cb.UnsupportedModel, match="'no_such_operation_0' inside .*mixer, which this version"):
        cb.load_model(random_model(wrong))
    assert registry.architecture_of(MambaConfig()) is wrong


# What is installed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ["5.21.3", "5.24.0", "4.57.1", "6.0.0"])
def test_other_versions_of_transformers_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr("circuitbench.models.load.transformers.__version__", found)
    wanted = rf"transformers {found} is installed.*pip install 'transformers>=5.22,<5.24'"
    with pytest.raises(cb.VersionMismatch, match=wanted):
        cb.load_model("random:mamba2")


@pytest.mark.parametrize("found", ["0.7.2", "0.9.0", "1.0.0"])
def test_other_versions_of_nnsight_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr("circuitbench.models.load.version", lambda name: found)
    with pytest.raises(cb.VersionMismatch, match=rf"nnsight {found} is installed.*pip install 'nnsight>=0.8,<0.9'"):
        cb.load_model("random:mamba2")


def as_if_installed(torch_function: Any) -> Any:
    """What transformers makes of a function when a kernel package is found: a wrapper that calls the package."""
    package, is_new_implementation = "mamba_ssm", True

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{package} has no CPU code ({is_new_implementation})")

    wrapped.__wrapped__ = torch_function  # type: ignore[attr-defined]
    return wrapped


def test_kernels_that_do_not_run_on_the_models_device_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = plain("mamba2")
    expected = hf(IDS).logits.detach()
    code = kernels.modeling_module(hf)
    monkeypatch.setattr(code, "mamba2_chunk_scan", as_if_installed(code.mamba2_chunk_scan))
    with pytest.raises(RuntimeError, match="no CPU code"):
        hf(IDS)
    with pytest.raises(cb.KernelMismatch, match="mamba_ssm is installed.*mamba2_chunk_scan.*use_torch_kernels"):
        cb.load_model(hf)
    kernels.use_torch_kernels(hf)
    assert torch.equal(logits(cb.load_model(hf)), expected)


def test_the_fast_scan_of_s6_is_transformers_own_to_float_noise() -> None:
    hf = plain("mamba")
    kernels.use_own_s6(hf)
    expected = hf(IDS).logits.detach()
    kernels.use_fast_s6(hf)
    assert hasattr(kernels.modeling_module(hf).mamba_selective_scan, kernels.MARK)
    torch.testing.assert_close(hf(IDS).logits, expected, rtol=1e-5, atol=1e-6)
