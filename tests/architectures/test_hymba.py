"""Hymba's sites against torch's own hooks, and what they are while the model goes on from a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import circuitbench as cb
from circuitbench.models import Model
from circuitbench.tracing.addresses import axes_by_address, read_site, write_site
from tests.architectures.cases import load, plain, prompts, relative

IDS = torch.tensor(prompts(9, 9))
META = 3
LAYER = 1  # shares its keys and values with the next two, and attends to a window


@pytest.fixture(scope="module")
def hf() -> Any:
    """The model, never traced."""
    return plain("hymba")


@pytest.fixture(scope="module")
def model() -> Model:
    return load("hymba")


# site -> (module in the layer, its input or output, which of several, layout there)
PLACES: dict[str, tuple[str, str, int, str]] = {
    "resid_pre": ("", "input", 0, "plain"),
    "ssm.in_proj": ("mamba.in_proj", "output", 0, "plain"),
    "ssm.gated": ("mamba.pre_avg_layernorm2", "input", 0, "plain"),
    "ssm.branch": ("mamba.pre_avg_layernorm2", "output", 0, "plain"),
    "attn.q": ("mamba.self_attn", "input", 0, "heads"),
    "attn.k": ("mamba.self_attn", "input", 1, "groups"),
    "attn.v": ("mamba.self_attn", "input", 2, "groups"),
    "attn.z": ("mamba.pre_avg_layernorm1", "input", 0, "heads"),
    "attn.branch": ("mamba.pre_avg_layernorm1", "output", 0, "plain"),
    "ssm.out": ("mamba.out_proj", "output", 0, "first half"),
    "attn.out": ("mamba.out_proj", "output", 0, "second half"),
    "mlp.in": ("moe.experts.0", "input", 0, "plain"),
    "mlp.hidden": ("moe.experts.0.down_proj", "input", 0, "plain"),
    "mlp.out": ("moe", "output", 0, "plain"),
    "resid_post": ("", "output", 0, "plain"),
}


def taken(value: Tensor, layout: str) -> Tensor:
    """A module's tensor as the site shows it."""
    if layout == "plain":
        return value
    if "half" in layout:
        return value[int(layout == "second half")] / 2
    return value.unflatten(2, (4 if layout == "heads" else 2, -1))


def put(value: Tensor, new: Tensor, layout: str) -> Tensor:
    """The module's tensor with the site's in it."""
    if "half" in layout:
        halves = [*value]
        halves[int(layout == "second half")] = 2 * new
        return torch.stack(halves)
    return new.reshape(value.shape)


@contextlib.contextmanager
def hooked(hf: Any, site: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change a site with one of torch's hooks."""
    path, side, index, layout = PLACES[site]
    layer: nn.Module = hf.model.layers[LAYER]
    module = layer.get_submodule(path)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        new = put(args[index], change(taken(args[index], layout)), layout)
        return (*args[:index], new, *args[index + 1 :]), kwargs

    def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return put(output, change(taken(output, layout)), layout)

    if side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def halved(value: Tensor) -> Tensor:
    """Half of the last axis, at two positions."""
    value = value.clone()
    value[:, META + 3 : META + 5, ..., : value.shape[-1] // 2] *= -0.5
    return value


@pytest.mark.parametrize("site", PLACES)
def test_sites_are_what_torchs_hooks_see(hf: Any, model: Model, site: str) -> None:
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        seen["value"] = value.clone()
        return value

    with torch.no_grad():
        with hooked(hf, site, keep):
            base = hf(IDS).logits
        with hooked(hf, site, halved):
            expected = hf(IDS).logits
        assert relative(expected, base) > 1e-3  # the edit matters
        address = f"layers.{LAYER}.{site}"
        with model.trace(IDS):
            value = read_site(model, address).clone().save()
            write_site(model, address, halved(value))
            logits = model.logits.save()
    assert relative(value, seen["value"]) < 1e-6  # load_model puts another scan in
    assert relative(logits, expected) < 1e-6


def addresses(model: Model, layer: int) -> list[str]:
    return [a for a in model.sites if a.startswith(f"layers.{layer}.") and not a.endswith("mixing")]


def wanted(model: Model, asked: list[str]) -> dict[str, Tensor]:
    """Sites read in a trace, in order."""
    return {address: read_site(model, address).clone() for address in asked}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("layer", [1, 2])
def test_sites_while_going_on_from_a_cache_are_those_of_the_whole(model: Model, layer: int, count: int) -> None:
    asked = addresses(model, layer)
    start = 9 - count
    with torch.no_grad():
        with model.trace(IDS):
            whole = nnsight.save(wanted(model, asked))
        cache = DynamicCache(config=model.hf.config)
        model.hf(IDS[:, :start], past_key_values=cache)
        with model.trace(input_ids=IDS[:, start:], past_key_values=cache, use_cache=True):
            rest = nnsight.save(wanted(model, asked))
    for address in asked:
        axes = axes_by_address(model, address)
        last = tuple(
            slice(-count, None) if axis == "t" and place == axes.index("t") else slice(None)
            for place, axis in enumerate(axes)
        )
        assert relative(rest[address], whole[address][last]) < 1e-5, address


def test_a_state_edited_after_a_cache_is_one_edited_in_the_whole(model: Model) -> None:
    with torch.no_grad():
        with model.trace(IDS):
            model.layers[2].ssm.edit_state({META + 6: torch.zeros_like})
            expected = model.logits.save()
        cache = DynamicCache(config=model.hf.config)
        model.hf(IDS[:, :5], past_key_values=cache)
        with model.trace(input_ids=IDS[:, 5:8], past_key_values=cache, use_cache=True):
            model.layers[2].ssm.edit_state({1: torch.zeros_like})
            some = model.logits.save()
        rest = model.hf(IDS[:, 8:], past_key_values=cache).logits  # the cache has the edited state's successor
    assert relative(torch.cat([some, rest], 1), expected[:, 5:]) < 1e-5


def test_a_layer_that_shares_keys_says_so(model: Model) -> None:
    assert "attn.k" in model.layers[1].sites
    assert "attn.k" not in model.layers[2].sites
    with pytest.raises(cb.errors.SiteNotFound, match="layers.2.attn.k: layer 2 .hybrid. has resid_pre"):
        cb.capture(model, IDS, "layers.2.attn.k")
