"""RWKV-7 in plain torch: against the paper written down a second time, and against the authors' package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import circuitbench as cb
from circuitbench.architectures import ARCHITECTURES
from circuitbench.errors import BadInput, UnsupportedModel
from circuitbench.models.random import random_model
from circuitbench.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from tests.architectures.cases import prompts, relative
from tests.models import rwkv7_reference

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide values": {"value_dim": 64},
    "one head": {"head_dim": None, "num_heads": 1},
    "no norm of the embeddings": {"norm_first": False},
    "norms without bias": {"norm_bias": False, "norm_eps": 1e-3},
    "tied": {"tie_word_embeddings": True},
    "sizes from the width": {"intermediate_size": None, "decay_low_rank_dim": None, "v_low_rank_dim": None},
    "one layer": {"num_hidden_layers": 1},
}


def tiny(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return random_model(ARCHITECTURES["rwkv7"], dtype=dtype, **changes)


@torch.no_grad()
def logits_of(hf: Any, ids: Any, **given: Any) -> Tensor:
    return hf(torch.as_tensor(ids), **given).logits


# Against the paper ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_paper(variant: str) -> None:
    hf, (prompt,) = tiny(**VARIANTS[variant]), prompts(40)  # a chunk of the scan and a rest
    expected, _ = rwkv7_reference.run(hf.config, hf.state_dict(), prompt)
    assert relative(logits_of(hf, [prompt])[0], expected) < 1e-5
    assert relative(logits_of(hf.double(), [prompt])[0], expected) < 1e-11


def test_every_tensor_of_a_layer_is_that_of_the_paper() -> None:
    hf, (prompt,) = tiny(value_dim=64), prompts(13)
    _, layers = rwkv7_reference.run(hf.config, hf.state_dict(), prompt)
    model = cb.load_model(hf)
    found = cb.capture(model, [prompt], [f"layers.*.{name}" for name in layers[0]])
    for index, seen in enumerate(layers):
        for name, expected in seen.items():
            assert relative(found[f"layers.{index}.{name}"][0], expected) < 1e-5, (index, name)


def test_half_precision_stays_within_five_percent_and_keeps_its_state_in_single() -> None:
    hf, (prompt,) = tiny(), prompts(40)
    expected, _ = rwkv7_reference.run(hf.config, hf.state_dict(), prompt)
    out = hf.to(torch.bfloat16)(torch.tensor([prompt]), use_cache=True)
    assert out.logits.dtype == torch.bfloat16
    assert relative(out.logits[0].detach(), expected) < 5e-2
    assert out.past_key_values.get_recurrent_state(0).dtype == torch.float32


@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients_are_finite_differences(use_cache: bool) -> None:
    hf, ids = tiny(torch.float64), torch.tensor(prompts(9, 9))
    hf.train()

    def measure() -> Tensor:  # transformers' own loss is in single precision
        logits = hf(ids, use_cache=use_cache).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss = measure()
    gradients = torch.autograd.grad(loss, list(hf.parameters()))
    direction = [torch.randn_like(parameter) for parameter in hf.parameters()]
    losses = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for parameter, along in zip(hf.parameters(), direction, strict=True):
                parameter.add_(along, alpha=step)
            losses.append(measure())
    measured = (losses[0] - losses[1]) / 2e-5
    expected = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    assert abs(measured - expected) < 1e-6 * abs(expected)


def test_a_gradient_reaches_the_past_through_a_cached_state() -> None:
    hf, ids = tiny(torch.float64), torch.tensor(prompts(9))
    embedded = hf.model.embeddings(ids).detach().requires_grad_()
    first = hf(inputs_embeds=embedded[:, :4], use_cache=True)
    second = hf(inputs_embeds=embedded[:, 4:], past_key_values=first.past_key_values, use_cache=False)
    whole = hf(inputs_embeds=embedded)
    (split,), (at_once,) = (torch.autograd.grad(out.logits[:, -1].sum(), embedded) for out in (second, whole))
    assert relative(split, at_once) < 1e-10


# The cross-layer value residual ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_the_first_layers_values_are_edited_where_they_are_handed_on_or_received(in_place: bool) -> None:
    model, (prompt,) = cb.load_model(tiny()), prompts(9)

    def values(edited: int | None) -> list[Tensor]:
        """What each layer makes of its own input and of the first layer's values."""
        found = []
        with torch.no_grad():
            with model.trace(torch.tensor([prompt])):
                for index, layer in enumerate(model.layers):
                    layer.resid_pre = streams[index]  # only the values reach another layer
                    first = layer.ssm.v_first
                    if index == edited and in_place:
                        first[:, 4] = 7.0
                    elif index == edited:
                        first = first.clone()
                        first[:, 4] = 7.0
                        layer.ssm.v_first = first
                    found.append(layer.ssm.v.clone())
                found = torch.stack(found).save()
        return list(found)

    with torch.no_grad():
        with model.trace(torch.tensor([prompt])):
            streams = torch.stack([layer.resid_pre for layer in model.layers]).save()
    plain = values(None)
    for edited, moved in ((0, [False, True, True]), (1, [False, True, False]), (2, [False, False, True])):
        after = values(edited)
        assert [not torch.equal(a, b) for a, b in zip(after, plain, strict=True)] == moved
        for a, b in zip(after, plain, strict=True):
            assert torch.equal(a[:, :4], b[:, :4]) and torch.equal(a[:, 5:], b[:, 5:])


# Cache and generation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1,) * 13, (5, *[1] * 8), (2, 3, 1, 4, 3), (12, 1), (1, 12)], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_going_on_from_a_cache_is_the_whole_prompt(sizes: tuple[int, ...], padded: bool) -> None:
    hf, ids, mask = tiny(), torch.tensor(prompts(13, 13)), torch.ones(2, 13, dtype=torch.long)
    if padded:  # left, middle and right
        mask[0, [0, 6, 7]] = 0
        mask[1, [0, 1, 2, 3, 12]] = 0
    cache, found, start = DynamicCache(config=hf.config), [], 0
    for size in sizes:
        given = {"attention_mask": mask[:, : start + size]} if padded else {}
        found.append(logits_of(hf, ids[:, start : start + size], past_key_values=cache, **given))
        start += size
        assert cache.get_seq_length() == start
    joined = torch.cat(found, 1)
    for row in range(2):
        real = mask[row].bool()
        alone = hf(ids[row, real][None], use_cache=True)
        assert relative(joined[row, real], alone.logits[0].detach()) < 1e-5
        for layer in range(3):
            for state in ("get_recurrent_state", "get_conv_state"):
                ours, expected = (getattr(held, state)(layer) for held in (cache, alone.past_key_values))
                assert relative(ours[row], expected[0].detach()) < 1e-5


def test_generation_is_the_same_with_and_without_a_cache_and_from_one() -> None:
    hf = tiny()
    ids = torch.tensor(prompts(9, 9))
    padded = torch.cat([torch.full((2, 3), 5), ids], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = hf.generate(ids, use_cache=False, **settings)[:, 9:]
    assert torch.equal(hf.generate(ids, **settings)[:, 9:], expected)
    assert torch.equal(hf.generate(padded, attention_mask=mask, **settings)[:, 12:], expected)
    cache = hf(ids[:, :5], use_cache=True).past_key_values
    assert torch.equal(hf.generate(ids, past_key_values=cache, **settings)[:, 9:], expected)
    beams = hf.generate(ids, num_beams=3, use_cache=False, **settings)
    assert torch.equal(hf.generate(ids, num_beams=3, **settings), beams)
    assert cb.load_model(hf).generate_text([row.tolist() for row in ids], max_new_tokens=6) == [
        " ".join(str(token) for token in row) for row in expected.tolist()
    ]


def test_a_cache_or_a_mask_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # else it speaks first
    hf, ids = tiny(), torch.tensor(prompts(5))
    with pytest.raises(BadInput, match=r"DynamicCache\(config=model.config\), not this DynamicCache"):
        hf(ids, past_key_values=DynamicCache())
    for shape in ((1, 4), (2, 5), (1, 1, 5, 5)):
        with pytest.raises(BadInput, match=r"it must be \(1, 5\)"):
            hf(ids, attention_mask=torch.ones(shape))
    with pytest.raises(BadInput, match="either input_ids or inputs_embeds"):
        hf()
    cache = DynamicCache(config=hf.config)
    cache.update_conv_state(torch.zeros(1, 32, 1), 0)
    with pytest.raises(BadInput, match="does not know how many tokens"):
        cache.get_seq_length()


# Names and files ------------------------------------------------------------------------------------------------------

# flash-linear-attention 0.6.0's parameters for this configuration, as its module lists them.
SMALL = {"vocab_size": 11, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 32, "intermediate_size": 96}
SMALL |= {"decay_low_rank_dim": 3, "gate_low_rank_dim": 4, "a_low_rank_dim": 5, "v_low_rank_dim": 6}
LAYER = {
    **{f"{name}.{kind}": (64,) for name in ("attn_norm", "ffn_norm", "attn.g_norm") for kind in ("weight", "bias")},
    **{f"attn.x_{name}": (1, 1, 64) for name in "rwkvag"},
    **{f"attn.{name}_proj.weight": (64, 64) for name in "rkvo"},
    "attn.k_k": (64,),
    "attn.k_a": (64,),
    "attn.r_k": (2, 32),
    "attn.w_lora.lora.0.weight": (3, 64),
    "attn.w_lora.lora.2.weight": (64, 3),
    "attn.w_lora.lora.2.bias": (64,),
    "attn.a_lora.lora.0.weight": (5, 64),
    "attn.a_lora.lora.2.weight": (64, 5),
    "attn.a_lora.lora.2.bias": (64,),
    "attn.g_lora.lora.0.weight": (4, 64),
    "attn.g_lora.lora.2.weight": (64, 4),
    "ffn.x_k": (64,),
    "ffn.key.weight": (96, 64),
    "ffn.value.weight": (64, 96),
}
INVENTORY = {
    "model.embeddings.weight": (11, 64),
    "model.layers.0.pre_norm.weight": (64,),
    "model.layers.0.pre_norm.bias": (64,),
    **{f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER.items()},
    "model.layers.1.attn.v_lora.lora.0.weight": (6, 64),
    "model.layers.1.attn.v_lora.lora.2.weight": (64, 6),
    "model.layers.1.attn.v_lora.lora.2.bias": (64,),
    "model.norm.weight": (64,),
    "model.norm.bias": (64,),
    "lm_head.weight": (11, 64),
}
# What flash-linear-attention writes into a config.json besides.
PUBLISHED: dict[str, Any] = {
    "architectures": ["RWKV7ForCausalLM"],
    "attn": None,
    "attn_mode": "chunk",
    "auto_map": {
        "AutoConfig": "modeling_rwkv7.RWKV7Config",
        "AutoModel": "modeling_rwkv7.RWKV7Model",
        "AutoModelForCausalLM": "modeling_rwkv7.RWKV7ForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 0,
    "fuse_cross_entropy": True,
    "fuse_norm": True,
    "hidden_act": "sqrelu",
    "hidden_ratio": 4.0,
    "initializer_range": 0.006,
    "max_position_embeddings": 2048,
    "model_type": "rwkv7",
    "norm_bias": True,
    "norm_eps": 1e-05,
    "norm_first": True,
    "num_heads": 32,  # of no effect beside head_dim
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0",
    "use_cache": True,
    "value_dim": [64, 64],
}


def test_parameters_are_flash_linear_attentions() -> None:
    hf = RWKV7ForCausalLM(RWKV7Config(**SMALL))
    assert {name: tuple(parameter.shape) for name, parameter in hf.named_parameters()} == INVENTORY
    assert hf.state_dict().keys() == INVENTORY.keys()


def test_a_folder_as_flash_linear_attention_writes_it_loads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **SMALL}))
    weights = {name: 0.3 * torch.randn(shape) for name, shape in INVENTORY.items()}
    save_file({name: value.to(torch.bfloat16) for name, value in weights.items()}, tmp_path / "model.safetensors")
    model = cb.load_model(tmp_path)
    assert model.hf.config.num_heads == 2 and model.hf.dtype == torch.float32
    stored = {name: value.float() for name, value in load_file(tmp_path / "model.safetensors").items()}
    expected, _ = rwkv7_reference.run(model.hf.config, stored, [3, 7, 1, 10])
    assert relative(logits_of(model.hf, [[3, 7, 1, 10]])[0], expected) < 1e-5
    del stored["model.layers.1.attn.x_r"]
    stored["model.layers.1.attn.x_x"] = torch.zeros(6, 64)  # as early versions pack them
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(
        UnsupportedModel, match=r"model.layers.1.attn.x_r is not there, but model.layers.1.attn.x_x"
    ) as raised:
        cb.load_model(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("variant", ["plain", "wide values", "tied"])
def test_what_save_pretrained_writes_loads(tmp_path: Path, variant: str) -> None:
    hf, (prompt,) = tiny(**VARIANTS[variant]), prompts(9)
    hf.save_pretrained(tmp_path)
    assert torch.equal(logits_of(cb.load_model(tmp_path).hf, [prompt]), logits_of(hf, [prompt]))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), RWKV7ForCausalLM)


def test_initial_weights_are_finite_and_decays_spread() -> None:
    torch.manual_seed(0)
    hf = RWKV7ForCausalLM(RWKV7Config(**SMALL))
    with cb.load_model(hf).trace(torch.tensor([[3, 7, 1, 10]])):
        decay = hf.model.layers[0].attn.w_lora.lora[2].bias.save()
    assert torch.isfinite(logits_of(hf, [[3, 7, 1, 10]])).all()
    assert decay.min() < -5 and decay.max() > 0


BAD_CONFIGURATIONS = [
    ({"head_dim": 7}, "hidden_size=64 is to be a multiple of head_dim=7"),
    ({"attn": {"layers": [1]}}, "attn={'layers': "),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is to be 'sqrelu'"),
    ({"value_dim": [64, 128]}, r"value_dim=\[64, 128\] is to hold one width"),
    ({"value_dim": 65}, "is to be a multiple of 2 heads"),
]


@pytest.mark.parametrize(("wrong", "sentence"), BAD_CONFIGURATIONS, ids=[s[:20] for _, s in BAD_CONFIGURATIONS])
def test_what_cannot_be_represented_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModel, match=sentence):
        RWKV7Config(**{**SMALL, **wrong})


# The authors' files ---------------------------------------------------------------------------------------------------


def authors_file(path: Path, **changes: Any) -> Any:
    """A tiny model whose heads have the authors' size, and its checkpoint as they write it."""
    hf = tiny(hidden_size=128, head_dim=64, **changes)
    torch.save(rwkv7_reference.authors_state(hf.state_dict()), path)
    return hf


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 1}], ids=["", "one layer"])
def test_the_authors_checkpoint_is_the_same_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "RWKV-x070.pth"
    hf, (prompt,) = authors_file(path, **changes), prompts(9)
    model = cb.load_model(path)
    assert torch.equal(logits_of(model.hf, [prompt]), logits_of(hf, [prompt]))
    for name in ("hidden_size", "intermediate_size", "num_heads", "decay_low_rank_dim", "gate_low_rank_dim"):
        assert getattr(model.hf.config, name) == getattr(hf.config, name)
    assert cb.load_model(str(path), dtype="bfloat16").hf.dtype == torch.bfloat16
    assert cb.load_model(path, remote=True).hf.device.type == "meta"
    assert model.generate_text([3, 4, 5], max_new_tokens=5).replace(" ", "").isdigit()  # ids, without a tokenizer


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.pth"
    with pytest.raises(BadInput, match="There is no file"):
        cb.load_model(path)
    path.write_bytes(b"no weights")
    with pytest.raises(BadInput, match="is no file of weights that torch can read"):
        cb.load_model(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(BadInput, match="holds no state dict"):
        cb.load_model(path)
    authors_file(path)
    state = torch.load(path)
    for change, sentence in [
        ({"blocks.0.att.r_k": None}, r"there is no blocks.0.att.r_k.*version 7 \(x070\)"),
        ({"blocks.1.ffn.s_emb.weight": torch.zeros(2)}, "hold blocks.1.ffn.s_emb.weight, which RWKV-7 does not have"),
        ({"blocks.0.att.r_k": torch.zeros(4, 32)}, "have 32 channels; the authors' have 64"),
        ({"blocks.1.att.k_a": None}, "do not fit an RWKV-7 of their sizes: model.layers.1.attn.k_a"),
        ({"blocks.1.att.k_a": torch.zeros(5)}, "do not fit an RWKV-7 of their sizes: model.layers.1.attn.k_a"),
    ]:
        torch.save({name: v for name, v in {**state, **change}.items() if v is not None}, path)
        with pytest.raises(UnsupportedModel, match=sentence) as raised:
            cb.load_model(path)
        assert "\n" not in str(raised.value)
