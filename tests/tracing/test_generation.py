"""generate_text is transformers' own generation; with interventions, that of a model with the change built in."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

import circuitbench as cb
from circuitbench.tracing import Add, Scale, capture, generate_text, intervene
from tests.architectures.by_hand import hooked, scan_changed
from tests.architectures.cases import RECURRENT, load, plain, prompts

ROWS = prompts(9, 6)
IDS = torch.tensor(prompts(7))
VECTOR = torch.linspace(-3, 3, 32)


def text(ids: Any) -> str:
    return " ".join(str(token) for token in ids if token > 2)  # the tokenizer of ids leaves its special ones out


def by_itself(hf: Any, ids: torch.Tensor, **settings: Any) -> list[str]:
    """What transformers' own generation gives, as text."""
    out = hf.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return [text(row[ids.shape[1] :].tolist()) for row in out]


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return load("mamba2")


@pytest.mark.parametrize(
    "variant", [*RECURRENT, "olmo_hybrid", "lfm2_moe", "falcon_h1-no-norm", "gpt2", "llama", "gemma2"]
)
def test_greedy_generation_is_transformers(variant: str) -> None:
    model, hf = load(variant), plain(variant)
    expected = by_itself(hf, IDS, max_new_tokens=5, do_sample=False)
    assert generate_text(model, IDS, max_new_tokens=5) == expected
    assert generate_text(model, IDS[0], max_new_tokens=5) == expected[0]
    assert model.generate_text(text(IDS[0].tolist()), max_new_tokens=5) == expected[0]


@pytest.mark.parametrize("variant", ["mamba", "falcon_h1", "gpt2", "jamba"])
def test_prompts_of_different_length_continue_as_alone(variant: str) -> None:
    model = load(variant)
    together = generate_text(model, ROWS, max_new_tokens=5)
    assert together == [generate_text(model, row, max_new_tokens=5) for row in ROWS]


def test_sampling_follows_its_seed_and_leaves_the_callers_alone(model: cb.Model) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generate_text(model, IDS, seed=1, **settings)
    assert torch.equal(torch.rand(3), expected)
    assert generate_text(model, IDS, seed=1, **settings) == first
    assert len({str(generate_text(model, IDS, seed=seed, **settings)) for seed in range(5)}) > 1
    torch.manual_seed(1)
    assert by_itself(plain("mamba2"), IDS, max_new_tokens=8, do_sample=True, temperature=1.5, top_k=0) == first
    torch.manual_seed(1)
    kept = by_itself(plain("mamba2"), IDS, max_new_tokens=8, do_sample=True, temperature=1.5, top_k=4, top_p=0.8)
    assert generate_text(model, IDS, seed=1, top_k=4, top_p=0.8, **settings) == kept


def test_the_most_likely_of_one_token_is_the_greedy_one(model: cb.Model) -> None:
    greedy = generate_text(model, IDS, max_new_tokens=5)
    assert generate_text(model, IDS, max_new_tokens=5, temperature=0.7, top_k=1, seed=3) == greedy


@pytest.mark.parametrize("variant", ["mamba2", "mamba", "falcon_h1", "jamba", "gpt2"])
def test_interventions_hold_through_greedy_and_beam_search(variant: str) -> None:
    """A vector added after layer 0 is a hook on that layer."""
    model, hf = load(variant), plain(variant)
    item = Add("layers.0.resid_post", VECTOR, strength=0.5)
    layer = hf.get_submodule(model.layers[0].envoy.path.removeprefix("model."))
    for beams in (1, 3):
        without = by_itself(hf, IDS, max_new_tokens=5, num_beams=beams, do_sample=False)
        assert generate_text(model, IDS, max_new_tokens=5, num_beams=beams) == without
        with hooked(layer, lambda value: value + 0.5 * VECTOR, "output"):
            expected = by_itself(hf, IDS, max_new_tokens=5, num_beams=beams, do_sample=False)
        got = generate_text(model, IDS, max_new_tokens=5, num_beams=beams, interventions=item)
        assert got == expected
        assert got != without
    assert model.nn._edits == []


def test_beams_of_several_prompts_each_keep_their_own_positions(model: cb.Model) -> None:
    item = Scale("layers.0.ssm.y", 0.0, positions=[0, -1])
    together = generate_text(model, ROWS, max_new_tokens=4, num_beams=3, interventions=item)
    alone = [generate_text(model, row, max_new_tokens=4, num_beams=3, interventions=item) for row in ROWS]
    assert together == alone


def test_a_state_is_steered_at_every_token(model: cb.Model) -> None:
    hf = plain("mamba2")
    with scan_changed(hf, hf.backbone.layers[0].mixer, {"state": lambda t, state: 0.5 * state}):
        expected = by_itself(hf, IDS, max_new_tokens=6, do_sample=False)
    assert generate_text(model, IDS, max_new_tokens=6, interventions=Scale("layers.0.ssm.state", 0.5)) == expected


# Threads --------------------------------------------------------------------------------------------------------------


def in_threads(jobs: list[Any]) -> list[Future]:
    """Each job run by a thread of its own, all at once."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [pool.submit(job) for job in jobs]


def test_our_functions_take_turns_on_one_model_from_several_threads(model: cb.Model) -> None:
    rows = prompts(*range(4, 12))
    jobs: list[Any] = [lambda row=row: capture(model, [row], "layers.1.resid_post") for row in rows]
    jobs += [lambda row=row: intervene(model, [row], Scale("layers.0.ssm.y", 0.5)).logits for row in rows]
    jobs += [lambda row=row: generate_text(model, row, max_new_tokens=3) for row in rows]
    expected = [job() for job in jobs]
    for future, wanted in zip(in_threads(jobs), expected, strict=True):
        got = future.result()
        if isinstance(wanted, str):
            assert got == wanted
        else:
            tensors = (got, wanted) if isinstance(wanted, torch.Tensor) else (*got.values(), *wanted.values())
            torch.testing.assert_close(*tensors, rtol=0, atol=0)


def test_a_trace_inside_a_trace_is_refused_in_one_sentence(model: cb.Model) -> None:
    with pytest.raises(cb.BadInput, match="already running a trace.*load the model once for each thread"):
        with model.trace(IDS):
            with model.trace(IDS):
                inner = model.logits.save()
    assert "inner" not in locals()
    generate_text(model, IDS, max_new_tokens=1)  # and the model goes on working


def test_a_trace_from_another_thread_is_refused_in_one_sentence(model: cb.Model) -> None:
    inside, done = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        done.wait(10)

    def first() -> Any:
        with torch.no_grad():
            with model.trace(IDS):
                logits = model.logits.save()
        return logits

    def second() -> Any:
        inside.wait(10)
        try:
            with torch.no_grad():
                with model.trace(IDS):
                    logits = model.logits.save()
            return logits
        finally:
            done.set()

    handle = model.layers[0].envoy._module.register_forward_pre_hook(wait)
    got, refused = in_threads([first, second])
    handle.remove()
    assert torch.equal(got.result(), model.hf(IDS).logits)
    with pytest.raises(cb.BadInput, match="already running a trace"):
        refused.result()
