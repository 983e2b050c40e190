"""Interventions do to each prompt's own tokens what a block written by hand does to that prompt alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench.tracing import Ablate, Add, Knockout, Scale, Set, capture, intervene
from circuitbench.tracing.addresses import read_site, write_site
from tests.architectures.cases import PADDED, S6, load, prompts, relative

ROWS = prompts(9, 6)
Y = "layers.0.ssm.y"


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return load("mamba2")


def written(model: cb.Model, ids: list[int], site: str, change: Callable[[Tensor], Any]) -> Tensor:
    """Logits of one prompt, with a change made in place by a block of one's own."""
    with torch.no_grad():
        with model.trace(torch.tensor([ids])):
            value = read_site(model, site).clone()
            change(value)
            write_site(model, site, value)
            logits = model.logits.save()
    return logits[0]


def assert_as_by_hand(model: cb.Model, intervention: Any, change: Callable[[Tensor], Any]) -> None:
    """The intervention on the padded batch is the change in each prompt alone."""
    together = intervene(model, ROWS, intervention)
    assert together.delta_norm > 1e-4
    for number, ids in enumerate(ROWS):
        alone = written(model, ids, intervention.site, change)
        assert relative(together.logits[number, : len(ids)], alone) < 1e-5
        assert together.logits[number, len(ids) :].isnan().all()


def half(value: Tensor) -> Tensor:
    return value.mul_(0.5)


def test_positions_are_each_prompts_own(model: cb.Model) -> None:
    assert_as_by_hand(model, Scale(Y, 0.5, positions=2), lambda y: half(y[:, 2]))
    assert_as_by_hand(model, Scale(Y, 0.5, positions=-2), lambda y: half(y[:, -2]))
    assert_as_by_hand(model, Scale(Y, 0.5, positions="last"), lambda y: half(y[:, -1]))
    assert_as_by_hand(model, Scale(Y, 0.5, positions=[0, -1]), lambda y: (half(y[:, 0]), half(y[:, -1])))
    assert_as_by_hand(model, Scale(Y, 0.5, positions=slice(1, -1)), lambda y: half(y[:, 1:-1]))
    assert_as_by_hand(model, Scale(Y, 0.5, positions=slice(None, None, 2)), lambda y: half(y[:, ::2]))
    assert_as_by_hand(model, Scale(Y, 0.5), half)


def test_a_mask_of_positions_is_of_each_prompts_own_tokens(model: cb.Model) -> None:
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, [1, 7]] = mask[1, [0, 4]] = True
    got = intervene(model, ROWS, Set(Y, 0.0, positions=mask))
    for number, chosen in enumerate(([1, 7], [0, 4])):
        alone = written(model, ROWS[number], Y, lambda y, chosen=chosen: y.index_fill_(1, torch.tensor(chosen), 0))
        assert relative(got.logits[number, : len(ROWS[number])], alone) < 1e-5


def test_heads_and_channels(model: cb.Model) -> None:
    assert_as_by_hand(model, Scale(Y, 0.5, heads=1), lambda y: half(y[:, :, 1]))
    assert_as_by_hand(model, Scale(Y, 0.5, heads=[0, -1]), lambda y: (half(y[:, :, 0]), half(y[:, :, -1])))
    assert_as_by_hand(model, Scale(Y, 0.5, channels=[3, 5]), lambda y: (half(y[..., 3]), half(y[..., 5])))
    assert_as_by_hand(model, Scale(Y, 0.5, 2, heads=1, channels=slice(4)), lambda y: half(y[:, 2, 1, :4]))
    mask = torch.arange(32) % 3 == 0
    assert_as_by_hand(model, Scale("layers.1.resid_post", 0.5, channels=mask), lambda x: half(x[..., ::3]))
    assert_as_by_hand(model, Scale("layers.0.ssm.dt", 0.5, heads=2), lambda dt: half(dt[:, :, 2]))
    assert_as_by_hand(model, Scale("layers.0.ssm.write", 0.5, 2, heads=2), lambda w: half(w[:, 2, 2]))


def test_what_is_done_there(model: cb.Model) -> None:
    vector, column = torch.randn(16), torch.randn(4, 1)
    assert_as_by_hand(model, Set(Y, 0.25, positions=2), lambda y: y[:, 2].fill_(0.25))
    assert_as_by_hand(model, Set(Y, vector, positions=2), lambda y: y[:, 2].copy_(vector.expand(4, 16)))
    assert_as_by_hand(model, Add(Y, vector, strength=-2.0), lambda y: y.sub_(2 * vector))
    assert_as_by_hand(model, Add(Y, column, heads=3), lambda y: y[:, :, 3].add_(column[3]))
    assert_as_by_hand(model, Scale(Y, vector), lambda y: y.mul_(vector))
    assert_as_by_hand(model, Ablate(Y, heads=3), lambda y: y[:, :, 3].zero_())


def test_the_mean_is_over_all_real_tokens_of_the_run(model: cb.Model) -> None:
    mean = capture(model, ROWS, Y).tokens(Y).mean(0)
    change = lambda y: (y[:, 1].copy_(mean[None]), y[:, -1].copy_(mean[None]))  # noqa: E731
    assert_as_by_hand(model, Ablate(Y, "mean", positions=[1, -1]), change)
    elsewhere = capture(model, prompts(5, 8, seed=3), Y)
    assert elsewhere[Y].isnan().any()
    mean = elsewhere.tokens(Y).mean(0)
    for reference in (elsewhere[Y], elsewhere.tokens(Y)):
        item = Ablate(Y, "mean", positions=1, heads=2, reference=reference)
        assert_as_by_hand(model, item, lambda y: y[:, 1, 2].copy_(mean[2]))


def test_a_mean_over_states_is_over_all_real_tokens_too(model: cb.Model) -> None:
    state = "layers.0.ssm.state"
    mean = capture(model, ROWS, state).tokens(state).mean(0)
    got = intervene(model, ROWS, Ablate(state, "mean", positions=2))
    expected = intervene(model, ROWS, Set(state, mean, positions=2))
    assert expected.delta_norm > 1e-5
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("site", [Y, "layers.1.resid_post", "layers.0.ssm.state"])
def test_resampling_puts_other_real_tokens_there(model: cb.Model, site: str) -> None:
    tokens = capture(model, ROWS, site).tokens(site)

    def drawn(seed: int) -> list[int]:
        """Which token of the run stands at each position now."""
        got = intervene(model, ROWS, Ablate(site, "resample", positions=slice(1, None), seed=seed), site)[site]
        found = []
        for row, ids in enumerate(ROWS):
            for value in got[row, 1 : len(ids)]:
                distance = (tokens - value).flatten(1).abs().amax(1)
                assert distance.min() < 1e-6  # nothing but real tokens, padding least of all
                found.append(int(distance.argmin()))
        return found

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert len(set(drawn(0))) > 3


def test_channels_of_a_resampled_token_stay_together(model: cb.Model) -> None:
    reference = torch.arange(5.0)[:, None, None].expand(5, 4, 16)
    got = intervene(model, ROWS, Ablate(Y, "resample", reference=reference), Y)[Y][0]
    assert (got == got[:, :1, :1]).all()
    assert set(got[:, 0, 0].tolist()) <= set(range(5))


def test_at_one_site_the_list_is_the_order_and_sites_take_that_of_the_model(model: cb.Model) -> None:
    both = [Add(Y, 1.0), Scale(Y, 0.5)]
    forward = intervene(model, ROWS, both, Y)
    backward = intervene(model, ROWS, both[::-1], Y)
    plain = capture(model, ROWS, Y)[Y]
    torch.testing.assert_close(forward[Y], (plain + 1) * 0.5, equal_nan=True)
    torch.testing.assert_close(backward[Y], plain * 0.5 + 1, equal_nan=True)
    apart = [Scale("layers.1.ssm.gated", 0.5), Scale("layers.0.ssm.x", 0.5)]
    assert torch.equal(intervene(model, ROWS[:1], apart).logits, intervene(model, ROWS[:1], apart[::-1]).logits)


def test_sites_come_back_as_they_are_after_the_interventions(model: cb.Model) -> None:
    got = intervene(model, ROWS, Set(Y, 0.0, positions=2), [Y, "layers.0.ssm.state", "layers.1.resid_pre", "logits"])
    plain = capture(model, ROWS, [Y, "layers.0.ssm.state", "layers.1.resid_pre"])
    assert (got[Y][:, 2] == 0).all()
    torch.testing.assert_close(got["layers.0.ssm.state"], plain["layers.0.ssm.state"], equal_nan=True)
    assert relative(got["layers.1.resid_pre"][:, 2], plain["layers.1.resid_pre"][:, 2]) > 1e-3
    torch.testing.assert_close(got["logits"], got.logits, rtol=0, atol=0, equal_nan=True)


def test_delta_norm_is_how_far_the_logits_of_real_tokens_moved(model: cb.Model) -> None:
    got = intervene(model, ROWS, Scale(Y, 0.5))
    moved = 0.0
    for ids in ROWS:
        alone = written(model, ids, Y, half)
        moved += (alone - model.hf(torch.tensor([ids])).logits[0]).square().sum().item()
    assert got.delta_norm == pytest.approx(moved**0.5, rel=1e-4)
    assert intervene(model, ROWS, []).delta_norm == 0
    assert intervene(model, ROWS, Add(Y, 0.0)).delta_norm == 0


@pytest.mark.parametrize("variant", [*PADDED, "falcon_h1-no-norm", "granitemoehybrid-no-experts"])
def test_every_writable_site_takes_interventions_in_a_padded_batch(variant: str) -> None:
    """At each site alone for what it does; at all sites at once for padding."""
    model = load(variant)
    sites = [site for site in model.sites if not site.endswith(".mixing")]
    last = f"layers.{len(model.layers) - 1}."
    for site in (site for site in sites if site.startswith((last, "embed", "logits"))):
        item = Scale(site, torch.tensor([0.5]), positions=[1, -1], channels=slice(1))
        assert intervene(model, ROWS, item).delta_norm > 1e-7, site
    everywhere = [Scale(site, 0.9, positions=[1, -1]) for site in sites]
    together = intervene(model, ROWS, everywhere)
    for number, ids in enumerate(ROWS):
        alone = intervene(model, [ids], everywhere)
        assert relative(together.logits[number, : len(ids)], alone.logits[0]) < 2e-5


@pytest.mark.parametrize("family", ["llama", "jamba", "gpt2", "gemma2"])
def test_positions_of_a_pattern_are_its_queries(family: str) -> None:
    model = load(family)
    layer = next(layer.index for layer in model.layers if "attn.pattern" in layer.sites)
    site = f"layers.{layer}.attn.pattern"
    assert_as_by_hand(model, Scale(site, 0.5, positions=-2, heads=1), lambda pattern: half(pattern[:, 1, -2]))
    got = intervene(model, ROWS, Set(site, 0.0, positions=2), [site, f"layers.{layer}.attn.z"])
    assert (got[site][:, :, 2, :3] == 0).all()
    assert (got[f"layers.{layer}.attn.z"][:, 2] == 0).all()


# Knockouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["mamba2", "falcon_h1", "qwen3_next", "mamba2-many-groups", "rwkv7", "kimi_linear"])
def test_a_knockout_is_a_hole_in_the_mixing_matrix(variant: str) -> None:
    model = load(variant)
    mixed = "v" if variant == "rwkv7" else "x"  # what is mixed has its family's name
    names, taken_out = [f"layers.0.ssm.{name}" for name in (mixed, "state", "y", "mixing")], 0.0
    for item, pairs in (
        (Knockout("layers.0.ssm", 1, "last"), [(-1, 1)]),
        (Knockout("layers.0.ssm.y", [0, 2], [3, -1]), [(t, s) for t in (3, -1) for s in (0, 2)]),
        (Knockout("layers.0.ssm.mixing", 2), [(t, 2) for t in range(9)]),
        (Knockout("layers.0.ssm", slice(0, 3), -1, heads=[1]), [(-1, s) for s in range(3)]),
    ):
        got = intervene(model, ROWS, item, names[:3])
        for number, ids in enumerate(ROWS):
            plain = capture(model, [ids], names)
            hole = torch.zeros(len(ids), len(ids))
            for t, s in pairs:
                if s < len(ids) and t < len(ids):
                    hole[t, s] = 1
            removed = torch.einsum("bhts,ts,bshp->bthp", plain[names[3]], hole, plain[names[0]])
            if item.heads is not None:
                removed[:, :, [h for h in range(removed.shape[2]) if h not in item.heads]] = 0
            taken_out += removed.abs().sum().item()
            expected = plain[names[2]] - removed
            assert relative(got[names[2]][number, : len(ids)], expected[0]) < 1e-5
            # The state goes on as it was.
            assert relative(got[names[1]][number, : len(ids)], plain[names[1]][0]) < 1e-5
    assert taken_out > 1e-3


@pytest.mark.parametrize("family", S6)
def test_a_knockout_of_s6_is_a_hole_in_every_channels_matrix(family: str) -> None:
    model, ids = load(family), torch.tensor(ROWS[:1])
    channels = list(range(0, 64, 7))
    with torch.no_grad():
        with model.trace(ids):
            x = model.layers[0].ssm.x.save()
            mixing = model.layers[0].ssm.mixing(channels=channels).save()
            y = model.layers[0].ssm.y.save()
    got = intervene(model, ids, Knockout("layers.0.ssm", [1, 4], "last"), "layers.0.ssm.y")["layers.0.ssm.y"]
    expected = y.clone()[..., channels]
    for source in (1, 4):
        expected[:, -1] -= mixing[:, :, -1, source] * x[:, source, channels]
    assert relative(got[..., channels], expected) < 1e-5
    assert relative(got[..., channels], y[..., channels]) > 1e-4


def test_knockouts_of_different_pairs_add_up(model: cb.Model) -> None:
    one, other = Knockout("layers.0.ssm", 0, "last"), Knockout("layers.0.ssm", 1, -2)
    both = Knockout("layers.0.ssm", [0, 1], "last")
    plain = capture(model, ROWS[:1], Y)[Y]
    parts = [plain - intervene(model, ROWS[:1], item, Y)[Y] for item in (one, other)]
    together = intervene(model, ROWS[:1], [one, other], Y)[Y]
    torch.testing.assert_close(together, plain - parts[0] - parts[1], rtol=1e-5, atol=1e-7)
    third = Knockout("layers.0.ssm", 1, "last")
    split = intervene(model, ROWS[:1], [one, third], Y)[Y]
    torch.testing.assert_close(split, intervene(model, ROWS[:1], both, Y)[Y], rtol=1e-5, atol=1e-7)


def test_an_intervention_says_what_it_is() -> None:
    assert repr(Scale(Y, 0.5, positions=[1], heads=2)) == f"Scale('{Y}', positions=[1], heads=2, factor=0.5)"
    assert "torch" not in repr(Add(Y, torch.randn(100)))
