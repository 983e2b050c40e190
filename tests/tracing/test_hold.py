"""Held interventions: on for every trace and generation inside the block, prompt and generated tokens, then gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench.models.prompts import encode
from circuitbench.tracing import Ablate, Add, Scale, Set, ablate, generate_text, hold, intervene, steer
from circuitbench.tracing.forward import forward
from tests.architectures.by_hand import hooked
from tests.architectures.cases import load, plain, prompts, relative

STEPS = 3
ROWS = prompts(9, 6)
IDS = torch.tensor(prompts(7))


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return load("mamba2")


def traced(model: cb.Model, ids: Tensor = IDS) -> Tensor:
    """The logits of a trace of the user's own."""
    with torch.no_grad():
        with model.trace(ids):
            logits = model.logits.save()
    return logits


def generated(model: cb.Model, ids: Tensor = IDS, **inputs: Any) -> tuple[list[int], Tensor]:
    """(tokens, logits of every step) of a generation of the user's own."""
    with torch.no_grad():
        with model.generate(ids, max_new_tokens=STEPS, min_new_tokens=STEPS, **inputs) as tracer:
            steps = [].save()
            for _ in tracer.iter[:STEPS]:
                steps.append(model.logits[:, -1].clone())
            out = tracer.result.save()
    return out[0, ids.shape[1] :].tolist(), torch.stack(steps)


def from_scratch(model: cb.Model, interventions: Any, ids: list[int]) -> tuple[list[int], Tensor]:
    """The same, by running the whole sequence again for every token."""
    tokens, steps = list(ids), []
    for _ in range(STEPS):
        logits = forward(model, encode(model, [tokens]), interventions)["logits"][0, -1]
        steps.append(logits)
        logits = logits.clone()
        logits[model.hf.config.eos_token_id] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(ids) :], torch.stack(steps)


FEW = ["mamba", "mamba2", "falcon_h1-no-norm", "qwen3_next", "gpt2"]
MORE = ["falcon_mamba", "jamba", "falcon_h1", "zamba2", "nemotron_h", "granitemoehybrid", "bamba", "gemma2"]
MORE += ["qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "lfm2_moe"]


@pytest.mark.parametrize("variant", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_generating_is_running_everything_again_for_every_token(variant: str) -> None:
    """At every kind of site: what is cached between tokens is what a whole run would have computed."""
    model = load(variant)
    names = dict.fromkeys(name for layer in model.layers for name in layer.sites if not name.endswith("mixing"))
    if "ssm.beta" in names:
        # What the delta rule writes depends on the state: a whole run scales what it writes without the intervention,
        # a decoded step what it writes now.
        del names["ssm.write"]
    if "attn.latent" in names:  # keys and values that are made from it anew at every step cannot be held
        for name in ("attn.k", "attn.v"):
            with pytest.raises(cb.BadInput, match=rf"layers.1.{name} .* made from attn.latent .* write attn.latent"):
                with hold(model, Scale(f"layers.1.{name}", 0.6)):
                    generated(model)
            del names[name]
    for name in names:
        site = next(site for site in model.sites if site.endswith(f".{name}"))
        with hold(model, Scale(site, 0.6)):
            tokens, steps = generated(model)
        again, expected = from_scratch(model, Scale(site, 0.6), IDS[0].tolist())
        assert tokens == again, site
        floored = variant in ("zamba2", "nemotron_h")  # transformers floors its dt in a sequence, not in a decoded step
        assert relative(steps[:, 0], expected) < (3e-3 if floored else 1e-4), site


def test_all_positions_include_generated_ones_and_others_count_on(model: cb.Model) -> None:
    site, ids = "layers.0.ssm.y", IDS[0].tolist()
    with hold(model, Scale(site, 0.0, positions=2)):
        found = generated(model)[1]
    assert relative(found[:, 0], from_scratch(model, Scale(site, 0.0, positions=2), ids)[1]) < 1e-5
    with hold(model, Scale(site, 0.0, positions=slice(5, None))):
        found = generated(model)[1]
    assert relative(found[:, 0], from_scratch(model, Scale(site, 0.0, positions=slice(5, None)), ids)[1]) < 1e-5
    # -1 and "last" are the prompt's last token, for good.
    expected = from_scratch(model, Scale(site, 0.0, positions=len(ids) - 1), ids)[1]
    for last in (-1, "last"):
        with hold(model, Scale(site, 0.0, positions=last)):
            assert relative(generated(model)[1][:, 0], expected) < 1e-5
    # The second generated token, which no prompt has.
    with hold(model, Scale(site, 0.0, positions=len(ids) + 1)):
        found = generated(model)[1]
    plain = generated(model)[1]
    assert torch.equal(found[:2], plain[:2])
    assert relative(found[2:], plain[2:]) > 1e-4


@pytest.mark.parametrize("variant", ["mamba", "falcon_h1", "gpt2", "bamba"])
def test_prompts_of_different_length_generate_as_alone(variant: str) -> None:
    model = load(variant)
    site = "layers.0.resid_post"
    items = [Scale(site, 0.5, positions=[1, -1]), Add(site, torch.linspace(-1, 1, 32), positions=slice(7, None))]
    with hold(model, items):
        together = generate_text(model, ROWS, max_new_tokens=STEPS)
        alone = [generate_text(model, row, max_new_tokens=STEPS) for row in ROWS]
    assert together == alone
    assert together != generate_text(model, ROWS, max_new_tokens=STEPS)


def test_steering_holds_in_traces_and_generations_of_ones_own_and_leaves_nothing_behind(model: cb.Model) -> None:
    before, tokens = traced(model), generated(model)[0]
    vector = torch.linspace(-2, 2, 32)
    with steer(model, vector, site="layers.0.resid_post", strength=3.0) as same:
        assert same is model
        steered, steered_tokens = traced(model), generated(model)[0]
        assert torch.equal(traced(model), steered)  # for every trace, not for the next
    assert relative(steered, before) > 1e-2
    assert torch.equal(traced(model), before)
    assert generated(model)[0] == tokens
    assert model.nn._edits == []
    hf = plain("mamba2")
    with hooked(hf.backbone.layers[0], lambda value: value + 3.0 * vector, "output"), torch.no_grad():
        assert relative(steered, hf(IDS).logits) < 1e-5
        by_hand = hf.generate(IDS, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    assert steered_tokens == by_hand[0, IDS.shape[1] :].tolist()
    assert steered_tokens != tokens


class Dictionary:
    """Anything with decoder directions."""

    def __init__(self) -> None:
        self.W_dec = torch.nn.functional.normalize(torch.randn(5, 64), dim=1)
        self.site = "layers.1.ssm.gated"


def test_a_feature_of_a_dictionary_is_its_decoder_direction(model: cb.Model) -> None:
    dictionary = Dictionary()
    with steer(model, dictionary, feature_id=3, strength=2.0):
        by_feature = traced(model)
    with steer(model, dictionary.W_dec[3], site=dictionary.site, strength=2.0):
        assert torch.equal(traced(model), by_feature)
    assert torch.equal(by_feature, intervene(model, IDS, Add(dictionary.site, 2 * dictionary.W_dec[3])).logits)
    with steer(model, dictionary, feature_id=3, site="layers.0.ssm.gated"):
        assert relative(traced(model), by_feature) > 1e-3


def test_nothing_stays_after_an_exception(model: cb.Model) -> None:
    before = traced(model)
    with pytest.raises(ZeroDivisionError):
        with ablate(model, "layers.0.ssm.y"):
            raise ZeroDivisionError
    with pytest.raises(cb.BadInput):  # in the middle of a trace
        with ablate(model, "layers.0.ssm.y", heads=9):
            traced(model)
    with pytest.raises(cb.SiteNotFound):
        with ablate(model, "layers.0.attn.z"):
            raise AssertionError("never entered")
    assert model.nn._edits == []
    assert torch.equal(traced(model), before)


def test_blocks_nest(model: cb.Model) -> None:
    before = traced(model)
    first, second = Scale("layers.0.ssm.y", 0.5), Add("layers.0.ssm.y", 1.0)
    with hold(model, first):
        one = traced(model)
        with hold(model, second):
            both = traced(model)
        assert torch.equal(traced(model), one)
    assert torch.equal(traced(model), before)
    assert relative(both, intervene(model, IDS, [first, second]).logits) < 1e-5


def test_ones_own_block_sees_and_follows_what_is_held(model: cb.Model) -> None:
    with ablate(model, "layers.0.ssm.y", heads=[1], positions=slice(2, None)), torch.no_grad():
        with model.trace(IDS):
            y = model.layers[0].ssm.y.save()
            model.layers[1].ssm.gated[:, -1] = 0
            logits = model.logits.save()
    assert (y[:, 2:, 1] == 0).all()
    assert (y[:, :2, 1] != 0).any()
    items = [
        Ablate("layers.0.ssm.y", heads=[1], positions=slice(2, None)),
        Set("layers.1.ssm.gated", 0.0, positions=-1),
    ]
    assert relative(logits, intervene(model, IDS, items).logits) < 1e-5


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_a_reference_stands_in_for_what_a_single_token_lacks(model: cb.Model, mode: str) -> None:
    site = "layers.0.ssm.y"
    with pytest.raises(cb.BadInput, match="reference="):
        with ablate(model, site, mode=mode):
            raise AssertionError("never entered")
    reference = cb.capture(model, prompts(8, 5, seed=5), site)[site]
    item = Ablate(site, mode, reference=reference)
    with hold(model, item):
        tokens, steps = generated(model)
    again, expected = from_scratch(model, item, IDS[0].tolist())
    assert tokens == again
    assert relative(steps[:, 0], expected) < 1e-5


def test_a_trace_of_several_prompts_is_held_in_every_block(model: cb.Model) -> None:
    with ablate(model, "layers.0.ssm.y", positions=-1), torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke(" ".join(map(str, ROWS[0]))):
                first = model.logits.save()
            with tracer.invoke(" ".join(map(str, ROWS[1]))):
                second = model.logits.save()
    for ids, got in zip(ROWS, (first, second), strict=True):
        alone = intervene(model, [ids], Ablate("layers.0.ssm.y", positions=-1)).logits[0]
        assert relative(got[0, -len(ids) :], alone) < 1e-5
