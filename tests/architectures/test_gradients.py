"""The gradient at a site is how the loss answers to writing that site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench.tracing.addresses import read_site, write_site
from tests.architectures.cases import FAMILIES, load, prompts, relative

IDS = torch.tensor(prompts(7, 7))
STEP = 1e-5


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers casts norms, softmaxes and decays to float32, which a finite difference would see as noise."""
    cast, typed, softmax = torch.Tensor.to, torch.Tensor.type, torch.nn.functional.softmax

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        single = torch.float32 in args or kwargs.get("dtype") == torch.float32
        return self if self.dtype == torch.float64 and single else cast(self, *args, **kwargs)

    def as_type(self: Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        return self if self.dtype == torch.float64 and dtype == torch.float32 else typed(self, dtype, **kwargs)

    def soft(value: Tensor, dim: int, dtype: Any = None, **kwargs: Any) -> Tensor:
        return softmax(value, dim=dim, dtype=None if value.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "type", as_type)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.to(torch.float32))
    monkeypatch.setattr(torch.nn.functional, "softmax", soft)


def readable(model: cb.Model) -> list[str]:
    return [site for site in model.sites if not site.endswith((".ssm.state", ".ssm.scale", ".ssm.mixing"))]


def one_of_each(model: cb.Model) -> list[str]:
    """One site of each name and kind of layer."""
    chosen: dict[Any, str] = {}
    for site in readable(model):
        _, layer, name = site.split(".", 2) if site.startswith("layers.") else ("", None, site)
        chosen.setdefault((name, layer and model.layers[int(layer)].kind), site)
    return list(chosen.values())


def loss_of(logits: Tensor) -> Tensor:
    """A loss that sees every position, later ones more."""
    weights = torch.linspace(-1, 2, logits[0].numel(), dtype=logits.dtype).reshape(logits[0].shape)
    return (logits.tanh() * weights).sum()


def gradient(model: cb.Model, site: str) -> tuple[Tensor, Tensor]:
    """(the site, the loss's gradient there)."""
    with model.trace(IDS):
        value = read_site(model, site)
        found = torch.autograd.grad(loss_of(model.logits), value)[0].save()
        kept = value.detach().clone().save()
    return kept, found


def loss_with(model: cb.Model, site: str, value: Tensor) -> float:
    with torch.no_grad():
        with model.trace(IDS):
            write_site(model, site, value)
            loss = loss_of(model.logits).save()
    return loss.item()


SLOPES = [
    "mamba",
    "mamba2",
    "qwen3_next",
    "falcon_h1",
    "falcon_h1-no-norm",
    "llama",
    "olmo_hybrid",
    "kimi_linear",
    "lfm2",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
]


@pytest.mark.parametrize("variant", SLOPES)
@pytest.mark.usefixtures("in_double")
def test_a_gradient_is_the_slope_of_the_same_write(variant: str) -> None:
    model = load(variant, torch.float64)
    generator = torch.Generator().manual_seed(1)
    for site in one_of_each(model):
        value, found = gradient(model, site)
        assert value.dtype == torch.float64, site
        direction = torch.randn(value.shape, generator=generator, dtype=value.dtype) * value.std()
        if site.endswith(".write"):  # of the delta rule, later writes follow what an earlier one has left behind
            direction[:, :3] = direction[:, 4:] = 0
        ends = [loss_with(model, site, value + sign * STEP * direction) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * STEP)
        assert (found * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-6), site
        assert found.abs().max() > 0, site


@pytest.mark.parametrize("variant", [*FAMILIES, "falcon_h1-no-norm"])
def test_reading_with_gradients_changes_nothing_to_the_last_bit(variant: str) -> None:
    model = load(variant)
    expected = model.hf(IDS).logits

    def run(read: Callable[[], Any]) -> Tensor:
        with model.trace(IDS):
            read()
            logits = model.logits.save()
        return logits

    def everything() -> None:
        for site in readable(model):
            read_site(model, site)

    assert torch.equal(run(everything), expected)
    for site in one_of_each(model):
        assert torch.equal(run(lambda site=site: read_site(model, site)), expected), site


@pytest.mark.parametrize("variant", ["mamba", "mamba2", "qwen3_next", "falcon_h1"])
def test_gradients_of_several_sites_come_out_of_one_run(variant: str) -> None:
    """One backward for everything that was read; an edit in between is differentiated through."""
    model = load(variant)
    names = ["resid_pre", "ssm.conv", "ssm.x", "ssm.B", "ssm.decay", "ssm.write", "ssm.y", "ssm.gated", "ssm.out"]
    sites = [f"layers.0.{name}" for name in names]
    with model.trace(IDS):
        values = [read_site(model, site) for site in sites]
        together = torch.autograd.grad(loss_of(model.logits), values).save()
    for site, found in zip(sites, together, strict=True):
        assert relative(found, gradient(model, site)[1]) < 1e-5, site
    scale = torch.ones((), requires_grad=True)
    with model.trace(IDS):
        model.layers[0].ssm.y = model.layers[0].ssm.y * scale
        slope = torch.autograd.grad(loss_of(model.logits), scale)[0].save()
    y, at_y = gradient(model, "layers.0.ssm.y")
    torch.testing.assert_close(slope, (y * at_y).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["mamba", "mamba2", "qwen3_next"])
def test_an_edit_in_place_is_differentiated_through(variant: str) -> None:
    model, scale = load(variant), torch.ones((), requires_grad=True)
    for name in ("y", "x", "B", "gated", "conv", "out", "decay"):
        slopes = []
        for in_place in (True, False):
            with model.trace(IDS):
                value = getattr(model.layers[0].ssm, name)
                if in_place:
                    value[:, 2:4] *= scale
                else:
                    changed = torch.cat([value[:, :2], value[:, 2:4] * scale, value[:, 4:]], 1)
                    setattr(model.layers[0].ssm, name, changed)
                slope = torch.autograd.grad(loss_of(model.logits), scale)[0].save()
            slopes.append(slope)
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-6, msg=name)
        assert slopes[0].abs() > 1e-7, name
