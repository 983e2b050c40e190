"""Every site of every recurrent mixer equals the paper's formulas, computed step by step in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench.models import kernels
from circuitbench.models.prompts import encode
from circuitbench.tracing import capture
from tests.architectures import reference
from tests.architectures.cases import RECURRENT, RNN, S6, SHORT_CONV, VARIANTS, load, plain, prompts, relative

LENGTHS = (13, 5, 1)  # odd, across chunks of 8 and within one, and a single token; padded to 13


def part(model: cb.Model) -> str:
    """Name of the mixer's part."""
    return "conv" if model.architecture in SHORT_CONV else "ssm"


def mixers(model: cb.Model) -> dict[int, Any]:
    """Layer index -> the mixer's module, torch's own object."""
    if part(model) == "conv":
        return {layer.index: layer.envoy._module.conv for layer in model.layers if layer.kind == "conv"}
    return {layer.index: layer.ssm._envoy._module for layer in model.layers if "ssm.y" in layer.sites}


def mixer_inputs(model: cb.Model, ids: list[list[int]]) -> dict[int, list[Tensor]]:
    """What each mixer is given for each prompt's own tokens, seen by torch's hooks."""
    batch, seen = encode(model, ids), {}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[layer] = [row[mask.bool()] for row, mask in zip(hidden, batch.attention_mask, strict=True)]

        return hook

    handles = [m.register_forward_pre_hook(keep(i), with_kwargs=True) for i, m in mixers(model).items()]
    with torch.no_grad():
        model.hf(**batch.inputs(model))
    for handle in handles:
        handle.remove()
    return seen


def as_added(model: cb.Model, layer: int, out: Tensor) -> Tensor:
    """The mixer's output as it is added to the residual stream: multiplied, or normed."""
    config, norm = model.hf.config, getattr(model.layers[layer].envoy._module, "post_operator_norm", None)
    if hasattr(norm, "weight"):
        return reference.rms(out, config.norm_eps, norm.weight.detach().double())
    return out * getattr(config, "ssm_out_multiplier", 1.0) * getattr(config, "residual_multiplier", 1.0)


def errors(model: cb.Model, ids: list[list[int]], sites: list[str] | None = None) -> dict[str, float]:
    """Largest relative error of each site against the reference, over layers and prompts."""
    own = [name for name in model.layers[min(mixers(model))].sites if name.startswith(f"{part(model)}.")]
    names = sites or [name for name in own if name != "ssm.mixing"]
    found = capture(model, ids, [f"layers.*.{name}" for name in names])
    worst: dict[str, float] = dict.fromkeys(names, 0.0)
    for layer, inputs in mixer_inputs(model, ids).items():
        for row, hidden in enumerate(inputs):
            expected = reference.mixer(model.hf.config, mixers(model)[layer], hidden)
            expected["out"] = as_added(model, layer, expected["out"])
            for name in names:
                got = found[f"layers.{layer}.{name}"][row, : len(hidden)]
                want = expected[name.partition(".")[2]]
                assert got.shape == want.shape, name
                worst[name] = max(worst[name], relative(got, want))
    return worst


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_site_of_the_mixer_follows_the_papers_formulas(variant: str) -> None:
    model = load(variant)
    leaks = any(name.endswith("in_proj.bias") for name, _ in model.hf.named_parameters())
    if leaks or model.architecture in RNN:
        with pytest.raises(
            cb.BadInput, match=("in_proj with a bias" if leaks else "runs its recurrence") + ".*one length"
        ):
            capture(model, prompts(*LENGTHS), f"layers.*.{part(model)}.y")
        batches = [prompts(LENGTHS[0], LENGTHS[0]), *(prompts(length) for length in LENGTHS[1:])]
    else:
        batches = [prompts(*LENGTHS)]
    for ids in batches:
        worst = errors(model, ids)
        assert max(worst.values()) < 1e-5, worst


@pytest.mark.parametrize("family", [*RECURRENT, "olmo_hybrid", "qwen3_5_text", *SHORT_CONV])
def test_in_bfloat16_y_and_the_state_stay_within_its_rounding(family: str) -> None:
    sites = ["conv.y", "conv.out"] if family in SHORT_CONV else ["ssm.y", "ssm.state"]
    model = load(family, torch.bfloat16)
    worst = errors(model, prompts(*((LENGTHS[0],) if family in RNN else LENGTHS)), sites)
    assert max(worst.values()) < 3e-2, worst


@pytest.mark.parametrize("family", S6)
def test_hugging_faces_own_s6_scan_gives_the_same_sites(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, calls = plain(family), []
    kernels.use_own_s6(hf)
    code = kernels.modeling_module(hf)
    own = code.mamba_selective_scan
    monkeypatch.setattr(code, "mamba_selective_scan", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    monkeypatch.setattr(kernels, "use_fast_s6", lambda hf: None)
    worst = errors(cb.load_model(hf), prompts(*LENGTHS))
    assert max(worst.values()) < 1e-5, worst
    assert calls


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.endswith(("dt-limits", "dt-floor"))])
def test_dt_is_read_after_its_clamp(variant: str) -> None:
    model = load(variant)
    family, changes = VARIANTS[variant]
    low, high = changes.get("time_step_limit", (changes.get("time_step_min"), float("inf")))
    dt = capture(model, prompts(13), "layers.0.ssm.dt")["layers.0.ssm.dt"]
    assert dt.min() == torch.tensor(low)  # the bound is met, so that its absence would show
    assert dt.max() <= torch.tensor(high)
    assert dt.unique().numel() > 2


@pytest.mark.parametrize(
    "variant",
    ["mamba2-many-groups", "falcon_h1", "qwen3_next-odd-sizes", "kimi_linear-odd-sizes", "olmo_hybrid", "xlstm"],
)
def test_the_mixing_matrix_times_x_plus_the_skip_is_y(variant: str) -> None:
    model = load(variant)
    got = capture(model, prompts(13), ["layers.0.ssm.mixing", "layers.0.ssm.x", "layers.0.ssm.y"])
    mixing, x, y = (got[f"layers.0.ssm.{name}"].double() for name in ("mixing", "x", "y"))
    skip = getattr(mixers(model)[0], "D", None)
    expected = torch.einsum("bhts,bshp->bthp", mixing, x)
    if skip is not None:
        expected = expected + skip.detach().double()[:, None] * x
    assert relative(y, expected) < 1e-5
    assert (mixing.triu(1) == 0).all()


def test_the_scale_is_what_undoes_the_units_of_a_state() -> None:
    """In natural units RWKV-4's denominator is a sum of exp(k), and the state follows the same decay at every step."""
    model = load("rwkv")
    got = capture(model, prompts(13), [f"layers.0.ssm.{name}" for name in ("k", "scale", "state")])
    k, scale, state = (got[f"layers.0.ssm.{name}"].double() for name in ("k", "scale", "state"))
    decay = torch.exp(-torch.exp(mixers(model)[0].time_decay.detach().double()))
    natural, total = state[..., 1] * scale.exp(), torch.zeros_like(scale[:, 0])
    for t in range(13):
        total = decay * total + k[:, t].exp()
        assert relative(natural[:, t], total) < 1e-5


@pytest.mark.parametrize("family", [*S6, "recurrent_gemma", "rwkv"])
def test_a_channels_mixing_matrix_times_x_plus_the_skip_is_y(family: str) -> None:
    model, channels = load(family), [0, 7, 31]
    ids = torch.tensor(prompts(13))
    with torch.no_grad():
        with model.trace(ids):
            x = model.layers[0].ssm.x.save()
            mixing = model.layers[0].ssm.mixing(channels=channels).save()
            y = model.layers[0].ssm.y.save()
    expected = torch.einsum("bcts,bsc->btc", mixing, x[..., channels])
    if family in S6:
        expected = expected + mixers(model)[0].D.detach()[channels] * x[..., channels]
    assert relative(y[..., channels], expected) < 1e-5
