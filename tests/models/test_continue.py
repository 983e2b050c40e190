"""A prefix and what follows from its state are the whole sequence; where transformers gets that wrong, it is refused.

The oracle is transformers' own forward of whole sequences, without a cache, on a model of the same weights that nothing
of ours has touched. Differences are relative to the largest entry.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

import circuitbench as cb
from circuitbench.architectures import ARCHITECTURES
from circuitbench.models.prefix import limits
from circuitbench.models.prompts import UNMASKED
from circuitbench.models.random import random_model
from circuitbench.tracing import Add, Scale, capture, generate_text, hold, intervene
from circuitbench.tracing.addresses import axes_by_address
from tests.architectures.cases import load, plain, relative
from tests.ndif.plugin import NdifServer, save_for_server

CLOSE = 1e-5
PREFIX, LENGTH = 11, 19  # longer than the windows and chunks of the tiny configurations
IDS = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))


class Whole:
    """A model to go on with, and what transformers makes of the whole sequences."""

    def __init__(self, variant: str) -> None:
        self.model = load(variant)
        self.by_itself = plain(variant)
        self.logits = self.of(IDS)
        self.state = cb.run_prefix(self.model, IDS[:, :PREFIX])

    def of(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.by_itself(ids, use_cache=False).logits

    def scans(self) -> list[str]:
        """Addresses of recurrent states."""
        return [address for address in self.model.sites if address.endswith(".ssm.state")]


@functools.cache
def whole_of(variant: str) -> Whole:
    return Whole(variant)


@pytest.fixture(params=sorted(ARCHITECTURES))
def whole(request: pytest.FixtureRequest) -> Whole:
    return whole_of(request.param)


def test_a_prefix_and_what_follows_are_the_whole_sequence(whole: Whole) -> None:
    """At once, and in pieces: shorter than a convolution, a single token, the rest. The state that was given stays."""
    before = {name: value.clone() for name, value in whole.state.items()}
    at_once = cb.continue_from(whole.model, whole.state, IDS[:, PREFIX:])
    assert relative(at_once.logits, whole.logits[:, PREFIX:]) < CLOSE
    state, logits, start = whole.state, [], PREFIX
    for size in (2, 1, 1, LENGTH - PREFIX - 4):
        piece = cb.continue_from(whole.model, state, IDS[:, start : start + size])
        state, start = piece.state, start + size
        logits.append(piece.logits)
    assert relative(torch.cat(logits, 1), whole.logits[:, PREFIX:]) < CLOSE
    assert state.lengths.tolist() == [LENGTH] * 2 and torch.equal(state.input_ids, IDS)
    assert all(torch.equal(whole.state[name], value) for name, value in before.items())


def test_prompts_and_suffixes_of_different_length_go_on_as_alone(whole: Whole) -> None:
    rows = IDS.tolist()
    lengths, more = (PREFIX, 5), (3, 7)
    state = cb.run_prefix(whole.model, [row[:length] for row, length in zip(rows, lengths, strict=True)])
    assert state.lengths.tolist() == list(lengths)
    suffixes = [row[n : n + m] for row, n, m in zip(rows, lengths, more, strict=True)]
    found = cb.continue_from(whole.model, state, suffixes)
    again = cb.continue_from(whole.model, found.state, [[5], [6]])
    for number, (row, n, m) in enumerate(zip(rows, lengths, more, strict=True)):
        expected = whole.of(torch.tensor([[*row[: n + m], 5 + number]]))[0, n:]
        assert relative(found.logits[number, :m], expected[:m]) < CLOSE
        assert found.logits[number, m:].isnan().all()
        assert relative(again.logits[number], expected[m:]) < CLOSE


def test_the_state_is_that_of_the_sites_and_a_file_brings_it_back_bit_by_bit(whole: Whole, tmp_path: Path) -> None:
    names = [name for name in whole.state if name.endswith((".ssm.state", ".ssm.scale"))]
    assert set(whole.scans()) <= set(names)
    if names:
        found = capture(whole.model, IDS[:, :PREFIX], names, positions=[-1])
        for name in names:
            assert relative(whole.state[name], found[name][:, 0]) < CLOSE, name
    whole.state.save(tmp_path / "state.safetensors")
    back = cb.load_state(tmp_path / "state.safetensors")
    assert list(back) == list(whole.state) and back.about == whole.state.about
    assert all(torch.equal(back[name], value) for name, value in whole.state.items())
    runs = [cb.continue_from(whole.model, state, IDS[:, PREFIX:]).logits for state in (back, whole.state)]
    assert torch.equal(*runs)


def test_the_state_of_another_prompt_put_in_is_an_edit_of_the_state_in_one_run(whole: Whole) -> None:
    if not whole.scans():
        pytest.skip("no recurrent state")
    name = whole.scans()[-1]
    other = cb.run_prefix(whole.model, IDS[:, :PREFIX].flip(1))[name] * 5  # so that it shows
    column, view = whole.model.meta_tokens + PREFIX - 1, whole.model.layers[int(name.split(".")[1])].ssm
    changes = {name: other}
    if "scale" in view.sites:  # numbers in this prompt's unit
        unit = name.replace(".state", ".scale")
        with pytest.raises(cb.BadInput, match="give both"):
            whole.state.edited(changes)
        changes[unit] = whole.state[unit]
    found = cb.continue_from(whole.model, whole.state.edited(changes), IDS[:, PREFIX:]).logits
    with torch.no_grad():
        with whole.model.trace(IDS):
            view.edit_state({column: other}, when="after_read", states=False)
            expected = whole.model.logits.save()
    assert relative(found, expected[:, PREFIX:]) < CLOSE
    assert relative(found, whole.logits[:, PREFIX:]) > 1e-4


def test_what_is_generated_from_a_state_is_what_is_generated_from_the_whole_prompt(whole: Whole) -> None:
    expected = generate_text(whole.model, IDS, max_new_tokens=3)
    assert generate_text(whole.model, IDS[:, PREFIX:], state=whole.state, max_new_tokens=3) == expected


@pytest.mark.parametrize("family", ["jamba", "minimax", "xlstm"])
def test_one_prompt_is_continued_in_several_ways(family: str) -> None:
    whole = whole_of(family)
    suffixes = [IDS[0, PREFIX:].tolist(), IDS[0, PREFIX : PREFIX + 1].tolist()]
    texts = generate_text(whole.model, suffixes, state=whole.state.rows([0]), max_new_tokens=4)
    prompts = [IDS[0].tolist(), IDS[0, : PREFIX + 1].tolist()]
    assert texts == [generate_text(whole.model, prompt, max_new_tokens=4) for prompt in prompts]


# What is read and changed on the way ----------------------------------------------------------------------------------

SOME = ["mamba", "falcon_h1", "hymba", "gemma2"]
MORE = ["zamba", "minimax", "recurrent_gemma", "xlstm", "qwen3_next"]


@pytest.fixture(params=[*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def some(request: pytest.FixtureRequest) -> Whole:
    return whole_of(request.param)


def changes(whole: Whole, first: int) -> list[Any]:
    """Interventions at tokens counted from `first`."""
    found: list[Any] = [Add("layers.0.resid_pre", 0.3, positions=[first + 3])]
    if whole.scans():
        found.append(Scale(whole.scans()[0], 0.5, positions=[first + 1]))
        found.append(Add(whole.scans()[0].replace("state", "y"), 0.1, positions=[first, first + 2]))
    patterns = [address for address in whole.model.sites if address.endswith("attn.pattern")]
    if patterns:
        found.append(Scale(patterns[0], 0.2, positions=[first + 2], channels=[PREFIX - 1, PREFIX]))
    return found


def test_sites_of_what_follows_are_those_of_the_whole_sequence(some: Whole) -> None:
    sites = [address for address in some.model.sites if not address.endswith("mixing")]
    expected = capture(some.model, IDS, sites)
    found = cb.continue_from(some.model, some.state, IDS[:, PREFIX:], sites=sites)
    assert list(found.sites) == sites
    for address in sites:
        axis = axes_by_address(some.model, address).index("t")
        value = expected[address].narrow(axis, expected[address].shape[axis] - (LENGTH - PREFIX), LENGTH - PREFIX)
        assert found[address].shape == value.shape, address
        assert relative(found[address], value) < CLOSE, address


def test_interventions_on_what_follows_are_those_on_the_whole_sequence(some: Whole) -> None:
    expected = intervene(some.model, IDS, changes(some, PREFIX))
    found = cb.continue_from(some.model, some.state, IDS[:, PREFIX:], interventions=changes(some, 0))
    assert relative(found.logits, expected.logits[:, PREFIX:]) < CLOSE
    assert found.delta_norm == pytest.approx(expected.delta_norm, rel=1e-4)
    with hold(some.model, changes(some, PREFIX)):  # what is held counts from the beginning of the prompt
        held = cb.continue_from(some.model, some.state, IDS[:, PREFIX:])
    assert relative(held.logits, expected.logits[:, PREFIX:]) < CLOSE
    one = cb.continue_from(some.model, some.state, IDS[:, PREFIX : PREFIX + 1], interventions=Add("embed", 0.2))
    changed = intervene(some.model, IDS[:, : PREFIX + 1], Add("embed", 0.2, positions=[PREFIX]))
    assert relative(one.logits, changed.logits[:, -1:]) < CLOSE


def test_generation_from_a_state_is_held_on_to() -> None:
    whole = whole_of("falcon_h1")
    late = Add("layers.0.resid_post", torch.linspace(-2, 2, 32), positions=slice(PREFIX, None))
    expected = generate_text(whole.model, IDS, max_new_tokens=4, interventions=late)
    assert expected != generate_text(whole.model, IDS, max_new_tokens=4)
    settings = {"state": whole.state, "max_new_tokens": 4, "interventions": late}
    assert generate_text(whole.model, IDS[:, PREFIX:], **settings) == expected


def test_attention_to_padding_and_to_what_a_window_has_forgotten_is_none() -> None:
    model = load("gemma2", sliding_window=4)
    rows = [IDS[0, :PREFIX].tolist(), IDS[1, :6].tolist()]
    state, site = cb.run_prefix(model, rows), "layers.0.attn.pattern"
    assert state["layers.0.attn.k"].shape[1] == 3 and state["layers.1.attn.k"].shape[1] == PREFIX
    found = cb.continue_from(model, state, IDS[:, :2], sites=site)[site]
    for number, row in enumerate(rows):
        tokens = torch.tensor([[*row, *IDS[number, :2].tolist()]])
        expected = capture(model, tokens, site)[site][0, :, -2:]
        assert relative(found[number, ..., : tokens.shape[1]], expected) < CLOSE
        assert found[number, ..., tokens.shape[1] :].isnan().all()


# States as values -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mamba() -> Whole:
    return whole_of("mamba")


def test_a_state_is_changed_in_place_or_as_a_copy(mamba: Whole) -> None:
    name = "layers.1.ssm.state"
    state = mamba.state.copy()
    copied = state.edited({"layers.*.ssm.state": torch.zeros_like, "layers.0.ssm.conv_state": lambda value: value + 1})
    assert not copied[name].any() and state[name].any()
    assert torch.equal(copied["layers.0.ssm.conv_state"], state["layers.0.ssm.conv_state"] + 1)
    state[name][:, 3] = 0
    state["layers.0.ssm.state"] = state["layers.0.ssm.state"] * 2
    assert not state[name][:, 3].any() and mamba.state[name][:, 3].any()
    assert torch.equal(state["layers.0.ssm.state"], mamba.state["layers.0.ssm.state"] * 2)
    assert "layers.1.ssm.state" in repr(state) and "11, 11" in repr(state)
    with pytest.raises(cb.SiteNotFound, match=r"no .layers.1.ssm.h.; it has layers.1.ssm.state"):
        state["layers.1.ssm.h"]
    with pytest.raises(cb.SiteNotFound, match="no 'layers.7.ssm.state'"):
        state.edited({"layers.7.ssm.state": torch.zeros_like})
    with pytest.raises(cb.BadInput, match=r"layers.1.ssm.state has shape \(2, 64, 8\) here, but was given \(2, 64\)"):
        state[name] = torch.zeros(2, 64)
    with pytest.raises(cb.BadInput, match="float64"):
        state[name] = state[name].double()


def test_one_prompt_goes_on_in_several_ways(mamba: Whole) -> None:
    one = mamba.state.rows([0])
    suffixes = IDS[:, PREFIX:]
    found = cb.continue_from(mamba.model, one, suffixes)
    for number in range(2):
        expected = mamba.of(torch.cat([IDS[0, :PREFIX], suffixes[number]])[None])
        assert relative(found.logits[number], expected[0, PREFIX:]) < CLOSE
    twice = cb.continue_from(mamba.model, one.repeat(2), suffixes)
    assert torch.equal(twice.logits, found.logits)
    assert (
        relative(
            cb.continue_from(mamba.model, mamba.state.rows([1, 0]), suffixes.flip(0)).logits.flip(0),
            mamba.logits[:, PREFIX:],
        )
        < CLOSE
    )
    with pytest.raises(cb.BadInput, match="state is of 2 prompts, and there are 3 suffixes; give 2, one for each"):
        cb.continue_from(mamba.model, mamba.state, [[5], [6], [7]])
    with pytest.raises(cb.BadInput, match="times=0"):
        one.repeat(0)
    with pytest.raises(cb.BadInput, match="prompts 0 to 1"):
        mamba.state.rows([2])


def test_text_goes_on_without_the_special_tokens_of_a_beginning() -> None:
    model = cb.load_model("zoo:pylm-hybrid")
    prefix, suffix = "import os\nimport ", "sys\n"
    whole = [*model.tokenizer(prefix)["input_ids"], *model.tokenizer(suffix, add_special_tokens=False)["input_ids"]]
    found = cb.continue_from(model, cb.run_prefix(model, prefix), suffix)
    with torch.no_grad():
        expected = model.hf(torch.tensor([whole]), use_cache=False).logits
    assert relative(found.logits, expected[:, -found.logits.shape[1] :]) < CLOSE


def test_a_state_of_another_model_is_refused(mamba: Whole, tmp_path: Path) -> None:
    def refused(model: cb.Model, sentence: str) -> None:
        with pytest.raises(cb.BadInput, match=f"{sentence}.*run_prefix"):
            cb.continue_from(model, mamba.state, [[5], [6]])
        with pytest.raises(cb.BadInput, match=sentence):
            generate_text(model, [[5], [6]], state=mamba.state)

    refused(load("mamba2"), "is of a mamba, and the model is a mamba2")
    refused(load("mamba", state_size=4), "a mamba of another configuration")
    refused(load("mamba", torch.float64), "is of a model in torch.float32, and the model is in torch.float64")
    refused(cb.load_model(random_model(ARCHITECTURES["mamba"], seed=1)), "a mamba with other weights")
    changed = load("mamba")
    assert cb.continue_from(changed, mamba.state, [[5], [6]]).lengths.tolist() == [1, 1]
    with torch.no_grad():
        changed.hf.get_parameter("backbone.layers.1.mixer.D")[7] += 1
    refused(changed, "a mamba with other weights")
    plain("mamba").save_pretrained(tmp_path)
    found = cb.continue_from(cb.load_model(tmp_path), mamba.state, IDS[:, PREFIX:])  # the same model, from its folder
    assert relative(found.logits, mamba.logits[:, PREFIX:]) < CLOSE


def test_a_state_of_rwkv_fits_a_model_that_has_not_run_yet() -> None:
    """Its first forward rescales the weights."""
    whole = whole_of("rwkv")
    found = cb.continue_from(load("rwkv"), whole.state, IDS[:, PREFIX:])
    assert relative(found.logits, whole.logits[:, PREFIX:]) < CLOSE


def test_a_file_that_is_no_state_is_refused(mamba: Whole, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(cb.BadInput, match="There is no file"):
        cb.load_state(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(cb.BadInput, match="is no safetensors file"):
        cb.load_state(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(cb.BadInput, match="is a safetensors file, but no state"):
        cb.load_state(path)
    mamba.state.save(path)
    tensors = load_file(path)
    about = {**mamba.state.about, "format": "1"}
    save_file(tensors, path, {**about, "transformers": "5.1.0"})
    with pytest.raises(cb.VersionMismatch, match="made with transformers 5.1.0, here is .* run the prefix again"):
        cb.load_state(path)
    save_file(tensors, path, {**about, "format": "0", "circuitbench": "0.0.1"})
    with pytest.raises(cb.VersionMismatch, match="written by circuitbench 0.0.1"):
        cb.load_state(path)


# Elsewhere ------------------------------------------------------------------------------------------------------------


SLOW = [pytest.param(f, "server", marks=pytest.mark.slow) for f in ("mamba", "falcon_h1", "minimax", "rwkv", "xlstm")]


@pytest.mark.parametrize(("family", "where"), [("zamba2", "local"), ("recurrent_gemma", "server"), *SLOW])
def test_a_state_travels(family: str, where: str, ndif_server: NdifServer, tmp_path: Path) -> None:
    served = cb.load_model(save_for_server(random_model(ARCHITECTURES[family], vocab_size=257), tmp_path))
    remote = "local" if where == "local" else ndif_server.url
    here, there = (cb.run_prefix(served, IDS[:, :PREFIX], remote=at) for at in (False, remote))
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=1e-5, atol=1e-6, msg=name)
    found, expected = (
        cb.continue_from(served, here, IDS[:, PREFIX:], sites="layers.0.resid_post", remote=at)
        for at in (remote, False)
    )
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sites, expected.sites, rtol=1e-5, atol=1e-5)
    texts = [generate_text(served, IDS[:, PREFIX:], state=here, max_new_tokens=3, remote=at) for at in (remote, False)]
    assert texts[0] == texts[1]


# What transformers gets wrong -----------------------------------------------------------------------------------------


def cache_name(hf: Any) -> str:
    return "cache_params" if hf.config.model_type in ("mamba", "falcon_mamba", "mamba2") else "past_key_values"


def continued(hf: Any, ids: Tensor, size: int, **inputs: Any) -> Tensor:
    """Logits of what follows the prefix, by transformers alone, `size` tokens at a time from its own cache."""
    name, logits = cache_name(hf), []
    with torch.no_grad():
        cache = DynamicCache(config=hf.config) if hf.config.model_type == "recurrent_gemma" else None
        out = hf(ids[:, :PREFIX], use_cache=True, **({} if cache is None else {name: cache}))
        for start in range(PREFIX, ids.shape[1], size):
            given = {key: make(start, min(size, ids.shape[1] - start)) for key, make in inputs.items()}
            cache = out.get(name) if cache is None else cache
            out = hf(ids[:, start : start + size], use_cache=True, **{name: cache}, **given)
            logits.append(out.logits)
    return torch.cat(logits, 1)


def positions(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count)[None].expand(len(IDS), -1)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba", "zamba", "recurrent_gemma"])
def test_several_tokens_that_start_again_from_zero(family: str) -> None:
    whole = whole_of(family)
    wrong = continued(whole.by_itself, IDS, 4)
    assert relative(wrong, whole.logits[:, PREFIX:]) > 1e-4
    with pytest.raises(cb.BadInput, match=f"4 tokens follow a cached state.*{family} from zero.*continue_from"):
        continued(whole.model.hf, IDS, 4)
    assert relative(continued(whole.model.hf, IDS, 1), whole.logits[:, PREFIX:]) < CLOSE
    name = cache_name(whole.model.hf)
    with torch.no_grad():
        cache = DynamicCache(config=whole.model.hf.config)
        whole.model.hf(IDS[:, :PREFIX], use_cache=True, **{name: cache})
        with pytest.raises(cb.BadInput, match="8 tokens follow a cached state"):
            with whole.model.trace(IDS[:, PREFIX:], **{name: cache}):  # whatever it touches
                whole.model.layers[0].resid_pre.save()


@pytest.mark.parametrize("family", ["bamba", "minimax"])
def test_positions_that_start_again_from_zero(family: str) -> None:
    whole = whole_of(family)
    assert relative(continued(whole.by_itself, IDS, 1), whole.logits[:, PREFIX:]) > 1e-3
    with pytest.raises(cb.BadInput, match=r"without position_ids.*pass position_ids=torch.arange\(n, n \+ 1\)"):
        continued(whole.model.hf, IDS, 1)
    assert relative(continued(whole.model.hf, IDS, 1, position_ids=positions), whole.logits[:, PREFIX:]) < CLOSE


@pytest.mark.parametrize("variant", ["zamba2-dt-floor", "nemotron_h-dt-floor", "bamba-dt-limits"])
def test_single_steps_keep_the_limits_of_dt(variant: str) -> None:
    whole = whole_of(variant)
    assert limits(whole.model)
    given = {"position_ids": positions} if variant.startswith("bamba") else {}
    assert relative(continued(whole.by_itself, IDS, 1, **given), whole.logits[:, PREFIX:]) > 1e-4
    state, ids, steps = whole.state, IDS[:, :PREFIX], []
    for column in range(PREFIX, PREFIX + 4):
        step = cb.continue_from(whole.model, state, IDS[:, column : column + 1])
        state = step.state
        steps.append(step.logits)
    assert relative(torch.cat(steps, 1), whole.logits[:, PREFIX : PREFIX + 4]) < CLOSE
    expected = []
    for _ in range(4):
        expected.append(whole.of(ids)[:, -1].argmax(-1, keepdim=True))
        ids = torch.cat([ids, expected[-1]], 1)
    words = [" ".join(str(token) for token in row if token > 2) for row in torch.cat(expected, 1).tolist()]
    assert not (torch.cat(expected, 1) == 1).any()  # none of them ends
    assert generate_text(whole.model, IDS[:, :PREFIX], max_new_tokens=4) == words
    shorter = cb.run_prefix(whole.model, IDS[:, : PREFIX - 1])
    assert generate_text(whole.model, IDS[:, PREFIX - 1 : PREFIX], state=shorter, max_new_tokens=4) == words


def padded(side: str, length: int = 7) -> dict[str, Tensor]:
    """The two prompts, the second of them cut and padded."""
    fill = torch.full((PREFIX - length,), 2)
    row = [fill, IDS[1, :length]] if side == "left" else [IDS[1, :length], fill]
    ids = torch.stack([IDS[0, :PREFIX], torch.cat(row)])
    mask = torch.ones_like(ids)
    mask[1] = torch.cat([torch.zeros_like(fill) if part is fill else torch.ones_like(part) for part in row])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1", "qwen3_next", "lfm2", "minimax"])
def test_padding_on_the_right_goes_through_the_state(family: str) -> None:
    """The logits of real tokens are right, what is kept is not."""
    model, hf = load(family), plain(family)
    given = padded("right")
    with torch.no_grad():
        alone = hf(IDS[1:, :7], use_cache=True)
        wrong = hf(**given, use_cache=True)
        assert relative(wrong.logits[1, :7], alone.logits[0]) < CLOSE
    if family not in ("lfm2", "minimax"):
        name = cache_name(hf)
        states = [out[name].layers[0].recurrent_states[0] for out in (wrong, alone)]
        assert relative(states[0][1], states[1][0]) > 1e-3
    with pytest.raises(cb.BadInput, match="padding on the right.*Pad on the left"):
        model.hf(**given)
    with pytest.raises(cb.BadInput, match="padding on the right"):
        with model.trace(**given):
            model.logits.save()
    with torch.no_grad():
        assert relative(model.hf(**given, use_cache=False).logits[1, :7], alone.logits[0]) < CLOSE
    both = cb.run_prefix(model, given)  # our functions take padding on either side, and move it
    found = cb.continue_from(model, both, IDS[:, :2])
    expected = cb.continue_from(model, cb.run_prefix(model, IDS[1:, :7]), IDS[1:, :2])
    assert relative(found.logits[1:], expected.logits) < CLOSE


def test_transformers_and_families_that_mask_everything_may_be_padded_on_the_right() -> None:
    for family in ("llama", "rwkv7"):
        hf = load(family).hf
        with torch.no_grad():
            logits = hf(**padded("right")).logits[1, :7]
            assert relative(logits, hf(IDS[1:, :7]).logits[0]) < CLOSE


@pytest.mark.parametrize("family", UNMASKED)
def test_padding_that_nothing_masks(family: str) -> None:
    model, hf = load(family), plain(family)
    given = padded("left")
    with torch.no_grad():
        alone = hf(IDS[1:, :7]).logits[0]
        assert relative(hf(**given).logits[1, -7:], alone) > 1e-3
    with pytest.raises(cb.BadInput, match="padding, and transformers runs the recurrence.*prompts of one length"):
        model.hf(**given)
    with pytest.raises(cb.BadInput, match="prompts of one length at a time"):
        intervene(model, given, ())
    state = cb.run_prefix(model, given)
    assert state.lengths.tolist() == [PREFIX, 7]


def test_several_prompts_of_rwkv_one_token_at_a_time() -> None:
    whole = whole_of("rwkv")

    def step(hf: Any, rows: int) -> Tensor:
        with torch.no_grad():
            state = hf(IDS[:rows, :PREFIX], use_cache=True).state
            return hf(IDS[:rows, PREFIX : PREFIX + 1], state=state, use_cache=True).logits

    assert step(whole.by_itself, 2).shape[1] == 2  # two logits for one token
    with pytest.raises(cb.BadInput, match="each of 2 prompts, and transformers then mixes"):
        step(whole.model.hf, 2)
    assert relative(step(whole.model.hf, 1), whole.logits[:1, PREFIX : PREFIX + 1]) < CLOSE
    words = generate_text(whole.model, IDS, max_new_tokens=4)
    assert words == [generate_text(whole.model, row, max_new_tokens=4) for row in IDS]


def test_the_modules_of_recurrent_gemma_keep_the_state_of_the_last_run() -> None:
    whole = whole_of("recurrent_gemma")

    def first(hf: Any, ids: Tensor) -> tuple[Tensor, Any]:
        cache = DynamicCache(config=hf.config)
        with torch.no_grad():
            return hf(ids, use_cache=True, past_key_values=cache).logits, cache

    first(whole.by_itself, IDS)
    assert relative(first(whole.by_itself, IDS[:, :1])[0], whole.logits[:, :1]) > 1e-4  # as ``generate`` calls it
    _, cache = first(whole.model.hf, IDS[:, :PREFIX])
    assert relative(first(whole.model.hf, IDS[:, :1])[0], whole.logits[:, :1]) < CLOSE
    with pytest.raises(cb.BadInput, match="another run has been there"):
        whole.model.hf(IDS[:, PREFIX : PREFIX + 1], use_cache=True, past_key_values=cache)


@pytest.mark.parametrize("family", ["minimax", "recurrent_gemma"])
def test_the_states_go_with_the_beams(family: str) -> None:
    """Beam search puts another past in the place of a prompt's own; here, those of two prompts change places."""
    whole, beams = whole_of(family), torch.tensor([1, 0])

    def swapped(hf: Any, reorder: Callable[[Any], Any]) -> Tensor:
        cache = DynamicCache(config=hf.config) if family == "recurrent_gemma" else None
        with torch.no_grad():
            out = hf(IDS[:, :PREFIX], use_cache=True, past_key_values=cache)
            cache = out.past_key_values if cache is None else cache
            reorder(cache)
            ids = IDS.flip(0)[:, PREFIX : PREFIX + 1]
            return hf(ids, use_cache=True, past_key_values=cache, position_ids=positions(PREFIX, 1)).logits

    exact, hf = whole.logits.flip(0)[:, PREFIX : PREFIX + 1], whole.model.hf
    assert relative(swapped(whole.by_itself, lambda cache: cache.reorder_cache(beams)), exact) > 1e-3
    assert relative(swapped(hf, lambda cache: hf._reorder_cache(cache, beams)), exact) < CLOSE
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "use_cache": False}
    ids = whole.by_itself.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **settings)
    text = " ".join(str(token) for token in ids[0, LENGTH:].tolist() if token > 2)
    assert generate_text(whole.model, IDS[0], num_beams=3, max_new_tokens=4) == text


def test_masks_that_are_laid_over_other_tokens() -> None:
    whole = whole_of("mamba")
    given = padded("left")
    mask = torch.cat([given["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    exact = whole.of(torch.cat([IDS[1:, :7], IDS[1:, :1]], 1))[:, -1:]
    with torch.no_grad():
        caches = [hf(**given, use_cache=True).cache_params for hf in (whole.by_itself, whole.model.hf)]
        step = {"input_ids": IDS[:, :1], "attention_mask": mask}
        wrong = whole.by_itself(**step, cache_params=caches[0]).logits[1:]
        assert relative(wrong, exact) > 1e-3
        with pytest.raises(cb.BadInput, match="attention_mask has padding and 12 columns for 1 tokens"):
            whole.model.hf(**step, cache_params=caches[1])
    found = cb.continue_from(whole.model, cb.run_prefix(whole.model, given), IDS[:, :1])
    assert relative(found.logits[1:], exact) < CLOSE
    minimax = whole_of("minimax")
    index = (mask.cumsum(1) - 1).clamp(min=0)
    step = {"input_ids": IDS[:, :1], "attention_mask": mask, "position_ids": index[:, -1:]}
    with torch.no_grad():
        caches = [
            hf(**given, position_ids=index[:, :-1], use_cache=True).past_key_values
            for hf in (minimax.by_itself, minimax.model.hf)
        ]
        wrong = minimax.by_itself(**step, past_key_values=caches[0]).logits[1:]
        exact = minimax.of(torch.cat([IDS[1:, :7], IDS[1:, :1]], 1))[:, -1:]
        assert relative(wrong, exact) > 1e-3
        with pytest.raises(cb.BadInput, match="masks the wrong keys of minimax"):
            minimax.model.hf(**step, past_key_values=caches[1])
    found = cb.continue_from(minimax.model, cb.run_prefix(minimax.model, given), IDS[:, :1])
    assert relative(found.logits[1:], exact) < CLOSE
    rows = [IDS[0, :PREFIX].tolist(), IDS[1, :7].tolist()]
    words = generate_text(minimax.model, rows, max_new_tokens=4)
    assert words == [generate_text(minimax.model, row, max_new_tokens=4) for row in rows]


def test_the_guard_stays_on_and_goes_along() -> None:
    hf = plain("mamba")
    for _ in range(2):
        model = cb.load_model(hf)
    assert len(hf._forward_pre_hooks) == 1 and not load("llama").hf._forward_pre_hooks
    for other in (hf, copy.deepcopy(hf), pickle.loads(pickle.dumps(hf))):
        with pytest.raises(cb.BadInput, match="tokens follow a cached state"):
            continued(other, IDS, 4)
    assert model.hf is hf


def test_a_model_without_a_cache_is_refused_by_name(mamba: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input_ids: Tensor) -> None: ...

    monkeypatch.setattr(type(mamba.model.hf), "forward", forward)
    with pytest.raises(cb.UnsupportedModel, match="MambaForCausalLM.forward takes neither past_key_values nor"):
        cb.run_prefix(mamba.model, IDS)
