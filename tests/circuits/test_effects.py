"""Effect maps against a circuit that is known, against plain hooks, and against one trace for every cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench.circuits import ablation_effects, logit_diff, patch_effects
from circuitbench.errors import BadInput, SiteNotFound

CLEAN, CORRUPT = [5, 17, 3, 60, 41, 8, 23], [5, 17, 44, 60, 41, 8, 23]
METRIC = logit_diff(11, 30)


@pytest.fixture(scope="module")
def compiled() -> cb.Model:
    return cb.load_model("zoo:mqar-compiled")


@pytest.fixture(scope="module", params=["mamba", "bamba", "falcon_h1"])
def model(request: pytest.FixtureRequest) -> cb.Model:
    return cb.load_model(f"random:{request.param}", dtype="float64")  # effects on random models are small


def difference(logits: Tensor) -> float:
    return (logits[0, -1, 11] - logits[0, -1, 30]).item()


# The compiled model stores each pair at layer 1, when the value is read, and never forgets it.
RECALL, STORED = "k3 v7 k9 v2 k5 v1 k9", 3


def test_a_known_memory_is_found_where_it_is_and_nowhere_else(compiled: cb.Model) -> None:
    effects = patch_effects(compiled, RECALL, "k3 v7 k9 v4 k5 v1 k9", metric=logit_diff("v2", "v4"))
    whole = effects.donor - effects.base
    assert whole < -15
    torch.testing.assert_close(effects.values[1, STORED:], torch.full((4,), whole), rtol=0.01, atol=0.0)
    assert (effects.values[1, :STORED] == 0).all()
    assert (effects.values[0].abs() < 0.01 * abs(whole)).all()
    assert {(cell.layer, cell.position) for cell in effects.top(4)} == {(1, t) for t in range(STORED, 7)}


def test_without_its_memory_the_compiled_model_has_no_preference(compiled: cb.Model) -> None:
    effects = ablation_effects(compiled, RECALL, metric=logit_diff("v2", "v7"))
    torch.testing.assert_close(effects.values[1, STORED:], torch.full((4,), -effects.base), rtol=0.0, atol=1e-3)
    # The other pair is stored at position 1, and asking for another key does not touch it.
    assert (effects.values[1, :STORED].abs() < 1e-3).all()


def test_denoising_restores_what_noising_takes(compiled: cb.Model) -> None:
    pair = RECALL, "k3 v7 k9 v4 k5 v1 k9"
    there = patch_effects(compiled, *pair, metric=logit_diff("v2", "v4"), direction="denoise")
    back = patch_effects(compiled, *reversed(pair), metric=logit_diff("v2", "v4"))
    torch.testing.assert_close(there.values, back.values)
    assert there.base == back.base < 0 < there.donor
    assert there.values[1, -1] > 15


def test_patching_a_prompt_with_itself_does_nothing(model: cb.Model) -> None:
    for site in ("ssm.state", "ssm.out", "resid_post"):
        effects = patch_effects(model, CLEAN, CLEAN, site, metric=METRIC)
        measured = effects.values[~effects.values.isnan()]
        assert len(measured) > 0
        torch.testing.assert_close(measured, torch.zeros_like(measured), rtol=0.0, atol=1e-6)


def test_the_residual_stream_agrees_with_plain_hooks(model: cb.Model) -> None:
    blocks = model.hf.get_submodule(cb.architectures.ARCHITECTURES[model.architecture].layers)
    with torch.no_grad():
        base, donor = (model.hf(torch.tensor([ids]), output_hidden_states=False).logits for ids in (CLEAN, CORRUPT))
    effects = patch_effects(model, CLEAN, CORRUPT, "resid_post", metric=METRIC)
    for layer in range(len(model.layers)):
        for position in (2, 5, 6):
            kept: dict[str, Tensor] = {}

            def hook(block, args, out, place=position, kept=kept):
                stream = out[0] if isinstance(out, tuple) else out
                if "donor" not in kept:
                    kept["donor"] = stream.clone()
                    return None
                stream = stream.clone()
                stream[:, place] = kept["donor"][:, place]
                return (stream, *out[1:]) if isinstance(out, tuple) else stream

            handle = blocks[layer].register_forward_hook(hook)
            with torch.no_grad():
                model.hf(torch.tensor([CORRUPT]))
                patched = model.hf(torch.tensor([CLEAN])).logits
            handle.remove()
            expected = difference(patched) - difference(base)
            assert effects.values[layer, position].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # After the last layer's last position nothing is left of the clean prompt.
    assert effects.values[-1, -1].item() == pytest.approx(difference(donor) - difference(base), rel=1e-5)
    assert effects.values[:, :2].abs().max() < 1e-6  # the prompts differ from position 2 on


def test_state_effects_agree_with_one_trace_for_every_cell(model: cb.Model) -> None:
    effects = patch_effects(model, CLEAN, CORRUPT, "ssm.state", metric=METRIC, batch_size=3)
    layer = next(layer.index for layer in model.layers if "ssm.state" in layer.sites)
    donor = cb.capture(model, torch.tensor(CORRUPT), f"layers.{layer}.ssm.state")[f"layers.{layer}.ssm.state"]
    largest = effects.values[layer, 2:].abs().max().item()
    assert largest > 100 * effects.values[layer, :2].abs().max()  # the prompts differ from position 2 on
    for position in range(len(CLEAN)):
        with torch.no_grad():
            with model.trace(torch.tensor([CLEAN])):
                model.layers[layer].ssm.edit_state({position: donor[:, position]}, states=False)
                patched = model.logits.save()
            with model.trace(torch.tensor([CLEAN])):
                base = model.logits.save()
        expected = difference(patched) - difference(base)
        assert effects.values[layer, position].item() == pytest.approx(expected, abs=0.01 * largest)


def test_mean_ablation_puts_in_the_mean_over_the_prompt(model: cb.Model) -> None:
    layer = next(layer.index for layer in model.layers if "ssm.out" in layer.sites)
    address = f"layers.{layer}.ssm.out"
    mean = cb.capture(model, torch.tensor(CLEAN), address)[address].mean(1, keepdim=True)
    effects = ablation_effects(model, CLEAN, "ssm.out", mode="mean", metric=METRIC)
    by_hand = cb.intervene(model, torch.tensor(CLEAN), cb.Set(address, mean, positions=4))
    expected = difference(by_hand.logits) - effects.base
    assert effects.values[layer, 4].item() == pytest.approx(expected, rel=1e-5)


def test_layers_without_the_site_are_nan_and_never_on_top() -> None:
    model = cb.load_model("random:bamba")
    effects = patch_effects(model, CLEAN, CORRUPT, metric=METRIC)
    lacking = [layer.index for layer in model.layers if "ssm.state" not in layer.sites]
    assert lacking and effects.values[lacking].isnan().all()
    assert not effects.values[[i for i in effects.layers if i not in lacking]].isnan().any()
    assert len(effects.top(1_000)) == effects.values.numel() - effects.values[lacking].numel()
    table = effects.to_dataframe()
    assert list(table.columns) == ["layer", "position", "token", "value"] and not table.value.isna().any()
    best = effects.top(1)[0]
    assert abs(best.value) == table.value.abs().max() and effects.values[best.layer, best.position] == best.value


def test_the_plot_shows_the_values(compiled: cb.Model) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    effects = ablation_effects(compiled, RECALL, metric=logit_diff("v2", "v7"))
    axes = effects.plot()
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().filled().tolist()), effects.values)
    assert [label.get_text() for label in axes.get_xticklabels()] == RECALL.split()
    matplotlib.pyplot.close(axes.figure)


def test_effects_measured_remotely_are_the_same(compiled: cb.Model) -> None:
    pair = RECALL, "k3 v7 k9 v4 k5 v1 k9"
    here, there = (
        patch_effects(compiled, *pair, metric=logit_diff("v2", "v4"), remote=where) for where in (False, "local")
    )
    torch.testing.assert_close(there.values, here.values, rtol=1e-5, atol=1e-4)
    assert (there.base, there.donor) == pytest.approx((here.base, here.donor), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"corrupt": [1, 2]}, BadInput, "clean has 7 tokens and corrupt 2"),
        ({"clean": [[1, 2], [3, 4]]}, BadInput, "clean holds 2 prompts"),
        ({"site": "ssm.stat"}, SiteNotFound, "ssm.stat"),
        ({"site": "ssm.mixing"}, BadInput, "matrix over positions"),
        ({"direction": "both"}, BadInput, "'both'"),
        ({"batch_size": 0}, BadInput, "batch_size=0"),
    ],
)
def test_bad_input_is_said_in_one_sentence(changes: dict, error: type, message: str) -> None:
    given = {"clean": CLEAN, "corrupt": CORRUPT, "site": "ssm.state", "metric": METRIC} | changes
    with pytest.raises(error, match=message):
        patch_effects(cb.load_model("random:mamba2"), **given)


def test_an_unknown_ablation_is_refused(compiled: cb.Model) -> None:
    with pytest.raises(BadInput, match="'resample'"):
        ablation_effects(compiled, RECALL, mode="resample", metric=logit_diff("v2", "v7"))


def test_a_state_with_a_unit_is_patched_in_its_own() -> None:
    """RWKV-4 keeps its state in units of exp(scale), which each prompt has for itself: against states swapped whole."""
    model, t = cb.load_model("random:rwkv"), 3
    clean, corrupt = torch.tensor([5, 17, 3, 60, 41, 8]), torch.tensor([5, 44, 30, 12, 77, 9])
    names = [f"layers.0.ssm.{name}" for name in ("state", "scale")]
    mine, other = (cb.run_prefix(model, ids[None, : t + 1]) for ids in (clean, corrupt))
    swapped = mine.edited({name: other[name] for name in names})
    after = [cb.continue_from(model, state, clean[None, t + 1 :]).logits[0, -1] for state in (swapped, mine)]
    expected = (after[0][11] - after[0][30]) - (after[1][11] - after[1][30])
    assert expected.abs() > 1e-3
    effects = cb.patch_effects(model, clean, corrupt, site="ssm.state", metric=cb.logit_diff(11, 30))
    assert effects.values[0, t] == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(cb.BadInput, match="in a unit of its own"):
        cb.intervene(model, clean, cb.Ablate("layers.0.ssm.state", mode="mean"))
