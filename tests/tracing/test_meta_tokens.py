"""Meta tokens: the model's layers have columns before a prompt's own, and positions still count its tokens from 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench.models import Model
from circuitbench.models.prompts import encode
from circuitbench.tracing.addresses import axes_by_address
from circuitbench.tracing.forward import forward
from tests.architectures.cases import prompts, relative

PROMPTS = prompts(9, 6)  # the second is padded: three columns, then the meta tokens, then its own
META = 3


@pytest.fixture(scope="module")
def model() -> Model:
    return cb.load_model("random:hymba")


def sites(model: Model, layer: int = 1) -> list[str]:
    """Every site of a layer that can be captured, and those of the model."""
    inside = [address for address in model.sites if address.startswith(f"layers.{layer}.")]
    return ["embed", *(address for address in inside if not address.endswith("mixing")), "logits"]


def own(value: Tensor, address: str, model: Model, length: int) -> Tensor:
    """One prompt's part of a captured tensor, without what is past its end."""
    axes = axes_by_address(model, address)[1:]
    return value[tuple(slice(length) if axis == "t" else slice(None) for axis in axes)]


def test_the_columns_are_said_where_the_model_is_printed(model: Model) -> None:
    assert model.meta_tokens == META
    assert "resid_post       (b, 3+t, 32)" in repr(model)
    assert "logits (b, t, 97)" in repr(model)
    assert cb.load_model("random:jamba").meta_tokens == 0


def test_captured_positions_are_each_prompts_own(model: Model) -> None:
    addresses = sites(model)
    together = cb.capture(model, PROMPTS, addresses)
    for row, prompt in enumerate(PROMPTS):
        alone = cb.capture(model, [prompt], addresses)
        with torch.no_grad():
            with model.trace(torch.tensor([prompt])):
                embedded = model.embed.save()
                pattern = model.layers[1].attn.pattern.save()
                after = model.layers[1].resid_post.save()
        seen = {"embed": embedded, "layers.1.attn.pattern": pattern, "layers.1.resid_post": after}
        for address in addresses:
            part = own(together[address][row], address, model, len(prompt))
            assert relative(part, own(alone[address][0], address, model, len(prompt))) < 1e-5, address
        # What a view shows begins with the meta tokens.
        assert torch.equal(embedded[0, :META], model.hf.model.memory_tokens)
        for address, value in seen.items():
            ours = value[:, META:] if address != "layers.1.attn.pattern" else value[..., META:, META:]
            assert torch.equal(ours, alone[address])


def test_kept_positions_are_each_prompts_own(model: Model) -> None:
    addresses = [address for address in sites(model) if address != "logits"]
    whole, kept = (cb.capture(model, PROMPTS, addresses, positions=p) for p in (None, [-1, 2]))
    for address in addresses:
        axis = axes_by_address(model, address).index("t") - 1
        for row, prompt in enumerate(PROMPTS):
            for place, position in enumerate((len(prompt) - 1, 2)):
                found, expected = (
                    value[address][row].select(axis, p) for value, p in ((kept, place), (whole, position))
                )
                torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=1e-6)


def test_a_forward_returns_the_columns_of_its_batch(model: Model) -> None:
    batch = encode(model, PROMPTS)
    found = forward(model, batch, sites=["embed", "layers.1.attn.pattern", "layers.1.ssm.state"])
    assert found["embed"].shape == (2, 9, 32)
    assert torch.equal(found["embed"][1, 3:], model.hf.model.embed_tokens(batch.input_ids[1, 3:]))
    assert found["layers.1.attn.pattern"].shape == (2, 4, 9, 9)
    assert found["layers.1.ssm.state"].shape == (2, 9, 64, 8)


@pytest.mark.parametrize(
    "name", ["resid_post", "mlp.out", "ssm.out", "attn.out", "ssm.branch", "attn.branch", "attn.z"]
)
def test_an_edit_in_the_last_layer_moves_the_logits_of_its_position_alone(model: Model, name: str) -> None:
    change = cb.Add(f"layers.4.{name}", 1.0, positions=3)
    base, edited = (cb.intervene(model, PROMPTS, items) for items in ([], change))
    moved = (edited.logits - base.logits).abs().amax(-1)
    assert (moved[:, 3] > 1e-3).all()
    moved[:, 3] = 0
    assert (moved.nan_to_num() == 0).all()


def test_an_edit_anywhere_begins_at_its_position(model: Model) -> None:
    names = ("ssm.in_proj", "ssm.conv", "ssm.dt", "ssm.write", "ssm.state", "attn.v", "attn.z", "mlp.hidden")
    addresses = ["embed", *(f"layers.1.{name}" for name in names), "logits"]
    base = cb.intervene(model, PROMPTS, [], sites=addresses)
    for address in addresses:
        edited = cb.intervene(model, PROMPTS, cb.Scale(address, 1.5, positions=3), sites=[address])
        at, before = edited[address] - base[address], edited.logits - base.logits
        axis = axes_by_address(model, address).index("t")
        changed = at.movedim(axis, 1).flatten(2).abs().amax(2)
        assert (changed[:, :3] == 0).all(), address
        assert (changed[:, 3] > 0).all(), address
        if not address.endswith("state"):  # what follows a state is another state
            assert (changed[:, 4:].nan_to_num() == 0).all(), address
        assert relative(edited.logits[:, :3], base.logits[:, :3]) < 1e-5, address
        assert (before[:, 3].abs().amax(1) > 0).all(), address


def test_a_block_that_counts_the_columns_does_the_same(model: Model) -> None:
    ids, vector = torch.tensor(PROMPTS[:1]), torch.randn(32)
    with torch.no_grad():
        with model.trace(ids):
            model.layers[1].resid_post[:, META + 3] += vector
            added = model.logits.save()
        with model.trace(ids):
            model.layers[1].ssm.edit_state({META + 3: torch.zeros_like})
            emptied = model.logits.save()
    assert torch.equal(cb.intervene(model, ids, cb.Add("layers.1.resid_post", vector, positions=3)).logits, added)
    assert torch.equal(cb.intervene(model, ids, cb.Set("layers.1.ssm.state", 0.0, positions=3)).logits, emptied)


@pytest.mark.parametrize("name", ["resid_pre", "ssm.x", "ssm.state", "ssm.y", "attn.q", "attn.pattern", "attn.z"])
def test_setting_what_was_captured_changes_nothing(model: Model, name: str) -> None:
    address = f"layers.1.{name}"
    value = cb.capture(model, PROMPTS, address)[address].nan_to_num()
    assert cb.intervene(model, PROMPTS, cb.Set(address, value)).delta_norm < 1e-4


def test_keys_are_positions_too(model: Model) -> None:
    address = "layers.0.attn.pattern"
    result = cb.intervene(model, PROMPTS, cb.Set(address, 0.0, positions=5, channels=[1]), sites=[address])
    base = cb.capture(model, PROMPTS, address)[address]
    changed = (result[address] != base) & ~base.isnan()
    assert {tuple(place[2:]) for place in changed.nonzero().tolist()} == {(5, 1)}


def test_a_knockout_removes_one_term_of_the_sum(model: Model) -> None:
    # y_5 loses mixing[5, 1]·x_1, in the prompt's own positions, whatever comes before them.
    address = "layers.1.ssm.y"
    base, without = (
        cb.intervene(model, PROMPTS, items, sites=[address])[address]
        for items in ([], cb.Knockout("layers.1.ssm", sources=1, destinations=5))
    )
    x = cb.capture(model, PROMPTS, "layers.1.ssm.x")["layers.1.ssm.x"]
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            with model.trace(torch.tensor([prompt])):
                mixing = model.layers[1].ssm.mixing(channels=list(range(64))).save()
        lost = (base - without)[row, : len(prompt)]
        expected = mixing[0, :, META + 5, META + 1] * x[row, 1]
        assert relative(lost[5], expected) < 1e-4
        lost[5] = 0
        assert lost.abs().max() < 1e-6


def test_a_mean_is_over_the_prompts_tokens_alone(model: Model) -> None:
    address = "layers.2.resid_post"
    mean = cb.capture(model, PROMPTS, address).tokens(address).mean(0)
    runs = [cb.intervene(model, PROMPTS, item) for item in (cb.Ablate(address, mode="mean"), cb.Set(address, mean))]
    assert relative(*(run.logits.nan_to_num() for run in runs)) < 1e-5


@pytest.mark.parametrize(
    "item",
    [
        cb.Add("layers.1.resid_post", torch.linspace(-3, 3, 32), positions=2),
        cb.Add("layers.1.resid_post", torch.linspace(-3, 3, 32), positions=slice(9, None)),
        cb.Scale("layers.0.attn.pattern", 0.1, channels=[0, 4]),
        cb.Scale("layers.4.ssm.y", -2.0),
        cb.Scale("logits", -1.0, positions=slice(10, None)),
        cb.Ablate("layers.1.ssm.state", positions=slice(8, 11)),
    ],
    ids=repr,
)
def test_what_is_held_holds_while_decoding(model: Model, item: Any) -> None:
    # With a cache, every step has one column; without, all of them again, meta tokens first.
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    ids = torch.tensor([PROMPTS[0], [5, 5, 5, *PROMPTS[1]]])

    def generated(cache: bool, items: Any) -> Tensor:
        with torch.no_grad(), cb.tracing.hold(model, items):
            with model.generate(input_ids=ids, attention_mask=mask, use_cache=cache, **settings) as tracer:
                found = torch.stack(tracer.result.logits).save()
        return found

    steps = generated(True, item)
    assert relative(steps, generated(False, item)) < 1e-5
    assert relative(steps, generated(True, [])) > 1e-2


def test_effects_have_a_column_for_every_token(model: Model) -> None:
    effects = cb.ablation_effects(model, PROMPTS[0], "resid_post", metric=cb.logit_diff(5, 7))
    assert effects.values.shape == (5, 9)
    assert (effects.values[4, :8] == 0).all()  # the last layer's stream reaches the metric at the last token alone
    assert effects.values[4, 8] != 0
