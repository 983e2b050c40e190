"""Scans that are loops in the mixer's own forward (Zamba, MiniMax): their sites, and every kind of edit of them."""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench.tracing import Add, capture, intervene
from tests.architectures import reference_loops
from tests.architectures.cases import load, prompts, relative

LENGTH, EDITED = 11, 4
IDS = torch.tensor(prompts(LENGTH, LENGTH))
MIXERS = {"zamba": reference_loops.zamba, "minimax": reference_loops.minimax}


@pytest.fixture(scope="module", params=MIXERS)
def model(request: Any) -> cb.Model:
    return load(request.param)


def by_paper(model: cb.Model, hidden: Tensor, change: Any = None, when: str = "before_read") -> list[dict[str, Tensor]]:
    """The first layer's mixer on each prompt's hidden states."""
    edit = (lambda t, h: change(h) if t == EDITED else h) if change else (lambda t, h: h)
    mixer = MIXERS[model.architecture]
    return [mixer(model.layers[0].ssm._envoy._module, row, edit, when) for row in hidden]


def mixer_input(model: cb.Model, ids: Tensor, **inputs: Any) -> Tensor:
    seen = []
    module = model.layers[0].ssm._envoy._module
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model.hf(ids, **inputs)
    handle.remove()
    return seen[0]


def doubled(h: Tensor) -> Tensor:
    return 2 * h + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_site_follows_the_papers_formulas(model: cb.Model, dtype: torch.dtype) -> None:
    model = model if dtype == torch.float32 else load(model.architecture, dtype)
    names = [name.removeprefix("ssm.") for name in model.layers[0].sites if name.startswith("ssm.")]
    names = [name for name in names if name != "mixing" and (dtype == torch.float32 or name in ("y", "state"))]
    found = capture(model, IDS, [f"layers.0.ssm.{name}" for name in names])
    scale = getattr(model.layers[0].envoy._module, "attn_beta_factor", 1.0)
    for row, expected in enumerate(by_paper(model, mixer_input(model, IDS))):
        expected["out"] = expected["out"] * scale
        for name in names:
            off = relative(found[f"layers.0.ssm.{name}"][row], expected[name])
            assert off < (1e-5 if dtype == torch.float32 else 3e-2), (name, off)


@pytest.mark.parametrize("when", ["before_read", "after_read"])
def test_an_edited_state_goes_on_as_in_the_loop(model: cb.Model, when: str) -> None:
    with torch.no_grad():
        with model.trace(IDS):
            states = model.layers[0].ssm.edit_state({EDITED: doubled}, when=when).save()
            y = model.layers[0].ssm.y.save()
            gated = model.layers[0].ssm.gated.save()
    for row, expected in enumerate(by_paper(model, mixer_input(model, IDS), doubled, when)):
        for got, name in ((states, "state"), (y, "y"), (gated, "gated")):
            assert relative(got[row], expected[name]) < 1e-5, name


def test_an_edited_state_is_an_edited_cache(model: cb.Model) -> None:
    """The prompt with the state changed after its last token, then generation, against the cache changed by hand."""
    with torch.no_grad():
        with model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None) as tracer:
            model.layers[0].ssm.edit_state({LENGTH - 1: doubled}, when="after_read", states=False)
            ids = tracer.result.save()
        out = model.hf(IDS, use_cache=True)
        cache = out.past_key_values
        edit_cached(cache)
        expected = [out.logits[:, -1].argmax(-1)]
        for _ in range(3):
            at = torch.tensor([[LENGTH + len(expected) - 1]])  # MiniMax's own default is 0 at every step
            out = model.hf(expected[-1][:, None], position_ids=at, past_key_values=cache, use_cache=True)
            expected.append(out.logits[:, -1].argmax(-1))
    assert torch.equal(ids[:, LENGTH:], torch.stack(expected, 1))


def edit_cached(cache: Any) -> None:
    if hasattr(cache, "linear_cache"):
        cache.linear_cache[0] = doubled(cache.linear_cache[0])
    else:
        cache.get_recurrent_state(0).copy_(doubled(cache.get_recurrent_state(0)))


def test_edits_while_decoding_reach_the_cache(model: cb.Model) -> None:
    """At the second step, the state and then y are changed; the steps after it follow, as by hand on the cache."""
    with torch.no_grad():
        with model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None) as tracer:
            logits = nnsight.save([])
            for step in tracer.iter[:4]:
                if step == 2:
                    state = model.layers[0].ssm.edit_state({0: doubled}, when="after_read").save()
                logits.append(model.logits[:, -1])
        cache, token, expected = None, IDS, []
        for step in range(4):
            at = torch.arange(LENGTH)[None] if step == 0 else torch.tensor([[LENGTH + step - 1]])
            out = model.hf(token, position_ids=at, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            if step == 2:
                edit_cached(cache)
                held = cache.linear_cache[0].mT if hasattr(cache, "linear_cache") else cache.get_recurrent_state(0)
                assert relative(state[:, 0], held) < 1e-6
            expected.append(out.logits[:, -1])
            token = out.logits[:, -1:].argmax(-1)
    for got, want in zip(logits, expected, strict=True):
        assert relative(got, want) < 1e-5


def test_edits_of_y_while_decoding_reach_the_logits(model: cb.Model) -> None:
    step = {"position_ids": torch.tensor([[LENGTH - 1]]), "use_cache": True}
    with torch.no_grad():
        out = model.hf(IDS[:, :-1], use_cache=True)
        with model.trace(IDS[:, -1:], past_key_values=out.past_key_values, **step):
            gated = model.layers[0].ssm.gated.save()
        out = model.hf(IDS[:, :-1], use_cache=True)
        with model.trace(IDS[:, -1:], past_key_values=out.past_key_values, **step):
            model.layers[0].ssm.y[:, :, 1] = 0
            without = model.layers[0].ssm.gated.save()
    width = gated.shape[-1] // model.layers[0].ssm._envoy._module.D.shape[0] if model.architecture == "zamba" else 8
    assert without[..., width : 2 * width].abs().max() == 0
    if model.architecture == "zamba":  # MiniMax norms all heads together
        assert torch.equal(without[..., :width], gated[..., :width])
    assert gated[..., width : 2 * width].abs().min() > 0


def test_blocks_and_gradients_meet_on_one_loop(model: cb.Model) -> None:
    """A held edit of y and a state edit in a block of one's own act together; so do two invokes, each on its rows."""
    site = "layers.0.ssm.y"
    vector = torch.randn(model.layers[0].ssm._envoy._module.D.numel() if model.architecture == "zamba" else 32)
    vector = vector.unflatten(0, (2, -1) if model.architecture == "zamba" else (4, -1))
    both = intervene(model, IDS, [Add(site, vector, strength=0.5)], sites=["layers.0.ssm.gated"])
    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke(IDS[:1]):
                model.layers[0].ssm.y = model.layers[0].ssm.y + 0.5 * vector
                first = model.layers[0].ssm.gated.save()
            with tracer.invoke(IDS[1:]):
                model.layers[0].ssm.edit_state({EDITED: doubled}, states=False)
                second = model.layers[0].ssm.gated.save()
    assert relative(first[0], both["layers.0.ssm.gated"][0]) < 1e-6
    assert relative(second[0], by_paper(model, mixer_input(model, IDS), doubled)[1]["gated"]) < 1e-5


def test_the_gradient_at_y_is_a_finite_difference(model: cb.Model) -> None:
    model = load(model.architecture, torch.float64)
    direction = torch.randn_like(capture(model, IDS[:1], "layers.0.ssm.y")["layers.0.ssm.y"])
    with model.trace(IDS[:1]):
        y = model.layers[0].ssm.y
        loss = model.logits[0, -1].square().sum()
        gradient = torch.autograd.grad(loss, y)[0].save()
    values, step = {}, 2e-3  # of fourth order, because the norms compute in float32 and small steps drown in that
    for steps in (-2, -1, 1, 2):
        with torch.no_grad():
            with model.trace(IDS[:1]):
                model.layers[0].ssm.y = model.layers[0].ssm.y + steps * step * direction
                value = model.logits[0, -1].square().sum().save()
        values[steps] = value
    slope = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)
    assert relative((gradient * direction).sum(), slope) < 2e-3


def test_a_run_without_a_cache_is_replayed_too(model: cb.Model) -> None:
    found = []
    for use_cache in (True, False):
        with torch.no_grad():
            with model.trace(IDS, use_cache=use_cache):
                model.layers[0].ssm.edit_state({EDITED: doubled}, states=False)
                logits = model.logits.save()
        found.append(logits)
    assert torch.equal(*found)
