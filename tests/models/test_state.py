"""Edits of the recurrence: the state, the decay, what a step writes, the operands, against loops that know only HF.

A result may differ from the float64 run by 1e-5 of the largest logit, or by three times what the same computation by
hand differs from it in float32.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import circuitbench as cb
from circuitbench.tracing import Add, intervene
from tests.architectures.by_hand import Change, scan_changed
from tests.architectures.cases import DELTA, RECURRENT, RNN, S6, load, plain, prompts, relative

LENGTH = 9
IDS = torch.tensor(prompts(LENGTH, LENGTH))


class Pair:
    """One model, and the same one as transformers makes it, in float32 and float64."""

    def __init__(self, variant: str) -> None:
        self.model = load(variant)
        self.by_itself = [plain(variant), plain(variant, torch.float64)]
        self.layer = next(layer.index for layer in self.model.layers if "ssm.y" in layer.sites)
        # transformers mixes the prompts of RWKV-4 into each other when it decodes several.
        self.ids = IDS[:1] if self.model.architecture == "rwkv" else IDS
        # y of RWKV-4 reads the state before its position's write.
        self.whens = ["after_read"] if self.model.architecture == "rwkv" else ["before_read", "after_read"]

    @property
    def ssm(self) -> Any:
        return self.model.layers[self.layer].ssm

    def by_hand(self, change: Change, when: str = "before_read", run: Callable[[Any], Tensor] | None = None) -> Any:
        """(float32, float64) logits with the scan of `layer` swapped for a loop with a change."""
        run = run or (lambda hf: hf(self.ids).logits)
        out = []
        for hf in self.by_itself:
            with torch.no_grad(), scan_changed(hf, self.mixer(hf), change, when):
                out.append(run(hf))
        return out

    def mixer(self, hf: Any) -> Any:
        """The mixer of `layer`, in one of the models."""
        return hf.get_submodule(self.ssm._envoy.path.removeprefix("model."))

    def logits(self, block: Callable[[], Any], ids: Tensor | None = None, **inputs: Any) -> Tensor:
        with torch.no_grad():
            with self.model.trace(self.ids if ids is None else ids, **inputs):
                block()
                out = self.model.logits.save()
        return out


@pytest.fixture(scope="module", params=[*RECURRENT, "falcon_h1-no-norm", "mamba2-many-groups"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def assert_as_good(ours: Tensor, by_hand: Tensor, exact: Tensor) -> None:
    noise, error = relative(by_hand, exact), relative(ours, exact)
    assert error <= max(1e-5, 3 * noise), (error, noise)


def moved(state: Tensor) -> Tensor:
    """Another state, as a function of the old one: every second row of it at a quarter, plus one."""
    state = state.clone()
    state[:, ::2] = state[:, ::2] * 0.25 + 1
    return state


def planted(state: Tensor) -> Tensor:
    """A state of another origin; RWKV-4's holds sums of weights."""
    values = torch.linspace(-1, 1, state[0].numel(), dtype=state.dtype)
    values = values.abs() + 0.5 if state.shape[-1] == 2 else values
    return values.reshape(state[0].shape).expand_as(state)


def edited(t: int, state: Tensor) -> Tensor:
    """Three edits of one run, for the loops by hand."""
    return {2: torch.zeros_like, 5: moved, LENGTH - 1: planted}.get(t, lambda h: h)(state)


@pytest.mark.parametrize("when", ["before_read", "after_read"])
def test_state_edits_are_those_of_the_recurrence_itself(pair: Pair, when: str) -> None:
    edits: dict[int, Any] = {2: torch.zeros_like, 5: moved}
    if when not in pair.whens:
        with pytest.raises(cb.BadInput, match="before the position's own write.*after_read"):
            pair.logits(lambda: pair.ssm.edit_state(edits, when=when))
        return
    states: list[Tensor] = []

    def block() -> None:
        shape = pair.ssm.state[:, 0]
        states.append(pair.ssm.edit_state({**edits, -1: planted(shape)}, when=when))

    seen: list[Tensor] = []

    def record(t: int, state: Tensor) -> Tensor:
        seen.append(edited(t, state))
        return seen[-1]

    ours = pair.logits(block)
    plain = pair.logits(lambda: None)
    by_hand, exact = pair.by_hand({"state": record}, when)
    assert_as_good(ours, by_hand, exact)
    assert relative(ours, plain) > 1e-3
    assert relative(states[0], torch.stack(seen[:LENGTH], 1)) < 1e-5
    if when == "after_read":
        assert relative(ours[:, :3], plain[:, :3]) < 1e-5


def test_editing_with_the_identity_changes_no_more_than_float_noise(pair: Pair) -> None:
    ours = pair.logits(lambda: pair.ssm.edit_state({3: lambda state: state}))
    assert_as_good(ours, *pair.by_hand({}))


def test_without_asking_for_the_states_the_edit_is_the_same(pair: Pair) -> None:
    asked = pair.logits(lambda: pair.ssm.edit_state({4: moved}))
    assert torch.equal(asked, pair.logits(lambda: pair.ssm.edit_state({4: moved}, states=False)))


def test_two_edits_of_one_position_follow_each_other(pair: Pair) -> None:
    def block() -> None:
        pair.ssm.edit_state({4: moved})
        pair.ssm.edit_state({4: lambda state: state + 1})

    ours = pair.logits(block)
    assert torch.equal(ours, pair.logits(lambda: pair.ssm.edit_state({4: lambda state: moved(state) + 1})))


def test_states_come_in_chunks_too(pair: Pair) -> None:
    whole, pieces = [], []

    def block() -> None:
        pair.ssm.edit_state({4: moved}, states=False)
        pieces.extend(pair.ssm.iter_state(chunk=4))
        whole.append(pair.ssm.state)

    pair.logits(block)
    assert sorted(start for start, _ in pieces) == [start for start, _ in pieces]
    torch.testing.assert_close(torch.cat([states for _, states in pieces], 1), whole[0], rtol=1e-5, atol=1e-6)


def test_a_state_edit_fits_the_scan(pair: Pair) -> None:
    """What cannot be done is said, in one sentence, before the model goes on."""
    with pytest.raises(cb.BadInput, match=r"position 9 is out of range; this run has positions 0 to 8"):
        pair.logits(lambda: pair.ssm.edit_state({LENGTH: torch.zeros_like}))
    with pytest.raises(cb.BadInput, match="before_read.*after_read.*not 'never'"):
        pair.logits(lambda: pair.ssm.edit_state({0: torch.zeros_like}, when="never"))
    if len(pair.whens) == 2:
        with pytest.raises(cb.BadInput, match="cannot share"):
            pair.logits(lambda: [pair.ssm.edit_state({0: moved}, when=when) for when in pair.whens])
    with pytest.raises(cb.BadInput, match="position 3 gives .2, 5.*the state is"):
        pair.logits(lambda: pair.ssm.edit_state({3: lambda state: torch.zeros(2, 5)}))
    with pytest.raises(cb.BadInput, match="had moved past the beginning of its block.*forward order"):
        pair.logits(lambda: [pair.ssm.out, pair.ssm.edit_state({3: moved})])
    with pytest.raises(cb.BadInput, match="after the model had moved past its scan"):
        pair.logits(lambda: [pair.ssm.y, setattr(pair.ssm, "x", halved(pair.ssm.x))])


def test_what_the_delta_rule_writes_is_asked_for_before_the_state_is_edited() -> None:
    pair = Pair("qwen3_next")
    with pytest.raises(cb.BadInput, match=r"layers.0.ssm.write depends on the state; .* before you edit"):
        pair.logits(lambda: [pair.ssm.edit_state({3: moved}), pair.ssm.write])

    def block() -> None:
        pair.ssm.write[:, 2] = 0
        pair.ssm.edit_state({3: moved})

    change: Change = {
        "write": lambda t, write: write * 0 if t == 2 else write,
        "state": lambda t, state: moved(state) if t == 3 else state,
    }
    assert_as_good(pair.logits(block), *pair.by_hand(change))


# Editing the cache ----------------------------------------------------------------------------------------------------


def cache_name(hf: Any) -> str:
    """What the family calls its cache."""
    if hf.config.model_type == "rwkv":
        return "state"
    return "cache_params" if hf.config.model_type in ("mamba", "falcon_mamba", "mamba2", "xlstm") else "past_key_values"


def cached(hf: Any, ids: Tensor, cache: Any = None, start: int = 0) -> tuple[Tensor, Any]:
    """(logits, cache) of a forward that goes on from a cache."""
    name = cache_name(hf)
    inputs: dict[str, Any] = {} if cache is None else {name: cache}
    if hf.config.model_type == "bamba" and cache is not None:  # it numbers positions from 0, whatever the cache holds
        inputs["position_ids"] = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
    if hf.config.model_type == "recurrent_gemma":  # keeps the recurrent part on its modules, and returns no cache
        inputs = {name: DynamicCache(config=hf.config) if cache is None else cache}
        for layer in hf.model.layers if cache is None else ():
            layer.temporal_block.conv1d_state = None
    out = hf(ids, use_cache=True, **inputs)
    return out.logits, inputs[name] if hf.config.model_type == "recurrent_gemma" else out[name]


def edit_cache(hf: Any, cache: Any, layer: int, change: Callable[[Tensor], Tensor]) -> None:
    if hf.config.model_type == "recurrent_gemma":
        block = hf.model.layers[layer].temporal_block.rg_lru
        block.recurrent_states = change(block.recurrent_states)
    elif hf.config.model_type == "rwkv":
        num, den = change(torch.stack([value[:, :, layer] for value in cache[2:4]], -1)).unbind(-1)
        cache[2][:, :, layer], cache[3][:, :, layer] = num, den
    elif hf.config.model_type == "xlstm":
        memory, normaliser, _ = cache.rnn_state[layer]
        state = change(torch.cat([memory, normaliser[..., None]], -1))
        memory.copy_(state[..., :-1])
        normaliser.copy_(state[..., -1])
    else:
        state = cache.get_recurrent_state(layer)
        state.copy_(change(state))


RESTARTING = [*S6, "recurrent_gemma"]  # where several tokens follow a cached past


def continued(hf: Any, ids: Tensor, layer: int, position: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of a run whose cache is edited after `position`: S6 goes on token by token, the others at once."""
    with torch.no_grad():
        first, cache = cached(hf, ids[:, : position + 1])
        edit_cache(hf, cache, layer, change)
        pieces = [first]
        step = 1 if hf.config.model_type in RESTARTING else LENGTH
        for start in range(position + 1, LENGTH, step):
            logits, cache = cached(hf, ids[:, start : start + step], cache, start)
            pieces.append(logits)
    return torch.cat(pieces, 1)


def test_an_edit_after_the_read_is_an_edit_of_the_cache(pair: Pair) -> None:
    for position in (0, 4):
        ours = pair.logits(lambda position=position: pair.ssm.edit_state({position: moved}, when="after_read"))
        routes = [continued(hf, pair.ids, pair.layer, position, moved) for hf in pair.by_itself]
        assert_as_good(ours, *routes)
        assert_as_good(ours[:, : position + 1], *[route[:, : position + 1] for route in routes])


def test_several_tokens_go_on_from_a_cached_state_or_are_refused(pair: Pair) -> None:
    """Read and edited there, the recurrence is that of the whole sequence. (S6 would start from zero again.)"""
    with torch.no_grad():
        _, cache = cached(pair.model.hf, pair.ids[:, :5])
    inputs: dict[str, Any] = {cache_name(pair.model.hf): cache, "use_cache": True}
    if pair.model.architecture == "bamba":
        inputs["position_ids"] = torch.arange(5, LENGTH).expand(len(IDS), -1)
    found: list[Tensor] = []

    def block(position: int) -> None:
        found.append(getattr(pair.ssm, "conv" if "conv" in pair.ssm.sites else pair.ssm.sites[0]))
        found.append(pair.ssm.edit_state({position: moved}))
        found.append(pair.ssm.y)

    if pair.model.architecture in RESTARTING:
        with pytest.raises(cb.BadInput, match="4 tokens follow a cached state.*one token at a time"):
            pair.logits(lambda: block(1), pair.ids[:, 5:], **inputs)
        return
    ours = pair.logits(lambda: block(1), pair.ids[:, 5:], **inputs)
    whole = pair.logits(lambda: block(6))
    assert relative(ours, whole[:, 5:]) < 1e-5
    for suffix, everything in zip(found[:3], found[3:], strict=True):
        assert relative(suffix, everything[:, 5:]) < 1e-5


# While decoding -------------------------------------------------------------------------------------------------------

STEPS, EDITED = 4, 2


def generated(pair: Pair, block: Callable[[int], Any]) -> Tensor:
    """The logits of every step of a generation."""
    with torch.no_grad():
        with pair.model.generate(pair.ids, max_new_tokens=STEPS, min_new_tokens=STEPS) as tracer:
            steps = [].save()
            for step in tracer.iter[:STEPS]:
                block(step)
                steps.append(pair.model.logits[:, -1].clone())
    return torch.stack(steps)


def generated_by_hand(
    hf: Any, ids: Tensor, between: Callable[[Any, int, Any], None], around: Callable[[int], Any]
) -> Tensor:
    """The same, step by step: `around(step)` is entered for the forward, `between(hf, step, cache)` comes after it."""
    cache, steps, start = None, [], 0
    with torch.no_grad():
        for step in range(STEPS):
            with around(step):
                logits, cache = cached(hf, ids, cache, start)
            between(hf, step, cache)
            start += ids.shape[1]
            steps.append(logits[:, -1])
            allowed = logits[:, -1].clone()
            allowed[:, hf.config.eos_token_id] = -torch.inf
            ids = allowed.argmax(-1, keepdim=True)
    return torch.stack(steps)


def nothing(*_: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@pytest.mark.parametrize("step", [0, EDITED])
def test_an_edit_at_a_step_of_a_generation_is_an_edit_of_the_cache_there(pair: Pair, step: int) -> None:
    def block(now: int) -> None:
        if now == step:
            pair.ssm.edit_state({-1: moved}, when="after_read")

    def between(hf: Any, now: int, cache: Any) -> None:
        if now == step:
            edit_cache(hf, cache, pair.layer, moved)

    ours = generated(pair, block)
    assert_as_good(ours, *[generated_by_hand(hf, pair.ids, between, nothing) for hf in pair.by_itself])
    assert relative(ours[step + 1 :], generated(pair, lambda now: None)[step + 1 :]) > 1e-4


def test_an_edit_of_a_decoded_token_is_one_of_its_recurrence(pair: Pair) -> None:
    def block(now: int) -> None:
        if now == EDITED:
            pair.ssm.edit_state({0: moved})

    def around(hf: Any) -> Callable[[int], Any]:
        def enter(now: int) -> Any:
            return scan_changed(hf, pair.mixer(hf), {"state": lambda t, h: moved(h) if now == EDITED else h})

        return enter

    ours = generated(pair, block)
    routes = [generated_by_hand(hf, pair.ids, lambda *_: None, around(hf)) for hf in pair.by_itself]
    assert_as_good(ours, *routes)
    assert relative(ours[EDITED:], generated(pair, lambda now: None)[EDITED:]) > 1e-4


def test_states_read_while_decoding_are_those_of_the_whole_sequence(pair: Pair) -> None:
    found: list[Tensor] = []
    with torch.no_grad():
        with pair.model.generate(pair.ids, max_new_tokens=3, min_new_tokens=3) as tracer:
            steps, ids = [].save(), None
            for _ in tracer.iter[:3]:
                steps.append(pair.ssm.state)
            ids = tracer.result.save()
    found = list(steps)
    whole: list[Tensor] = []
    pair.logits(lambda: whole.append(pair.ssm.state), ids[:, :-1])
    # Zamba2 and Nemotron-H floor dt in a sequence but, in transformers, not in a single decoded step.
    floored = pair.model.architecture in ("zamba2", "nemotron_h")
    assert relative(torch.cat(found, 1), whole[0]) < (1e-3 if floored else 1e-5)


# Everything else in the recurrence ------------------------------------------------------------------------------------


def halved(value: Tensor) -> Tensor:
    """Half of the last axis at a few positions (or the only one), halved."""
    value = value.clone()
    columns = value[:, 2:5] if value.shape[1] > 1 else value
    columns[..., : max(1, value.shape[-1] // 2)] *= 0.5
    return value


def write_by_hand(pair: Pair) -> Change:
    """What the delta rule adds depends on the state: the edit fixes what is added, at the edited positions alone."""
    if pair.model.architecture not in DELTA:
        return {"write": halved}
    added: list[Tensor] = []
    pair.by_hand({"write": lambda t, write: added.append(write) or write})
    fixed = halved(torch.stack(added[LENGTH:], 1))
    return {"write": lambda t, write: fixed[:, t].to(write.dtype) if 2 <= t < 5 else write}


def test_writing_an_operand_is_giving_it_to_the_recurrence(pair: Pair) -> None:
    plain = pair.logits(lambda: None)
    operands = {"x", "k", "dt", "B", "C", "beta", "input_gate", "forget_gate"}
    if pair.model.architecture == "recurrent_gemma":
        operands.remove("input_gate")  # which makes x, and is no operand
    sites = set(pair.ssm.sites) & (operands | {"decay", "write", "y"})
    if pair.model.architecture in S6:
        sites.add("gate")
    for site in sorted(sites):
        ours = pair.logits(lambda site=site: setattr(pair.ssm, site, halved(getattr(pair.ssm, site))))
        change = write_by_hand(pair) if site == "write" else {site: halved}
        assert_as_good(ours, *pair.by_hand(change))
        assert relative(ours, plain) > 1e-6, site


def test_several_edits_of_one_recurrence_hold_together(pair: Pair) -> None:
    other = next((name for name in ("C", "k") if name in pair.ssm.sites), "decay")

    def block() -> None:
        pair.ssm.x = halved(pair.ssm.x)
        getattr(pair.ssm, other)[:, 3:] *= 0.5
        pair.ssm.decay[:, 1] = 0
        pair.ssm.edit_state({5: moved})
        pair.ssm.y[:, 6] *= 0.5

    def late(value: Tensor) -> Tensor:
        return torch.cat([value[:, :3], value[:, 3:] * 0.5], 1)

    def forgetful(decay: Tensor) -> Tensor:
        return torch.cat([decay[:, :1], torch.zeros_like(decay[:, :1]), decay[:, 2:]], 1)

    def softer(y: Tensor) -> Tensor:
        return torch.cat([y[:, :6], y[:, 6:7] * 0.5, y[:, 7:]], 1)

    change: Change = {"x": halved, "decay": forgetful, "y": softer}
    change[other] = late if other != "decay" else lambda decay: forgetful(late(decay))
    change["state"] = lambda t, state: moved(state) if t == 5 else state
    assert_as_good(pair.logits(block), *pair.by_hand(change))


def test_an_intervention_on_the_state_counts_each_prompts_own_tokens(pair: Pair) -> None:
    rows = prompts(9, 9 if pair.model.architecture in RNN else 6)  # those cannot be padded
    site = f"layers.{pair.layer}.ssm.state"
    together = intervene(pair.model, rows, Add(site, 1.0, positions=[2, -1]))
    for number, row in enumerate(rows):
        alone = intervene(pair.model, [row], Add(site, 1.0, positions=[2, -1]))
        assert relative(together.logits[number, : len(row)], alone.logits[0]) < 3e-5
    assert together.delta_norm > 1e-4


def test_the_edit_leaves_other_runs_as_they_were(pair: Pair) -> None:
    plain = copy.deepcopy(pair.model.hf(pair.ids).logits.detach())
    pair.logits(lambda: pair.ssm.edit_state({0: torch.zeros_like}))
    assert torch.equal(pair.logits(lambda: None), plain)
