"""Hymba in plain torch: against a second implementation, against itself in parts, and as published.

The published code needs CUDA kernels and an old transformers, so nothing here has been compared with a run of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import circuitbench as cb
from circuitbench.architectures import ARCHITECTURES
from circuitbench.errors import BadInput, UnsupportedModel
from circuitbench.models.hymba import HymbaConfig, HymbaForCausalLM
from circuitbench.models.hymba.positions import Columns
from circuitbench.models.random import random_model
from circuitbench.recurrences import s6
from tests.architectures.cases import prompts, relative
from tests.models import hymba_reference

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no meta tokens": {"num_memory_tokens": 0},
    "no window": {"sliding_window": None},
    "no position": {"rope": False},
    "rotary as trained": {"rope_type": None},
    "sharing every second layer": {"kv_reuse_group": None, "kv_reuse_every_i_layer": 2},
    "nothing shared": {"kv_reuse_group": None},
    "normed keys": {"kq_norm": "rms"},
    "normed keys, by head": {"kq_norm": "perhead-rms"},
    "squared ReLU": {"mlp_hidden_act": "relu2"},
    "no inner norms": {"mamba_inner_layernorms": False},
    "biases": {"mamba_proj_bias": True, "mamba_conv_bias": False},
    "odd sizes": {"mamba_expand": 3, "mamba_d_conv": 3, "num_key_value_heads": 4, "mamba_d_state": 5},
    "untied": {"tie_word_embeddings": False},
}


def tiny(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return random_model(ARCHITECTURES["hymba"], dtype=dtype, **changes)


@torch.no_grad()
def logits_of(hf: Any, ids: Any, **given: Any) -> Tensor:
    return hf(torch.as_tensor(ids), **given).logits


def weights_of(hf: Any) -> dict[str, Tensor]:
    return hf.state_dict()


# As a whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_second_implementation(variant: str) -> None:
    hf, (prompt,) = tiny(**VARIANTS[variant]), prompts(13)
    expected, _ = hymba_reference.run(hf.config, weights_of(hf), prompt)
    assert relative(logits_of(hf, [prompt])[0], expected) < 1e-5
    hf.set_attn_implementation("sdpa")
    assert relative(logits_of(hf, [prompt])[0], expected) < 1e-5


def test_every_tensor_of_a_layer_is_that_of_the_second_implementation() -> None:
    hf, (prompt,) = tiny(), prompts(13)
    _, layers = hymba_reference.run(hf.config, weights_of(hf), prompt)
    model = cb.load_model(hf)
    names = {"resid_pre": "resid_pre", "resid_mid": "resid_mid", "resid_post": "resid_post"}
    names |= {f"ssm.{name}": name for name in ("x", "dt", "B", "C", "y", "gate", "gated")}
    names |= {"attn.z": "z", "ssm.branch": "ssm", "attn.branch": "attention"}
    found = cb.capture(model, [prompt], [f"layers.*.{name}" for name in names])
    meta = model.meta_tokens
    for index, seen in enumerate(layers):
        for name, other in names.items():
            assert relative(found[f"layers.{index}.{name}"][0], seen[other][meta:]) < 1e-5, (index, name)


def test_in_double_precision_the_two_agree_to_the_rounding_of_the_angles() -> None:
    hf, (prompt,) = tiny(torch.float64), prompts(13)  # angles are float32 numbers, whatever the model is in
    expected, _ = hymba_reference.run(hf.config, weights_of(hf), prompt)
    assert relative(logits_of(hf, [prompt])[0], expected) < 1e-6
    hf.config.rope = False
    expected, _ = hymba_reference.run(hf.config, weights_of(hf), prompt)
    assert relative(logits_of(hf, [prompt])[0], expected) < 1e-13


# In parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_the_attention_branch_is_torchs_own_attention(layer: int) -> None:
    # Layer 0 sees everything; 1 to 3 see a window and the meta tokens, and share what layer 1 has made.
    model, (prompt,) = cb.load_model(tiny()), prompts(13)
    config, maker = model.hf.config, 0 if layer == 0 else 1
    with torch.no_grad():
        with model.trace(torch.tensor([prompt])):
            keys, values = model.layers[maker].attn.k.clone().save(), model.layers[maker].attn.v.clone().save()
            if layer == maker:
                z = model.layers[layer].attn.z.save()
        with model.trace(torch.tensor([prompt])):
            queries = model.layers[layer].attn.q.save()
            pattern = model.layers[layer].attn.pattern.save()
            z = model.layers[layer].attn.z.save()
    positions = list(range(queries.shape[1]))
    base = hymba_reference.base_of(config)
    q, k = (hymba_reference.turn(tensor[0], positions, base).transpose(0, 1) for tensor in (queries, keys))
    window = None if layer == 0 else config.sliding_window
    mask = torch.tensor([[hymba_reference.sees(i, j, 3, window) for j in positions] for i in positions])
    k, v = (tensor.repeat_interleave(2, 0) for tensor in (k, values[0].transpose(0, 1)))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert relative(z[0].transpose(0, 1), expected) < 1e-5
    assert (pattern[0][:, ~mask] == 0).all()
    assert (pattern[0][:, mask] > 0).all()


def test_the_scan_is_s6() -> None:
    model, (prompt,) = cb.load_model(tiny()), prompts(13)
    with torch.no_grad():
        with model.trace(torch.tensor([prompt])):
            view = model.layers[2].ssm
            x, dt, B, C = (getattr(view, name).clone().save() for name in ("x", "dt", "B", "C"))
            states, y = view.state.save(), view.y.save()
    block = model.hf.model.layers[2].mamba
    A, D = -block.A_log[0].detach().exp(), block.D[0].detach()
    ours, final = s6.forward(x, dt, A, B, C, D)
    assert relative(y, ours) < 1e-6
    assert relative(states[:, -1], final) < 1e-6
    loop = hymba_reference.scan(*(value.double() for value in (x[0], dt[0], A, B[0], C[0], D)))
    assert relative(y[0], loop) < 1e-6


def test_what_the_branches_add_is_the_projection_of_their_mean() -> None:
    model, (prompt,) = cb.load_model(tiny()), prompts(13)
    names = [f"layers.1.{name}" for name in ("ssm.branch", "attn.branch", "ssm.out", "attn.out")]
    ssm, attention, ssm_out, attn_out = cb.capture(model, [prompt], names).values()
    weight = model.hf.model.layers[1].mamba.out_proj.weight.detach()
    assert relative(ssm_out + attn_out, (ssm + attention) / 2 @ weight.T) < 1e-6
    assert relative(ssm_out, ssm / 2 @ weight.T) < 1e-6


def test_layers_that_share_follow_an_edit_of_the_keys_they_share() -> None:
    model, (prompt,) = cb.load_model(tiny()), prompts(13)
    ids = torch.tensor([prompt])

    def patterns(edit: bool) -> list[Tensor]:
        with torch.no_grad():
            with model.trace(ids):
                if edit:
                    model.layers[1].attn.k[:, 3 + 8] *= -2
                # The queries of every layer as they were, so that only the keys differ.
                found = []
                for layer in (1, 2, 3, 4):
                    model.layers[layer].attn.q = queries[layer]
                    found.append(model.layers[layer].attn.pattern.clone())
                found = torch.stack(found).save()
        return list(found)

    with torch.no_grad():
        with model.trace(ids):
            queries = [layer.attn.q.clone() for layer in model.layers]
            queries = torch.stack(queries).save()
    for layer, before, after in zip((1, 2, 3), patterns(False), patterns(True), strict=False):
        moved = (after - before)[0].abs().amax(0)  # queries × keys
        assert (moved[:11] == 0).all(), layer
        assert (moved[11:16].amax(1) > 1e-4).all(), layer  # the window is 4: columns 11 to 15 see column 11


# Meta tokens and the window -------------------------------------------------------------------------------------------


def test_meta_tokens_are_embeddings_before_the_prompt() -> None:
    hf = tiny(sliding_window=None)
    bare = tiny(sliding_window=None, num_memory_tokens=0)
    bare.load_state_dict({k: v for k, v in weights_of(hf).items() if k != "model.memory_tokens"})
    ids = torch.tensor(prompts(9, 9))
    embedded = torch.cat([hf.model.memory_tokens.expand(2, -1, -1), hf.model.embed_tokens(ids)], 1)
    with torch.no_grad():
        assert relative(logits_of(hf, ids), bare(inputs_embeds=embedded).logits[:, 3:]) < 1e-6
        assert torch.equal(logits_of(hf, ids), hf(inputs_embeds=hf.model.embed_tokens(ids)).logits)


def test_a_window_reaches_its_size_back_and_to_the_meta_tokens() -> None:
    model, (prompt,) = cb.load_model(tiny()), prompts(13)
    last = 3 + 12
    with model.trace(torch.tensor([prompt])):
        values = model.layers[1].attn.v
        z = model.layers[1].attn.z
        (reached,) = torch.autograd.grad(z[:, last].square().sum(), values)
        reached = (reached.abs().sum((0, 2, 3)) > 0).save()
    seen = {0, 1, 2, *range(last - 4, last + 1)}  # the published mask: q - k <= window, so window + 1 tokens
    assert {column for column, here in enumerate(reached.tolist()) if here} == seen


# Cache and generation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(5, *[1] * 8), (2, 3, 1, 4, 3), (6, 2, 5)], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_going_on_from_a_cache_is_the_whole_prompt(sizes: tuple[int, ...], padded: bool) -> None:
    hf = tiny()
    ids, mask = torch.tensor(prompts(13, 13)), torch.ones(2, 13, dtype=torch.long)
    if padded:
        mask[1, :4] = 0
        if sizes[0] < 5:
            with pytest.raises(BadInput, match="A prompt is padding alone in the first"):
                hf(ids[:, : sizes[0]], attention_mask=mask[:, : sizes[0]], use_cache=True)
            return
    whole = logits_of(hf, ids, attention_mask=mask)
    cache, found, start = DynamicCache(config=hf.config), [], 0
    for size in sizes:
        given = {"attention_mask": mask[:, : start + size]} if padded else {}
        found.append(logits_of(hf, ids[:, start : start + size], past_key_values=cache, **given))
        start += size
        assert cache.get_seq_length() == start  # of the prompt's own tokens
    real = mask.bool()
    assert relative(torch.cat(found, 1)[real], whole[real]) < 1e-5


def test_generation_is_the_same_with_and_without_a_cache_and_from_one() -> None:
    hf = tiny()
    ids = torch.tensor(prompts(9, 9))
    padded = torch.cat([torch.full((2, 3), 5), ids], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = hf.generate(ids, use_cache=False, **settings)[:, 9:]
    assert torch.equal(hf.generate(ids, **settings)[:, 9:], expected)
    assert torch.equal(hf.generate(padded, attention_mask=mask, **settings)[:, 12:], expected)
    cache = hf(ids[:, :5], use_cache=True).past_key_values
    assert torch.equal(hf.generate(ids, past_key_values=cache, **settings)[:, 9:], expected)
    beams = hf.generate(ids, num_beams=2, use_cache=False, **settings)
    assert torch.equal(hf.generate(ids, num_beams=2, **settings), beams)


def test_a_cache_of_another_kind_is_refused() -> None:
    hf, ids = tiny(), torch.tensor(prompts(5))
    other = DynamicCache(config=tiny(num_memory_tokens=2).config)
    for cache in (DynamicCache(), StaticCache(config=tiny_llama(), max_cache_len=8), other):
        with pytest.raises(BadInput, match=r"DynamicCache\(config=model.config\)"):
            hf(ids, past_key_values=cache)


def tiny_llama() -> Any:
    return random_model(ARCHITECTURES["llama"]).config


# Padding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "width"), [("plain", 1), ("plain", 5), ("no meta tokens", 5), ("biases", 5)])
def test_padding_on_the_left_changes_no_logit(variant: str, width: int) -> None:
    hf, (prompt,) = tiny(**VARIANTS[variant]), prompts(9)
    alone = logits_of(hf, [prompt])[0]
    (filling,) = prompts(width, seed=1)
    ids = torch.tensor([filling + prompt, [*filling[::-1], *prompt]])
    mask = (torch.arange(width + 9) >= width).long().expand(2, -1)
    for given in ({}, {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}):
        both = logits_of(hf, ids, attention_mask=mask, **given)[:, width:]
        assert relative(both[0], alone) < 1e-5
        assert torch.equal(both[0], both[1])


def test_padding_on_the_right_changes_no_logit_before_it() -> None:
    hf, (prompt,) = tiny(), prompts(9)
    ids, mask = torch.tensor([prompt + [5, 6]]), torch.tensor([[1] * 9 + [0] * 2])
    assert relative(logits_of(hf, ids, attention_mask=mask)[0, :9], logits_of(hf, [prompt])[0]) < 1e-6
    cache = DynamicCache(config=hf.config)
    logits_of(hf, ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(BadInput, match="pad on the left"):
        logits_of(hf, [[7]], attention_mask=torch.tensor([[1] * 9 + [0] * 2 + [1]]), past_key_values=cache)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    hf, ids = tiny(), torch.tensor(prompts(5))
    with pytest.raises(
        BadInput, match=r"attention_mask is \(b, 5\) here.* 0 tokens that the cache holds and the 5 new"
    ):
        hf(ids, attention_mask=torch.ones(1, 8, dtype=torch.long))


def test_meta_tokens_stand_right_before_a_prompts_first_token() -> None:
    columns = Columns(2, 0, 4, torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]))
    tokens = torch.tensor([[1, 2, 3, 4], [0, 0, 3, 4], [0, 0, 0, 0]])
    assert columns.inserted(tokens, torch.tensor([-1, -2])).tolist() == [
        [-1, -2, 1, 2, 3, 4],
        [0, 0, -1, -2, 3, 4],
        [0, 0, 0, 0, -1, -2],
    ]
    assert columns.positions(torch.device("cpu"), None).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 0, 0, 1, 2, 3],
        [0, 0, 0, 0, 0, 1],
    ]


# Weights --------------------------------------------------------------------------------------------------------------

# nvidia/Hymba-1.5B-Base's config.json, as public ports of its code quote it.
PUBLISHED: dict[str, Any] = {
    "architectures": ["HymbaForCausalLM"],
    "attention_dropout": 0.0,
    "attn_hidden_size": -1,
    "attn_implementation": "flex",
    "attn_implementation_new": "flex",
    "auto_map": {
        "AutoConfig": "configuration_hymba.HymbaConfig",
        "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
    },
    "bos_token_id": 1,
    "calc_logits_for_entire_prompt": False,
    "conv_dim": {str(layer): 3200 for layer in range(32)},
    "eos_token_id": 2,
    "global_attn_idx": [0, 15, 31],
    "hidden_act": "silu",
    "hidden_size": 1600,
    "initializer_range": 0.02,
    "intermediate_size": 5504,
    "kq_head_dim": -1,
    "kq_norm": "none",
    "kv_reuse_every_i_layer": -1,
    "kv_reuse_group": [
        *([layer, layer + 1] for layer in range(1, 15, 2)),
        [16, 17, 18],
        *([layer, layer + 1] for layer in range(19, 31, 2)),
    ],
    "kv_weight_reuse": False,
    "layer_type": ["h"] * 32,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 100,
    "mamba_expand": 2,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "max_position_embeddings": 8192,
    "memory_tokens_interspersed_every": 0,
    "mlp_hidden_act": "silu",
    "model_type": "hymba",
    "num_attention_heads": 25,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 32,
    "num_key_value_heads": 5,
    "num_mamba": 1,
    "num_memory_tokens": 128,
    "orig_max_position_embeddings": 2048,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope": True,
    "rope_theta": 10000.0,
    "rope_type": "ntk",
    "router_aux_loss_coef": 0.001,
    "seq_length": 8192,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mamba_kernels": True,
    "v_head_dim": 128,
    "vocab_size": 32001,
}

# Names as NVIDIA's pruning tool for this model lists them, sizes from the configuration.
LAYER = {
    "input_layernorm.weight": (1600,),
    "mamba.in_proj.weight": (8960, 1600),  # q 25·64, k 5·64, v 5·128, x 3200, gate 3200
    "mamba.conv1d.weight": (3200, 1, 4),
    "mamba.conv1d.bias": (3200,),
    "mamba.x_proj.0.weight": (132, 3200),  # dt 100, B 16, C 16
    "mamba.dt_proj.0.weight": (3200, 100),
    "mamba.dt_proj.0.bias": (3200,),
    "mamba.A_log.0": (3200, 16),
    "mamba.D.0": (3200,),
    "mamba.dt_layernorm.weight": (100,),
    "mamba.B_layernorm.weight": (16,),
    "mamba.C_layernorm.weight": (16,),
    "mamba.pre_avg_layernorm1.weight": (3200,),
    "mamba.pre_avg_layernorm2.weight": (3200,),
    "mamba.out_proj.weight": (1600, 3200),
    "pre_moe_layernorm.weight": (1600,),
    "moe.experts.0.gate_proj.weight": (5504, 1600),
    "moe.experts.0.up_proj.weight": (5504, 1600),
    "moe.experts.0.down_proj.weight": (1600, 5504),
}
SHARING = {2, 4, 6, 8, 10, 12, 14, 17, 18, 20, 22, 24, 26, 28, 30}
ROOT = {
    "model.memory_tokens": (128, 1600),
    "model.embed_tokens.weight": (32001, 1600),
    "model.final_layernorm.weight": (1600,),
    "lm_head.weight": (32001, 1600),
}


def test_parameters_are_those_of_the_published_configuration() -> None:
    with torch.device("meta"):
        hf = HymbaForCausalLM(HymbaConfig(**PUBLISHED))
    expected = dict(ROOT)
    for layer in range(32):
        expected |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
        if layer in SHARING:
            expected[f"model.layers.{layer}.mamba.in_proj.weight"] = (8000, 1600)
    assert {name: tuple(value.shape) for name, value in hf.state_dict().items()} == expected
    total = sum(parameter.numel() for parameter in hf.parameters())  # tied ones once
    assert total == 1_522_797_824
    assert f"{total / 1e9:.2f}" == "1.52"  # the model card's number of parameters, in billions


def test_a_folder_with_the_published_names_loads(tmp_path: Path) -> None:
    hf = tiny()
    small = {
        "torch_dtype": "float32",
        **{name: getattr(hf.config, name) for name in ARCHITECTURES["hymba"].random_config},
    }
    small |= {"conv_dim": {str(layer): 64 for layer in range(5)}, "layer_type": ["h"] * 5, "v_head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **small}))
    published = {name: value for name, value in weights_of(hf).items() if name != "lm_head.weight"}
    save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor(prompts(9))
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), cb.load_model(tmp_path).hf):
        assert isinstance(loaded, HymbaForCausalLM)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert relative(logits_of(loaded.float(), ids), logits_of(hf, ids)) < 1e-6


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    hf, ids = tiny(), torch.tensor(prompts(9))
    hf.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits_of(again, ids), logits_of(hf, ids))
    assert again.config.to_dict() == hf.config.to_dict() | {"_name_or_path": str(tmp_path)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_tokens_interspersed_every": 4}, "memory_tokens_interspersed_every=4 is to be 0"),
        ({"attn_hidden_size": 16}, "attn_hidden_size=16 is to be hidden_size or -1"),
        ({"num_mamba": 2}, "num_mamba=2 is to be 1"),
        ({"rope_type": "dynamic_ntk"}, "rope_type='dynamic_ntk' is to be None, 'default' or 'ntk'"),
        ({"kv_reuse_group": [[2, 1]]}, "the first of a group before the others"),
        ({"kv_reuse_group": [[1, 2], [2, 3]]}, "to hold each layer once at most"),
        ({"num_attention_heads": 5}, "hidden_size=32 is to be a multiple of num_attention_heads=5"),
        ({"kq_norm": "layer"}, "kq_norm='layer' is to be 'none', 'rms' or 'perhead-rms'"),
    ],
)
def test_what_cannot_be_represented_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        tiny(**changes)


# Precision and gradients ----------------------------------------------------------------------------------------------


def test_bfloat16_is_near_float32() -> None:
    hf, ids = tiny(), torch.tensor(prompts(13))
    expected = logits_of(hf, ids)
    half = logits_of(hf.bfloat16(), ids)
    assert half.dtype == torch.bfloat16
    assert relative(half, expected) < 0.1
    cache = DynamicCache(config=hf.config)
    steps = [logits_of(hf, ids[:, start : start + 1], past_key_values=cache) for start in range(13)]
    assert relative(torch.cat(steps, 1), half) < 0.1


def test_gradients_are_the_slopes_of_the_loss() -> None:
    hf = tiny(torch.float64)
    ids = torch.tensor(prompts(9))

    def loss() -> Tensor:  # transformers' own is in float32
        return F.cross_entropy(hf(ids).logits[0, :-1], ids[0, 1:])

    hf.zero_grad()
    loss().backward()
    assert all(parameter.grad is not None for parameter in hf.parameters())
    generator = torch.Generator().manual_seed(0)
    for group in ("memory_tokens", "layers.1.mamba", "layers.2.mamba", "layers.0.moe", ""):
        chosen = [parameter for name, parameter in hf.named_parameters() if group in name]
        along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in chosen]
        slope = sum((p.grad * way).sum().item() for p, way in zip(chosen, along, strict=True))

        def moved(step: float, chosen: Any = chosen, along: Any = along) -> float:
            with torch.no_grad():
                for parameter, way in zip(chosen, along, strict=True):
                    parameter += step * way
                return loss().item()

        above = moved(1e-6)
        below = moved(-2e-6)
        moved(1e-6)
        assert abs((above - below) / 2e-6 - slope) < 1e-6 * abs(slope), group
