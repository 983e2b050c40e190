"""Every site outside the scan is the tensor its name says: read and written against torch's own hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import circuitbench as cb
from circuitbench.tracing.addresses import read_site, write_site
from tests.architectures.by_hand import hooked, inside
from tests.architectures.cases import FAMILIES, TWINS, load, plain, prompts, relative

IDS = torch.tensor(prompts(9, 9))
MODELS = [*FAMILIES, *TWINS, "granitemoehybrid-no-experts", "falcon_h1-no-norm", "zamba2-adapters", "zamba2-rope"]
MODELS += ["kimi_linear-odd-sizes", "olmo_hybrid-no-positions"]

DELTA = {"ssm": "linear_attn", "attn": "self_attn", "mlp": "mlp"}
LFM2 = {"conv": "conv", "attn": "self_attn", "mlp": "feed_forward"}
PARTS = {
    "mamba": {"ssm": "mixer"},
    "falcon_mamba": {"ssm": "mixer"},
    "mamba2": {"ssm": "mixer"},
    "jamba": {"ssm": "mamba", "attn": "self_attn", "mlp": "feed_forward"},
    "falcon_h1": {"ssm": "mamba", "attn": "self_attn", "mlp": "feed_forward"},
    "bamba": {"ssm": "mamba", "attn": "self_attn", "mlp": "feed_forward"},
    "nemotron_h": {"ssm": "mixer", "attn": "mixer", "mlp": "mixer"},
    "granitemoehybrid": {"ssm": "mamba", "attn": "self_attn", "mlp": "shared_mlp"},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), DELTA),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), {"ssm": "self_attn", "attn": "self_attn", "mlp": "mlp"}),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), LFM2),
    "recurrent_gemma": {"ssm": "temporal_block", "attn": "temporal_block", "mlp": "mlp_block"},
    "rwkv": {"ssm": "attention", "mlp": "feed_forward"},
    "xlstm": {"ssm": "mlstm_layer", "mlp": "ffn"},
    "gpt2": {"attn": "attn", "mlp": "mlp"},
    "gpt_neox": {"attn": "attention", "mlp": "mlp"},
}
LAYERS = {"mamba": "backbone.layers", "falcon_mamba": "backbone.layers", "mamba2": "backbone.layers"} | {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "rwkv": "rwkv.blocks",
    "xlstm": "backbone.blocks",
}
MERGE = {
    "gpt2": "c_proj",
    "gpt_neox": "dense",
    "lfm2": "out_proj",
    "lfm2_moe": "out_proj",
}  # what puts the heads together again
DOWN = {"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h", "granitemoehybrid": "output_linear"}
DOWN |= {"lfm2": "w2", "lfm2_moe": "w2", "lfm3": "w2"}
GATE = {
    "qwen3_5_text": "in_proj_z",
    "qwen3_5_moe_text": "in_proj_z",
    "olmo_hybrid": "g_proj",
    "kimi_linear": "g_b_proj",
    "bailing_hybrid": "g_proj",
}
# Where else a site is: the part's submodule, the side, and the heads that the site tells apart.
PLACES: dict[tuple[str, str], tuple[str, str, str]] = {
    ("recurrent_gemma", "ssm.gate"): ("linear_y", "output", ""),
    ("recurrent_gemma", "ssm.in_proj"): ("linear_x", "output", ""),
    ("recurrent_gemma", "ssm.conv"): ("rg_lru", "input", ""),
    ("recurrent_gemma", "ssm.gated"): ("linear_out", "input", ""),
    ("rwkv", "ssm.gate"): ("receptance", "output", ""),
    ("rwkv", "ssm.gated"): ("output", "input", ""),
    ("rwkv", "mlp.hidden"): ("value", "input", ""),
    ("rwkv", "mlp.gate"): ("receptance", "output", ""),
    ("xlstm", "ssm.normed"): ("multihead_norm", "output", "num_heads"),
    ("xlstm", "ssm.gate"): ("ogate_act_fn", "input", ""),
    ("xlstm", "mlp.hidden"): ("proj_down", "input", ""),
}
ROUTER = {  # where it is in a layer, and the norm that it reads
    "jamba": ("feed_forward.router", "pre_ff_layernorm"),
    "nemotron_h": ("mixer.gate", "norm"),
    "qwen3_next": ("mlp.gate", "post_attention_layernorm"),
    "qwen3_5_moe_text": ("mlp.gate", "post_attention_layernorm"),
    "granitemoehybrid": ("block_sparse_moe.router", "post_attention_layernorm"),
    "kimi_linear": ("mlp.gate", "post_attention_layernorm"),
    "bailing_hybrid": ("mlp.gate", "post_attention_layernorm"),
    "lfm2_moe": ("feed_forward.gate", "ffn_norm"),
}


def family(model: Any) -> str:
    return model.config.model_type


def layer_of(hf: Any, index: int) -> nn.Module:
    return hf.get_submodule(LAYERS.get(family(hf), "model.layers"))[index]


def part_of(hf: Any, index: int, name: str) -> nn.Module:
    """The module of a mixer, an attention or an MLP."""
    layer = layer_of(hf, index)
    if family(hf) == "zamba2":
        hybrid = hasattr(layer, "shared_transformer")
        paths = {"ssm": "mamba_decoder.mamba" if hybrid else "mamba"}
        paths |= {"attn": "shared_transformer.self_attn", "mlp": "shared_transformer.feed_forward"}
        return layer.get_submodule(paths[name])
    return layer.get_submodule(PARTS.get(family(hf), {"attn": "self_attn", "mlp": "mlp"})[name])


def multiplier(hf: Any, part: str, index: int) -> float:
    """What a branch is multiplied by before it is added to the residual stream."""
    config = hf.config
    if family(hf) == "rwkv":  # what transformers has divided it by
        return 2.0 ** (index // config.rescale_every)
    own = {"ssm": "ssm_out_multiplier", "attn": "attention_out_multiplier"}.get(part, "")
    return getattr(config, own, 1.0) * getattr(config, "residual_multiplier", 1.0)


def halved(value: Tensor) -> Tensor:
    """Half of the last axis at a few positions, halved."""
    value = value.clone()
    value[:, 2:5, ..., : value.shape[-1] // 2] *= 0.5
    return value


def by_heads(change: Callable[[Tensor], Tensor], heads: int) -> Callable[[Tensor], Tensor]:
    """The change on `(b, t, heads, head_dim)`, for a tensor with merged heads."""
    return lambda value: change(value.unflatten(-1, (heads, -1))).flatten(2)


def third(change: Callable[[Tensor], Tensor], which: int, heads: int, inner: bool) -> Callable[[Tensor], Tensor]:
    """The change on q, k or v of a fused projection: `[q | k | v]`, or `[q | k | v]` within each head."""

    def changed(value: Tensor) -> Tensor:
        parts = list(value.unflatten(-1, (heads, 3, -1)).unbind(-2) if inner else value.chunk(3, -1))
        whole = change(parts[which] if inner else parts[which].unflatten(-1, (heads, -1)))
        parts[which] = whole if inner else whole.flatten(2)
        return torch.stack(parts, -2).flatten(2) if inner else torch.cat(parts, -1)

    return changed


def softmax_by_hand(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Eager attention with a change of its pattern, whose axis of queries is the third."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **more: Any
    ) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if more.get("softcap") is not None:
            scores = torch.tanh(scores / more["softcap"]) * more["softcap"]
        pattern = change((scores if mask is None else scores + mask).softmax(-1).transpose(1, 2)).transpose(1, 2)
        return (pattern @ value).transpose(1, 2).contiguous(), pattern

    return lambda original: attention


def by_hand(hf: Any, index: int, name: str) -> contextlib.AbstractContextManager[None] | None:
    """The change `halved` of a site, without the package; ``None`` where another test covers the site."""
    part, _, site = name.rpartition(".")
    config, kind = hf.config, family(hf)
    heads = getattr(config, "num_attention_heads", 0)
    layer = layer_of(hf, index)
    if name == "resid_pre" and hasattr(layer, "pre_ln"):
        return hooked(layer.pre_ln, halved, "output")
    if name in ("resid_pre", "resid_post"):
        return hooked(layer, halved, "input" if name == "resid_pre" else "output")
    if part in ("", "moe"):
        return None
    module = part_of(hf, index, part)
    if (kind, name) in PLACES:
        path, side, split = PLACES[kind, name]
        change = by_heads(halved, getattr(config, split)) if split else halved
        return hooked(module.get_submodule(path), change, side)
    if name in ("ssm.input_gate", "ssm.recurrence_gate") and kind == "recurrent_gemma":
        return sigmoid_changed(module.rg_lru, 0 if site == "input_gate" else 1)
    if name in ("ssm.in_proj", "conv.in_proj"):
        return hooked(module.in_proj_qkvz if kind == "qwen3_next" else module.in_proj, halved, "output")
    if name in ("ssm.q_proj", "ssm.k_proj", "ssm.v_proj"):
        return hooked(module.get_submodule(site), halved, "output")
    if name == "ssm.qkv_proj":
        return hooked(module.in_proj_qkv, halved, "output")
    if name in ("conv.B", "conv.C", "conv.x"):
        return hooked(module.in_proj, third(halved, "BCx".index(site), 1, False), "output")
    if name == "ssm.gate" and kind in GATE:
        return hooked(module.get_submodule(GATE[kind]), halved, "output")
    if name in ("ssm.gated", "conv.gated"):
        return hooked(module.get_submodule("out_proj" if hasattr(module, "out_proj") else "o_proj"), halved, "input")
    if name in ("ssm.conv", "conv.y"):
        return inside(hf, module, causal_conv1d_fn=lambda f: lambda *a, **k: halved(f(*a, **k).mT).mT)
    if name == "attn.z":
        return hooked(module.get_submodule(MERGE.get(kind, "o_proj")), by_heads(halved, heads), "input")
    if name == "attn.pattern":
        return inside(hf, module, eager_attention_forward=softmax_by_hand(halved))
    if name == "mlp.in":
        return hooked(module, halved, "input")
    if name == "mlp.hidden":
        return hooked(module.get_submodule(DOWN.get(kind, "down_proj")), halved, "input")
    if name == "attn.latent":
        return hooked(module.kv_a_layernorm, halved, "output")
    if name in ("attn.k", "attn.v") and hasattr(module, "expand_kv"):
        return expanded(module, "kv".index(site))
    if name in ("attn.q", "attn.k", "attn.v"):
        which = "qkv".index(site)
        if kind in ("gpt2", "gpt_neox"):
            fused = module.c_attn if kind == "gpt2" else module.query_key_value
            return hooked(fused, third(halved, which, heads, kind == "gpt_neox"), "output")
        normed, low_rank = kind == "olmo_hybrid" and site != "v", kind == "kimi_linear" and config.q_lora_rank
        projection = module.get_submodule(f"{site}{'_norm' if normed else '_b_proj' if low_rank else '_proj'}")
        if kind.startswith(("qwen3_next", "qwen3_5")) and site == "q":  # [q | gate] in every head
            split = lambda v: torch.cat([halved(v.chunk(2, -1)[0]), v.chunk(2, -1)[1]], -1)  # noqa: E731
            return hooked(projection, by_heads(split, heads), "output")
        if getattr(config, "use_shared_attention_adapter", False):
            return None
        return hooked(projection, by_heads(halved, heads if site == "q" else config.num_key_value_heads), "output")
    return None


@contextlib.contextmanager
def expanded(module: Any, which: int) -> Iterator[None]:
    """`halved` of what latent attention expands: the keys or the values, which have their heads first."""
    own = module.expand_kv

    def expand_kv(*latents: Tensor) -> Any:
        found = list(own(*latents))
        found[which] = halved(found[which].transpose(1, 2)).transpose(1, 2)
        return found

    module.expand_kv = expand_kv
    try:
        yield
    finally:
        del module.expand_kv


@contextlib.contextmanager
def sigmoid_changed(module: nn.Module, which: int) -> Iterator[None]:
    """`halved` of one of the sigmoids that a module computes."""
    own, calls = torch.sigmoid, []

    def sigmoid(value: Tensor) -> Tensor:
        calls.append(value)
        return halved(own(value)) if len(calls) == which + 1 else own(value)

    def enter(*_: Any) -> None:
        torch.sigmoid = sigmoid

    def leave(*_: Any) -> None:
        torch.sigmoid = own

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def norm_after(hf: Any, layer: nn.Module, part: str) -> nn.Module | None:
    """What norms a branch's output before it is added, if anything does."""
    if family(hf).startswith("gemma") or (family(hf) == "olmo_hybrid" and hasattr(layer, "self_attn")):
        return layer.get_submodule("post_feedforward_layernorm" if part == "mlp" else "post_attention_layernorm")
    if family(hf) == "lfm3":
        return layer.get_submodule("post_ffn_norm" if part == "mlp" else "post_operator_norm")
    return None


def branch(hf: Any, index: int, part: str) -> contextlib.AbstractContextManager[None] | None:
    """`halved` of what a branch adds to the residual stream."""
    factor = multiplier(hf, part, index)
    layer = layer_of(hf, index)
    norm = norm_after(hf, layer, part)
    if norm is not None:
        return hooked(norm, halved, "output")
    if family(hf) == "granitemoehybrid" and part == "mlp" and layer.has_experts:
        return None  # the sum of two modules' outputs; see the test of the residual stream
    return hooked(part_of(hf, index, part), lambda value: halved(value * factor) / factor, "output")


@pytest.fixture(scope="module", params=MODELS)
def models(request: pytest.FixtureRequest) -> tuple[cb.Model, Any]:
    return load(request.param), plain(request.param)


def written(model: cb.Model, address: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        with model.trace(IDS):
            write_site(model, address, change(read_site(model, address)))
            logits = model.logits.save()
    return logits


def along_queries(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda pattern: change(pattern.transpose(1, 2)).transpose(1, 2)


def test_writing_a_site_is_changing_that_tensor_of_the_model(models: tuple[cb.Model, Any]) -> None:
    model, hf = models
    base = hf(IDS).logits.detach()
    checked = set()
    for layer in model.layers:
        for name in layer.sites:
            part, _, site = name.rpartition(".")
            if (layer.kind, name) in checked or site in ("state", "mixing"):
                continue
            change = branch(hf, layer.index, part) if site == "out" else by_hand(hf, layer.index, name)
            if change is None:
                continue
            with torch.no_grad(), change:
                expected = hf(IDS).logits
            got = written(model, f"layers.{layer.index}.{name}", along_queries(halved) if site == "pattern" else halved)
            assert relative(got, expected) < 1e-5, (layer.index, name)
            assert relative(expected, base) > 1e-5, (layer.index, name)
            checked.add((layer.kind, name))
    assert len(checked) >= 6


def test_the_ends_of_the_model_are_where_they_should_be(models: tuple[cb.Model, Any]) -> None:
    model, hf = models
    start = hf.get_input_embeddings() if family(hf) == "zamba2" else layer_of(hf, 0)
    with torch.no_grad(), hooked(start, halved, "output" if family(hf) == "zamba2" else "input"):
        expected = hf(IDS).logits
    assert relative(written(model, "embed", halved), expected) < 1e-5
    assert torch.equal(written(model, "logits", halved), halved(hf(IDS).logits.detach()))


def test_the_residual_stream_is_the_sum_of_its_branches(models: tuple[cb.Model, Any]) -> None:
    """What is read is what is added, multipliers and norms included; a changed branch is what is added instead."""
    model, hf = models
    if family(hf) == "zamba2":  # its shared block feeds the mixer
        return
    for layer in model.layers:
        outs = [name for name in layer.sites if name.endswith(".out")]
        for changed in ("", *outs):
            with torch.no_grad():
                with model.trace(IDS):
                    found = {}.save()
                    for name in layer.sites:
                        address = f"layers.{layer.index}.{name}"
                        if name in outs or name.startswith("resid"):
                            found[name] = read_site(model, address).clone()
                        if name == changed:
                            found[name] = halved(found[name])
                            write_site(model, address, found[name])
            total = found["resid_pre"] + sum(found[name] for name in outs)
            assert relative(total, found["resid_post"]) < 1e-6, (layer.index, changed)
            if "resid_mid" in found:
                late = [name for name in outs if name.startswith("mlp")]
                assert relative(found["resid_mid"] + sum(found[n] for n in late), found["resid_post"]) < 1e-6


def test_writing_between_the_halves_of_a_layer_adds_to_both(models: tuple[cb.Model, Any]) -> None:
    """resid_mid is read by a norm and added later: adding there is adding to the branch before."""
    model, hf = models
    shift = torch.linspace(-1, 1, hf.config.hidden_size)
    for layer in model.layers:
        if "resid_mid" not in layer.sites:
            continue
        part = next(name for name in ("ssm", "conv", "attn") if f"{name}.out" in layer.sites)
        module, factor = norm_after(hf, layer_of(hf, layer.index), part), 1.0
        if module is None:
            module, factor = part_of(hf, layer.index, part), multiplier(hf, part, layer.index)
        with torch.no_grad(), hooked(module, lambda value, by=shift / factor: value + by, "output"):
            expected = hf(IDS).logits
        assert relative(written(model, f"layers.{layer.index}.resid_mid", lambda v: v + shift), expected) < 1e-5


def test_a_pattern_weighs_the_values(models: tuple[cb.Model, Any]) -> None:
    model, _ = models
    for layer in model.layers:
        if "attn.pattern" not in layer.sites:
            continue
        with torch.no_grad():
            with model.trace(IDS):
                v = layer.attn.v.save()
                pattern = layer.attn.pattern.save()
                z = layer.attn.z.save()
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
        assert (pattern.triu(1) == 0).all()
        v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
        mixed = torch.einsum("bhts,bshp->bthp", pattern, v)
        if model.architecture.startswith(
            ("qwen3_next", "qwen3_5", "lfm3", "bailing_hybrid")
        ):  # their output gate comes between
            assert relative(z, mixed) > 1e-2
            assert ((z / mixed) > 0).float().mean() > 0.99
        else:
            assert relative(z, mixed) < 1e-5


@pytest.mark.parametrize("variant", ROUTER)
def test_the_router_reads_the_mlps_input_and_chooses_the_experts(variant: str) -> None:
    model, hf = load(variant), plain(variant)
    layer = next(layer for layer in model.layers if "moe.router" in layer.sites)
    router, norm = (layer_of(hf, layer.index).get_submodule(path) for path in ROUTER[variant])
    seen: list[Tensor] = []
    with torch.no_grad(), hooked(norm, lambda value: seen.append(value) or value, "output"):
        hf(IDS)
    with torch.no_grad():
        with model.trace(IDS):
            scores = read_site(model, f"layers.{layer.index}.moe.router").save()
    assert relative(scores, F.linear(seen[0], router.weight.detach())) < 1e-5
    got = written(model, f"layers.{layer.index}.moe.router", lambda value: value * -1)
    with torch.no_grad():
        router.weight.mul_(-1)
        assert relative(got, hf(IDS).logits) < 1e-5
