"""Values, keys and draws are counted in each prompt's own tokens, whatever the batch they come in is padded to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import circuitbench as cb
from circuitbench.errors import BadInput, SiteNotFound
from circuitbench.models.prompts import encode
from circuitbench.tracing import Ablate, Add, Scale, Set, capture, hold, intervene, steer

LONG, SHORT = [5, 17, 3, 44, 9, 21], [7, 8, 9]
BOTH = [LONG, SHORT]
PATTERN = "layers.1.attn.pattern"


@pytest.fixture(scope="module")
def mamba2() -> cb.Model:
    return cb.load_model("random:mamba2")


@pytest.fixture(scope="module")
def bamba() -> cb.Model:
    return cb.load_model("random:bamba")


# Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mamba2", "bamba", "mamba", "gpt2"])
def test_a_site_set_to_its_own_captured_value_changes_nothing(family: str) -> None:
    model = cb.load_model(f"random:{family}")
    written = [site for site in model.sites if not site.endswith((".ssm.mixing", ".ssm.state"))]
    found = capture(model, BOTH, written)
    for site in written:
        assert intervene(model, BOTH, Set(site, found[site])).delta_norm == 0, site
    for site in [site for site in model.sites if site.endswith(".ssm.state")]:  # replayed: the same up to rounding
        value = capture(model, BOTH, site)[site]
        assert intervene(model, BOTH, Set(site, value)).delta_norm < 1e-4


@pytest.mark.parametrize("site", ["layers.0.ssm.y", "layers.0.ssm.state", "layers.0.resid_post"])
def test_a_value_of_all_positions_means_in_a_batch_what_it_means_alone(mamba2: cb.Model, site: str) -> None:
    value = 3 * torch.randn_like(capture(mamba2, BOTH, site)[site])
    for make in (Set, Add, Scale):
        together = intervene(mamba2, BOTH, make(site, value)).logits
        for number, ids in enumerate(BOTH):
            alone = intervene(mamba2, [ids], make(site, value[number : number + 1, : len(ids)])).logits
            torch.testing.assert_close(together[number, : len(ids)], alone[0], rtol=1e-4, atol=1e-5)


def test_a_value_of_other_length_is_refused(mamba2: cb.Model) -> None:
    with pytest.raises(BadInput, match="6 tokens of the longest"):
        intervene(mamba2, BOTH, Set("layers.0.ssm.y", torch.zeros(2, 5, 4, 16)))


# Matrices over positions ----------------------------------------------------------------------------------------------


def test_keys_are_counted_in_each_prompts_own_tokens(bamba: cb.Model) -> None:
    for keys in (0, [0, -1], slice(1, None)):
        change = Scale(PATTERN, 0.3, positions=[1, -1], channels=keys)
        together, alone = intervene(bamba, BOTH, change), intervene(bamba, [SHORT], change)
        assert alone.delta_norm > 1e-3
        torch.testing.assert_close(together.logits[1, :3], alone.logits[0], rtol=1e-4, atol=1e-5)


def test_a_matrix_over_positions_broadcasts_as_it_is_laid_out(bamba: cb.Model) -> None:
    heads = torch.arange(1.0, 5)[:, None, None]  # (heads, queries, keys): one factor a head
    got = intervene(bamba, [LONG], Scale(PATTERN, heads), PATTERN)
    own = capture(bamba, [LONG], PATTERN)[PATTERN]
    torch.testing.assert_close(got[PATTERN], own * heads)


def test_tokens_and_positions_of_a_pattern_are_its_queries(bamba: cb.Model) -> None:
    alone = [capture(bamba, [ids], PATTERN)[PATTERN][0] for ids in BOTH]
    found = capture(bamba, BOTH, PATTERN)
    rows = found.tokens(PATTERN)
    assert rows.shape == (9, 4, 6)
    torch.testing.assert_close(rows[:6], alone[0].transpose(0, 1))
    torch.testing.assert_close(rows[6:, :, :3], alone[1].transpose(0, 1), rtol=1e-4, atol=1e-6)
    assert rows[6:, :, 3:].isnan().all()
    for batch_size in (1, 2):
        last = capture(bamba, BOTH, PATTERN, positions=[-1, 0], batch_size=batch_size)[PATTERN]
        torch.testing.assert_close(last[1, :, :, :3], alone[1][:, [-1, 0]], rtol=1e-4, atol=1e-6)
        assert last[1, :, :, 3:].isnan().all()


def test_prompts_of_different_length_have_no_mean_pattern(bamba: cb.Model) -> None:
    assert intervene(bamba, BOTH, Ablate(PATTERN)).delta_norm > 0
    with pytest.raises(BadInput, match="matrix over positions"):
        intervene(bamba, BOTH, Ablate(PATTERN, mode="mean"))


# Ablating states ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [[LONG], BOTH], ids=["one", "two"])
def test_a_state_ablated_by_its_mean_is_the_mean_over_all_tokens(mamba2: cb.Model, prompts: list) -> None:
    site = "layers.0.ssm.state"
    mean = capture(mamba2, prompts, site).tokens(site).mean(0)
    got, wanted = (
        intervene(mamba2, prompts, Ablate(site, mode="mean"), site),
        intervene(mamba2, prompts, Set(site, mean)),
    )
    assert got.delta_norm > 1e-3
    torch.testing.assert_close(got.logits, wanted.logits, equal_nan=True)
    torch.testing.assert_close(got[site][0, 3], mean)


def test_a_resampled_state_is_one_that_some_token_has(mamba2: cb.Model) -> None:
    site = "layers.0.ssm.state"
    pool = capture(mamba2, BOTH, site).tokens(site)
    for reference in (None, pool):
        got = intervene(mamba2, BOTH, Ablate(site, mode="resample", reference=reference), site)
        assert got.delta_norm > 1e-4
        states = torch.cat([got[site][0], got[site][1, :3]]).flatten(1)
        drawn = torch.cdist(states, pool.flatten(1)).argmin(1)
        torch.testing.assert_close(states, pool.flatten(1)[drawn], rtol=1e-5, atol=1e-7)
        assert len(set(drawn.tolist())) > 2  # not the same one at every position
    again = intervene(mamba2, BOTH, Ablate(site, mode="resample", reference=pool))
    other = intervene(mamba2, BOTH, Ablate(site, mode="resample", reference=pool), site)
    assert torch.equal(again.logits.nan_to_num(), other.logits.nan_to_num())


@pytest.mark.parametrize("site", ["layers.0.ssm.state", "layers.0.ssm.y"])
def test_what_is_drawn_for_a_token_does_not_depend_on_the_forward_it_comes_in(mamba2: cb.Model, site: str) -> None:
    pool = capture(mamba2, BOTH, site).tokens(site)
    item = Ablate(site, mode="resample", reference=pool, seed=3)
    step_by_step, at_once = (logits_of(mamba2, [LONG], item, use_cache=cache) for cache in (True, False))
    torch.testing.assert_close(step_by_step, at_once, rtol=1e-4, atol=1e-5)


# Held -----------------------------------------------------------------------------------------------------------------


def logits_of(model: cb.Model, prompts: Any, items: Any, **settings: Any) -> torch.Tensor:
    """Logits `(step, b, vocab)` of four generated tokens under held interventions."""
    batch = encode(model, prompts)
    with hold(model, items), torch.no_grad():
        with model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        ) as tracer:
            found = tracer.result.save()
    return torch.stack(found.logits)


@pytest.mark.parametrize("family", ["mamba2", "mamba", "bamba"])
@pytest.mark.parametrize("positions", [[2], [4], slice(4, None), slice(3, 6)], ids=str)
def test_held_positions_are_each_prompts_own_with_and_without_a_cache(family: str, positions: Any) -> None:
    model = cb.load_model(f"random:{family}")
    item = Add("layers.0.resid_post", 5 * torch.randn(32), positions=positions)
    alone = logits_of(model, [SHORT], item)[:, 0]
    assert (alone - logits_of(model, [SHORT], Scale("layers.0.resid_post", 1.0))[:, 0]).abs().max() > 1e-2
    for settings in ({}, {"use_cache": False}):
        together = logits_of(model, BOTH, item, **settings)[:, 1]
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def from_cache(model: cb.Model, item: Any) -> torch.Tensor:
    """Logits of the last token of a prompt, run from a cache of those before it."""
    ids = torch.tensor([LONG])
    with torch.no_grad():
        first = model.hf(ids[:, :5], use_cache=True)
    name = "past_key_values" if hasattr(first, "past_key_values") else "cache_params"
    with hold(model, item), torch.no_grad():
        with model.trace(ids[:, 5:], **{name: first[name]}):
            logits: Any = nnsight.save(model.logits)
    return logits


@pytest.mark.parametrize("family", ["jamba", "falcon_h1", "llama"])
def test_a_run_from_a_cache_counts_on_from_its_length(family: str) -> None:
    model = cb.load_model(f"random:{family}")
    item = Set("layers.0.resid_post", 0.0, positions=[5])
    whole = intervene(model, [LONG], item)
    assert whole.delta_norm > 1e-2
    torch.testing.assert_close(from_cache(model, item), whole.logits[:, 5:], rtol=1e-4, atol=1e-5)


def test_a_cache_that_does_not_tell_its_length_has_no_positions(mamba2: cb.Model) -> None:
    with pytest.raises(BadInput, match="positions cannot be counted"):
        from_cache(mamba2, Set("layers.0.resid_post", 0.0, positions=[5]))
    item = Set("layers.1.resid_post", torch.arange(32.0))
    whole = intervene(mamba2, [LONG], item).logits[:, 5:]
    torch.testing.assert_close(from_cache(mamba2, item), whole, rtol=1e-4, atol=1e-5)


def test_a_value_held_for_the_prompt_is_not_stretched_over_what_follows(mamba2: cb.Model) -> None:
    site = "layers.0.ssm.y"
    value = 3 * torch.randn_like(capture(mamba2, BOTH, site)[site].nan_to_num())
    with pytest.raises(BadInput, match=r"positions=slice\(0, 6\)"):
        logits_of(mamba2, BOTH, Set(site, value))
    got = logits_of(mamba2, [LONG], Set(site, value[:1], positions=slice(0, 6)))
    torch.testing.assert_close(got[0], intervene(mamba2, [LONG], Set(site, value[:1])).logits[:, -1])


def test_logits_can_be_held_though_only_the_last_are_made(mamba2: cb.Model) -> None:
    towards = torch.zeros(97)
    towards[40] = 100.0
    with hold(mamba2, Add("logits", towards)):
        assert mamba2.generate_text(BOTH, max_new_tokens=3) == ["40 40 40"] * 2
    with hold(mamba2, Add("logits", towards, positions=[6])):
        assert [text.split()[1] == "40" for text in mamba2.generate_text(BOTH, max_new_tokens=2)] == [True, False]


def test_capture_reads_before_what_is_held_at_a_later_site(mamba2: cb.Model) -> None:
    plain = capture(mamba2, BOTH, "layers.0.ssm.y")
    with steer(mamba2, torch.randn(32), site="layers.1.resid_post"):
        held = capture(mamba2, BOTH, "layers.0.ssm.y")
    torch.testing.assert_close(held["layers.0.ssm.y"], plain["layers.0.ssm.y"], equal_nan=True)


# Files, models, errors ------------------------------------------------------------------------------------------------


def test_sites_that_are_one_tensor_are_stored_twice_and_folders_are_not_mixed(mamba2: cb.Model, tmp_path: Path) -> None:
    sites = ["embed", "layers.0.resid_pre"]
    kept = capture(mamba2, [LONG], sites)
    capture(mamba2, [LONG], sites, out=tmp_path)
    stored = load_file(tmp_path / "000000.safetensors")
    for site in sites:
        assert torch.equal(stored[site], kept[site])
    with pytest.raises(BadInput, match="another run"):
        capture(mamba2, [LONG], sites, out=tmp_path)


def test_a_module_one_holds_is_put_into_eager_attention() -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, intermediate_size=48, num_attention_heads=4
    )
    hf = LlamaForCausalLM(config).train()
    assert hf.config._attn_implementation == "sdpa"
    model = cb.load_model(hf)
    assert not hf.training
    pattern = capture(model, [LONG], "layers.0.attn.pattern")["layers.0.attn.pattern"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(1, 4, 6))


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda m: capture(m, [LONG], []), BadInput, "no site"),
        (lambda m: capture(m, [LONG], "embed", batch_size=0), BadInput, "batch_size=0"),
        (lambda m: capture(m, [LONG], "layers.*.attn.q"), SiteNotFound, "ssm.gated"),
        (lambda m: capture(m, "", "embed"), BadInput, "no tokens"),
        (lambda m: intervene(m, [LONG], Scale("layers.0.ssm.y", 0.0, heads=torch.tensor([9]))), BadInput, "0 to 3"),
        (lambda m: intervene(m, [LONG], Scale("layers.0.ssm.y", 0.0, heads=[])), BadInput, "0 to 3"),
        (lambda m: intervene(m, BOTH, Scale("layers.0.ssm.y", 0.0, positions=slice(9, 12))), BadInput, "no token"),
    ],
    ids=["sites", "batch_size", "layer", "prompt", "heads", "no heads", "positions"],
)
def test_what_cannot_be_meant_is_said(mamba2: cb.Model, run: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(mamba2)
