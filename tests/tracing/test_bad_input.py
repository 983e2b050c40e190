"""What cannot be done is said in one sentence: what was given, what is allowed, what to type instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch

import circuitbench as cb
from circuitbench.tracing import (
    Ablate,
    Add,
    Intervention,
    Knockout,
    Scale,
    Set,
    ablate,
    capture,
    generate_text,
    intervene,
    resolve,
    steer,
)
from circuitbench.tracing.addresses import read_site
from tests.architectures.cases import load, prompts

IDS = torch.tensor(prompts(6))
TWO = prompts(6, 4)
Y = "layers.0.ssm.y"


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the run-time type checks of the test suite, which would speak before the package does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def models() -> dict[str, cb.Model]:
    return {name: load(name) for name in ("mamba2", "mamba", "jamba", "gpt2")}


@pytest.fixture
def model(models: dict[str, cb.Model]) -> cb.Model:
    return models["mamba2"]


def refused(error: type[cb.CircuitbenchError], sentence: str, call: Callable[[], Any]) -> None:
    """The call raises this error, with one line that the sentence is found in."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert re.search(sentence, message), message
    assert "\n" not in message
    assert len(message) < 450


def in_a_trace(model: cb.Model, block: Callable[[], Any]) -> None:
    with torch.no_grad():
        with model.trace(IDS):
            block()


def assigned(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "sentence"),
    [
        ("layers.0.ssm.foo", r"layers.0.ssm.foo: layer 0 \(ssm\) has resid_pre, ssm.in_proj, .*resid_post"),
        ("layers.0.attn.q", r"layers.0.attn.q: layer 0 \(ssm\) has"),
        ("layers.*.attn.q", r"layers.\*.attn.q: no layer of this model has it"),
        ("layers.7.ssm.y", "layers.7.ssm.y: this model has layers 0 to 1"),
        ("layers.-3.ssm.y", "this model has layers 0 to 1"),
        ("ssm.y", "no site 'ssm.y'; did you mean layers.1.ssm.y"),
        ("", "no site ''; .*lists the sites"),
        ([3], "named by its address, like 'layers.3.ssm.y', not by a int"),
    ],
)
def test_sites_that_are_not_there(model: cb.Model, site: Any, sentence: str) -> None:
    error = cb.SiteNotFound if isinstance(site, str) else cb.BadInput
    refused(error, sentence, lambda: resolve(model, site))
    refused(error, sentence, lambda: capture(model, IDS, site))
    refused(cb.BadInput, "names no site", lambda: capture(model, IDS, []))


def test_views_that_are_not_there(models: dict[str, cb.Model]) -> None:
    mamba2, jamba = models["mamba2"], models["jamba"]
    refused(cb.SiteNotFound, "no layer 9; this model has layers 0 to 1", lambda: mamba2.layers[9])
    refused(cb.SiteNotFound, "no layer slice", lambda: mamba2.layers[0:1])
    refused(cb.SiteNotFound, r"layers.0 \(ssm\) has no site 'attn'; it has resid_pre", lambda: mamba2.layers[0].attn)
    refused(cb.SiteNotFound, "layers.0.ssm has no site 'q'; it has in_proj", lambda: mamba2.layers[0].ssm.q)
    refused(cb.SiteNotFound, r"layers.1 \(attention\) has no site 'ssm'", lambda: jamba.layers[1].ssm)
    refused(cb.SiteNotFound, "no site or attribute 'foo'; it has embed, logits", lambda: mamba2.foo)
    refused(cb.SiteNotFound, "no site 'foo' to write", assigned(mamba2, "foo", 1))
    refused(cb.SiteNotFound, "no site 'foo'", assigned(mamba2.layers[0], "foo", 1))
    refused(cb.SiteNotFound, "no site 'foo'", assigned(mamba2.layers[0].ssm, "foo", 1))
    assert not hasattr(mamba2.layers[0], "attn")
    assert not hasattr(mamba2, "foo")


@pytest.mark.parametrize(
    "block",
    [
        lambda models: models["mamba2"].layers[0].ssm.y,
        lambda models: models["mamba2"].layers[0].ssm.edit_state({0: torch.zeros_like}),
        lambda models: models["mamba2"].layers[0].resid_pre,
        lambda models: models["mamba2"].logits,
        lambda models: models["gpt2"].layers[0].attn.pattern,
        lambda models: setattr(models["mamba2"].layers[0].ssm, "y", torch.zeros(1)),
        lambda models: setattr(models["gpt2"].layers[0].attn, "z", torch.zeros(1)),
    ],
)
def test_outside_of_a_trace_there_is_nothing_to_read(models: dict[str, cb.Model], block: Any) -> None:
    refused(cb.BadInput, "(layers.0|logits).* while the model runs: inside `with model.trace", lambda: block(models))


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("", "The prompt has no tokens"),
        ([], "There are no prompts"),
        ([[3], []], "Prompt 1 has no tokens"),
        (torch.zeros(1, 0, dtype=torch.long), "The prompt has no tokens"),
        (torch.zeros(1, 3), r"integers of shape \(b, t\), not torch.float32"),
        (torch.zeros(1, 3, 3, dtype=torch.long), r"integers of shape \(b, t\), not torch.int64 of shape \(1, 3, 3\)"),
        ([[3, 97]], "token ids from 3 to 97; the vocabulary is 0 to 96"),
        ([[3, -1]], "token ids from -1 to 3"),
        ("hello world", r"no tokenizer, so prompts are token ids.*load_model\(..., tokenizer=...\)"),
        (None, "Prompts are strings, token ids, or a mapping"),
        (["5 3", [3]], "Prompts are strings, token ids, or a mapping"),
        ({"ids": [1]}, "holds input_ids .* this one holds ids"),
        ({"input_ids": [[3, 4, 5]], "attention_mask": [[1, 0, 1]]}, "hole between real tokens"),
        ({"input_ids": [[3, 4, 5]], "attention_mask": [[1, 0]]}, r"these are \(1, 3\) and \(1, 2\)"),
    ],
)
def test_prompts_that_are_none(model: cb.Model, given: Any, sentence: str) -> None:
    refused(cb.BadInput, sentence, lambda: capture(model, given, Y))
    refused(cb.BadInput, sentence, lambda: generate_text(model, given))


def test_prompts_longer_than_the_model_takes(models: dict[str, cb.Model]) -> None:
    long = [list(range(3, 90)) * 3]
    refused(cb.BadInput, "261 tokens, and this model takes 256", lambda: capture(models["gpt2"], long, "logits"))
    refused(
        cb.BadInput,
        "max_new_tokens=10, the longest prompt becomes 260 tokens, and this model takes 256",
        lambda: generate_text(models["gpt2"], [5] * 250, max_new_tokens=10),
    )
    assert capture(models["mamba2"], long, "logits")["logits"].shape == (1, 261, 97)  # no limit of its own


# Where an intervention acts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "sentence"),
    [
        (6, "Position 6 is out of range: .* positions run from -4 to 3"),
        (4, "Position 4 is out of range: the shortest prompt has 4 tokens"),
        (-5, "Position -5 is out of range"),
        ([0, 9], "Position 9 is out of range"),
        ("first", 'the only name is "last"'),
        (1.5, "give ints, a slice, a boolean mask, or 'last'"),
        ([1.5], "positions holds 1.5"),
        ([True], "positions holds True"),
        ([], "selects no token"),
        (slice(9, None), "selects no token"),
        (slice(None, None, -1), "the step of a slice of positions is 1 or more"),
        (torch.ones(3, 6, dtype=torch.bool), r"mask is \(b, n\) with b=2 prompts and n=6"),
    ],
)
def test_positions_that_are_not_there(model: cb.Model, positions: Any, sentence: str) -> None:
    refused(cb.BadInput, sentence, lambda: intervene(model, TWO, Scale(Y, 0.5, positions=positions)))
    refused(cb.BadInput, sentence, lambda: intervene(model, TWO, Scale("layers.0.ssm.state", 0.5, positions=positions)))
    refused(cb.BadInput, sentence, lambda: intervene(model, TWO, Knockout("layers.0.ssm", positions)))
    refused(cb.BadInput, sentence, lambda: capture(model, TWO, Y, positions=positions))


def test_capture_keeps_as_many_positions_of_every_prompt(model: cb.Model) -> None:
    sentence = r"selects \[5, 3\] tokens .* same number of each"
    refused(cb.BadInput, sentence, lambda: capture(model, TWO, Y, positions=slice(1, None)))


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ({"heads": 4}, "layers.0.ssm.y has heads 0 to 3; heads=4"),
        ({"heads": [0, -5]}, "heads 0 to 3"),
        ({"heads": torch.tensor([9])}, "heads 0 to 3"),
        ({"heads": "a"}, "heads 0 to 3"),
        ({"channels": 16}, "channels 0 to 15"),
        ({"channels": torch.ones(3, dtype=torch.bool)}, "channels 0 to 15"),
    ],
)
def test_heads_and_channels_that_are_not_there(model: cb.Model, where: Any, sentence: str) -> None:
    refused(cb.BadInput, sentence, lambda: intervene(model, IDS, Scale(Y, 0.5, **where)))


def test_heads_of_a_site_without_heads(models: dict[str, cb.Model]) -> None:
    gated = Scale("layers.0.ssm.gated", 0.5, heads=0)
    refused(cb.BadInput, "layers.0.ssm.gated has no heads", lambda: intervene(models["mamba2"], IDS, gated))
    refused(cb.BadInput, "layers.0.ssm.y has no heads", lambda: intervene(models["mamba"], IDS, Scale(Y, 0.5, heads=0)))
    knockout = Knockout("layers.0.ssm", 0, heads=0)
    refused(
        cb.BadInput, "no heads .S6 keeps a state for every channel", lambda: intervene(models["mamba"], IDS, knockout)
    )
    knockout = Knockout("layers.0.ssm", 0, heads=9)
    refused(cb.BadInput, "heads=.9. .* 0 to 3", lambda: intervene(models["mamba2"], IDS, knockout))


# What it does there ---------------------------------------------------------------------------------------------------


def test_values_that_do_not_fit(model: cb.Model) -> None:
    refused(
        cb.BadInput,
        r"is \(1, 6, 4, 16\) here; the value given is \(5,\)",
        lambda: intervene(model, IDS, Set(Y, torch.zeros(5))),
    )
    refused(cb.BadInput, r"the vector given is \(4, 5\)", lambda: intervene(model, IDS, Add(Y, torch.zeros(4, 5))))
    refused(cb.BadInput, "value of an intervention is a number or a tensor, not 'a'", lambda: Set(Y, "a"))
    refused(cb.BadInput, "vector of an intervention is a number or a tensor, not None", lambda: Add(Y, None))
    refused(cb.BadInput, '"zero", "mean" or "resample", not \'median\'', lambda: Ablate(Y, "median"))
    reference = Ablate(Y, "mean", reference=torch.zeros(3, 5))
    refused(cb.BadInput, r"reference, \(3, 5\), has to end in \(4, 16\)", lambda: intervene(model, IDS, reference))
    reference = Ablate(Y, "mean", reference=torch.zeros(0, 4, 16))
    refused(cb.BadInput, "holds no token", lambda: intervene(model, IDS, reference))


def test_what_is_no_intervention(model: cb.Model) -> None:
    refused(cb.BadInput, "Set, Add, Scale, Ablate or Knockout, not str", lambda: intervene(model, IDS, ["a"]))
    refused(cb.BadInput, "one, or a list of them, not int", lambda: intervene(model, IDS, 3))
    refused(cb.BadInput, "says only where", lambda: intervene(model, IDS, Intervention(Y)))
    refused(cb.BadInput, "merge them", lambda: intervene(model, IDS, [Knockout("layers.0.ssm", 0)] * 2))
    both = [Knockout("layers.0.ssm", 0), Scale("layers.0.ssm.state", 0.5)]
    refused(
        cb.BadInput, "cannot share one run of the scan with edits of its state", lambda: intervene(model, IDS, both)
    )


def test_sites_that_are_only_read(models: dict[str, cb.Model]) -> None:
    mamba2, ssm = models["mamba2"], models["mamba2"].layers[0].ssm
    matrix = Scale("layers.0.ssm.mixing", 0.5)
    refused(cb.ReadOnlySite, r"use Knockout\(sources, destinations\)", lambda: intervene(mamba2, IDS, matrix))
    state, mixing = assigned(ssm, "state", torch.zeros(1)), assigned(ssm, "mixing", torch.zeros(1))
    refused(cb.ReadOnlySite, r"layers.0.ssm.edit_state\({", lambda: in_a_trace(mamba2, state))
    refused(cb.ReadOnlySite, "cb.Knockout", lambda: in_a_trace(mamba2, mixing))
    by_channel = "one matrix for every channel"
    refused(cb.BadInput, by_channel, lambda: capture(models["mamba"], IDS, "layers.0.ssm.mixing"))
    refused(
        cb.BadInput, by_channel, lambda: in_a_trace(models["mamba"], lambda: models["mamba"].layers[0].ssm.mixing())
    )


@pytest.mark.parametrize(
    ("site", "shape"),
    [("ssm.y", (1, 6, 4, 16)), ("ssm.x", (1, 6, 4, 16)), ("ssm.decay", (1, 6, 4)), ("ssm.gated", (1, 6, 64)),
     ("resid_post", (1, 6, 32))],
)  # fmt: skip
def test_writes_that_do_not_fit(model: cb.Model, site: str, shape: tuple[int, ...]) -> None:
    part, _, name = site.rpartition(".")
    owner: Any = getattr(model.layers[0], part) if part else model.layers[0]
    fits = re.escape(str(shape))

    def writing(value: Any) -> Callable[[], None]:
        return lambda: in_a_trace(model, assigned(owner, name, value))

    refused(cb.BadInput, rf"layers.0.{site} has shape {fits} here, but was given \(1, 3\)", writing(torch.zeros(1, 3)))
    double = torch.zeros(shape, dtype=torch.float64)
    refused(cb.BadInput, r"was given torch.float64; write value.to\(torch.float32\)", writing(double))
    refused(cb.BadInput, f"takes a tensor of shape {fits}, not a float", writing(0.5))


# In which order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "first", "then"),
    [
        ("mamba2", "layers.1.resid_pre", "layers.0.resid_pre"),
        ("mamba2", "layers.0.ssm.conv", "layers.0.ssm.in_proj"),
        ("mamba2", "layers.0.ssm.gated", "layers.0.ssm.y"),
        ("mamba2", "layers.0.ssm.y", "layers.0.ssm.conv"),
        ("mamba2", "layers.1.ssm.y", "layers.0.ssm.y"),
        ("mamba2", "logits", "embed"),
        ("mamba", "layers.0.ssm.y", "layers.0.ssm.conv"),
        ("gpt2", "layers.0.attn.z", "layers.0.attn.pattern"),
        ("gpt2", "layers.0.attn.out", "layers.0.attn.q"),
        ("jamba", "layers.1.mlp.out", "layers.1.moe.router"),
    ],
)
def test_sites_out_of_forward_order(models: dict[str, cb.Model], family: str, first: str, then: str) -> None:
    model = models[family]
    block = lambda: (read_site(model, first), read_site(model, then))  # noqa: E731
    refused(cb.BadInput, f"{then.rpartition('.')[0]}.*moved past.*order", lambda: in_a_trace(model, block))
    capture(model, IDS, [first, then])  # our functions put them in order, and the model is none the worse


@pytest.mark.parametrize("family", ["mamba2", "mamba"])
@pytest.mark.parametrize(
    "late",
    [
        lambda ssm: ssm.edit_state({0: torch.zeros_like}),
        lambda ssm: setattr(ssm, "x", ssm.x * 2),
        lambda ssm: ssm.knock_out(torch.ones(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)),
    ],
    ids=["state", "operand", "knockout"],
)
def test_edits_of_the_scan_that_come_too_late(models: dict[str, cb.Model], family: str, late: Any) -> None:
    model = models[family]
    ssm = model.layers[0].ssm
    refused(cb.BadInput, "moved past its scan.*forward order", lambda: in_a_trace(model, lambda: (ssm.y, late(ssm))))


def test_a_pattern_without_eager_attention(models: dict[str, cb.Model]) -> None:
    model = models["gpt2"]
    model.hf.set_attn_implementation("sdpa")
    try:
        refused(
            cb.BadInput,
            r'needs eager attention.*set_attn_implementation\("eager"\)',
            lambda: in_a_trace(model, lambda: model.layers[0].attn.pattern),
        )
    finally:
        model.hf.set_attn_implementation("eager")


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0; ask for at least 1"),
        ({"temperature": -1.0}, "temperature is 0 or more"),
        ({"top_k": 3}, "needs a temperature above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is above 0 and at most 1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k and num_beams are 1 or more"),
        ({"num_beams": 0}, "top_k and num_beams are 1 or more"),
        ({"temperature": 1.0, "num_beams": 3}, "leave temperature at 0, or num_beams at 1"),
        ({"blocking": False}, "blocking=False needs a server"),
    ],
)
def test_generation_settings_that_contradict(model: cb.Model, settings: Any, sentence: str) -> None:
    refused(cb.BadInput, sentence, lambda: generate_text(model, IDS, **settings))


def test_steering_without_saying_where_or_along_what(model: cb.Model) -> None:
    class Dictionary:
        W_dec = torch.zeros(5, 64)

    refused(cb.BadInput, 'Name the site to steer, for example site="', lambda: steer(model, torch.zeros(64)))
    refused(cb.BadInput, "a vector or a dictionary with W_dec, not str", lambda: steer(model, "a"))
    refused(cb.BadInput, "features 0 to 4", lambda: steer(model, Dictionary(), 5, site=Y))
    refused(cb.BadInput, "features 0 to 4", lambda: steer(model, Dictionary(), site=Y))
    refused(cb.BadInput, "a vector has none", lambda: steer(model, torch.zeros(64), 3, site=Y))
    with pytest.raises(cb.BadInput, match="reference="):
        with ablate(model, Y, mode="mean"):
            raise AssertionError("never entered")


def test_batches_of_no_prompts(model: cb.Model) -> None:
    refused(cb.BadInput, "batch_size=0", lambda: capture(model, IDS, Y, batch_size=0))


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "error", "sentence"),
    [
        ("no/such-model", cb.BadInput, "'no/such-model': it is no local folder, and the Hub did not provide it"),
        ("/no/such/folder", cb.BadInput, "Give a folder that holds config.json, a Hub id while there is a network"),
        ("zoo:nothing", cb.BadInput, "no zoo model 'nothing'; there are"),
        (
            "random:rwkv8",
            cb.UnsupportedModel,
            "random:rwkv8 is not a family there is a map for; there are maps for .* with names like this rwkv",
        ),
        (3, cb.BadInput, "a Hub id, a folder or a PreTrainedModel, not int"),
    ],
)
def test_models_that_are_not_there(source: Any, error: Any, sentence: str) -> None:
    refused(error, sentence, lambda: cb.load_model(source))


@pytest.mark.parametrize(
    ("config", "error", "sentence"),
    [
        (None, cb.BadInput, "has no config.json of a model"),
        ("{}", cb.BadInput, "has no config.json of a model that transformers"),
        ("not json", cb.BadInput, "config.json is not JSON"),
        ('{"model_type": "nonsense"}', cb.BadInput, "has no config.json of a model that transformers"),
        (
            '{"model_type": "bert"}',
            cb.UnsupportedModel,
            "No architecture map for model_type 'bert'; there are maps for",
        ),
    ],
)
def test_folders_that_hold_no_model(tmp_path: Any, config: str | None, error: Any, sentence: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    refused(error, sentence, lambda: cb.load_model(tmp_path))


def test_settings_of_load_model_that_do_not_exist() -> None:
    refused(cb.BadInput, "dtype='int8' is no floating-point type", lambda: cb.load_model("random:mamba2", dtype="int8"))
    refused(cb.BadInput, "cannot be put on device='nowhere'", lambda: cb.load_model("random:mamba2", device="nowhere"))
    refused(cb.BadInput, "tokenizer from 'no/such'", lambda: cb.load_model("random:mamba2", tokenizer="no/such"))
    refused(cb.BadInput, "a tokenizer of transformers", lambda: cb.load_model("random:mamba2", tokenizer=5))


def test_half_a_language_model() -> None:
    body = load("mamba2").hf.backbone
    refused(cb.UnsupportedModel, "Mamba2Model has no 'backbone.layers'.*ForCausalLM", lambda: cb.load_model(body))
