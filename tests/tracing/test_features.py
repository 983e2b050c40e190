"""Features of a dictionary as the where of an intervention: the edit by hand, x + (f' − f)·W_dec, is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench import dictionaries
from circuitbench.architectures import ARCHITECTURES
from circuitbench.models.random import random_model
from circuitbench.tracing import Ablate, Add, Feature, Scale, Set, ablate, capture, hold, intervene, steer
from tests.architectures.cases import load, prompts, relative
from tests.ndif.plugin import NdifServer, save_for_server
from tests.tracing.test_hold import from_scratch, generated

SITE = "layers.0.ssm.gated"
IDS = torch.tensor(prompts(9))
ROWS = prompts(9, 6)
N, K = 40, 6


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return load("mamba2")


@pytest.fixture(scope="module")
def sae(model: cb.Model) -> dictionaries.Dictionary:
    return made(model, SITE)


def made(model: cb.Model, site: str, **settings: Any) -> dictionaries.Dictionary:
    """A random dictionary that fits what a site holds: about K features are active on a token."""
    x = capture(model, IDS, site)[site]
    torch.manual_seed(1)
    sae = dictionaries.build("topk", d_in=x.shape[-1], d_dict=N, k=K, seed=3, **settings)
    with torch.no_grad():
        sae.W_enc += 0.1 * torch.randn_like(sae.W_enc)
        sae.W_enc *= 1 / x.std()
        sae.W_dec *= x.std()
        if not settings:
            sae.b_dec += x.mean((0, 1))
    sae.site = site
    return sae


def code(model: cb.Model, sae: dictionaries.Dictionary, ids: Any = IDS) -> Tensor:
    """The features' activations, `(b, t, N)`."""
    with torch.no_grad():
        return sae.encode(capture(model, ids, SITE)[SITE])


@pytest.fixture(scope="module")
def active(model: cb.Model, sae: dictionaries.Dictionary) -> list[int]:
    """Features that are active at the last token."""
    found = code(model, sae)[0, -1].nonzero().flatten().tolist()
    assert len(found) == K
    return found


def by_hand(model: cb.Model, sae: dictionaries.Dictionary, edit: Callable[[Tensor], Tensor], ids: Any = IDS) -> Tensor:
    """The logits with x + (edit(f) − f)·W_dec at the site, in a plain trace."""
    with torch.no_grad():
        with model.trace(ids):
            x = model.layers[0].ssm.gated
            f = sae.encode(x)
            model.layers[0].ssm.gated = x + (edit(f.clone()) - f) @ sae.W_dec
            logits = model.logits.save()
    return logits


def put(f: Tensor, tokens: Any, features: Any, value: Any) -> Tensor:
    f[:, tokens, features] = value
    return f


def test_every_intervention_on_a_feature_is_the_edit_by_hand(
    model: cb.Model, sae: dictionaries.Dictionary, active: list[int]
) -> None:
    i, j = active[:2]
    mean = code(model, sae).mean(1)[0]
    values, two = torch.linspace(0, 2, IDS.shape[1]), torch.tensor([1.0, 2.0])
    all_ = slice(None)
    cases: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
        (Set(Feature(sae, i), 3.0, positions=[-1]), lambda f: put(f, -1, i, 3.0)),
        (Set(Feature(sae, i), values), lambda f: put(f, all_, i, values)),
        (Scale(Feature(sae, i), 2.0), lambda f: put(f, all_, i, 2 * f[..., i])),
        (Add(Feature(sae, i), 1.5, strength=2.0), lambda f: put(f, all_, i, f[..., i] + 3.0)),
        (Ablate(Feature(sae, i)), lambda f: put(f, all_, i, 0.0)),
        (Ablate(Feature(sae, i), strength=0.25), lambda f: put(f, all_, i, 0.75 * f[..., i])),
        (Ablate(Feature(sae, i), mode="mean"), lambda f: put(f, all_, i, mean[i])),
        (Set(Feature(sae, [i, j]), two), lambda f: put(f, all_, [i, j], two)),
        (
            [Ablate(Feature(sae, i)), Scale(Feature(sae, j), 3.0)],
            lambda f: put(put(f, all_, i, 0.0), all_, j, 3 * f[..., j]),
        ),
        ([Set(Feature(sae, i), 2.0), Scale(Feature(sae, i), 3.0)], lambda f: put(f, all_, i, 6.0)),
    ]
    plain = intervene(model, IDS, []).logits
    for items, edit in cases:
        found = intervene(model, IDS, items).logits
        assert relative(found, by_hand(model, sae, edit)) < 1e-6, items
        assert relative(found, plain) > 1e-4, items


def test_resampling_takes_what_the_same_reference_token_has(
    model: cb.Model, sae: dictionaries.Dictionary, active: list[int]
) -> None:
    pair = active[:2]
    reference = capture(model, prompts(8, 5, seed=5), SITE)[SITE]  # NaN past the end of the shorter one
    item = Ablate(Feature(sae, pair), mode="resample", reference=reference, seed=4)
    x = intervene(model, IDS, item, SITE)[SITE]
    with torch.no_grad():
        f = sae.encode(capture(model, IDS, SITE)[SITE])
        moved = torch.linalg.lstsq(sae.W_dec[pair].T, (x - capture(model, IDS, SITE)[SITE])[0].T).solution.T
        held = sae.encode(reference[~reference.isnan().any(-1)])[:, pair]
    now = f[0][:, pair] + moved
    distance = torch.cdist(now, held).min(1)
    assert (distance.values < 1e-4).all()  # both features from one token
    assert len(set(distance.indices.tolist())) > 2


def test_what_is_not_active_is_ablated_without_a_trace(
    model: cb.Model, sae: dictionaries.Dictionary, active: list[int]
) -> None:
    silent = (code(model, sae)[0] == 0).all(0).nonzero().flatten()
    assert len(silent)
    one = Ablate(Feature(sae, int(silent[0])))
    assert torch.equal(intervene(model, IDS, one).logits, intervene(model, IDS, []).logits)
    own = code(model, sae)
    same = [Set(Feature(sae, active[0]), own[..., active[0]]), Scale(Feature(sae, active[1]), 1.0)]
    assert intervene(model, IDS, same).delta_norm < 1e-5
    # What is not asked for keeps its last bit.
    found = intervene(model, IDS, Set(Feature(sae, active[0]), 5.0, positions=3), SITE)[SITE]
    rest = [t for t in range(IDS.shape[1]) if t != 3]
    assert torch.equal(found[:, rest], capture(model, IDS, SITE)[SITE][:, rest])
    assert not torch.equal(found[:, 3], capture(model, IDS, SITE)[SITE][:, 3])


def test_neighbours_in_a_list_read_the_code_once(
    model: cb.Model, sae: dictionaries.Dictionary, active: list[int]
) -> None:
    i, j = active[:2]
    first, second = Set(Feature(sae, i), 8.0), Scale(Feature(sae, j), 2.0)
    x = capture(model, IDS, SITE)[SITE]
    alone = [intervene(model, IDS, item, SITE)[SITE] - x for item in (first, second)]
    both = intervene(model, IDS, [first, second], SITE)[SITE]
    assert relative(both, x + alone[0] + alone[1]) < 1e-6
    assert relative(intervene(model, IDS, [second, first], SITE)[SITE], both) < 1e-6
    # With something else on the site in between, the code is read anew from what that left.
    apart = intervene(model, IDS, [first, Scale(SITE, 0.5), second], SITE)[SITE]
    with torch.no_grad():
        half = 0.5 * (x + alone[0])
        expected = half + sae.encode(half)[..., [j]] @ sae.W_dec[[j]]
    assert relative(apart, expected) < 1e-6
    elsewhere = intervene(model, IDS, [first, Scale("layers.1.ssm.gated", 0.5), second], SITE)[SITE]
    assert relative(elsewhere, both) < 1e-6
    copy = dictionaries.from_weights("topk", W_enc=sae.W_enc, W_dec=sae.W_dec, b_enc=sae.b_enc, b_dec=sae.b_dec, k=K)
    other = intervene(model, IDS, [first, Scale(Feature(copy, j, site=SITE), 2.0)], SITE)[SITE]
    with torch.no_grad():
        expected = x + alone[0] + sae.encode(x + alone[0])[..., [j]] @ sae.W_dec[[j]]
    assert relative(other, expected) < 1e-6


def test_a_padded_batch_is_its_prompts_alone(model: cb.Model, sae: dictionaries.Dictionary, active: list[int]) -> None:
    items = [Set(Feature(sae, active[0]), 4.0, positions=[1, -1]), Ablate(Feature(sae, active[1:3]))]
    together = intervene(model, ROWS, items).logits
    for row, ids in enumerate(ROWS):
        assert relative(together[row, : len(ids)], intervene(model, [ids], items).logits[0]) < 1e-5


@pytest.mark.parametrize("variant", ["mamba2", "falcon_h1", "qwen3_next"])
def test_generating_is_running_everything_again_for_every_token(variant: str) -> None:
    model = load(variant)
    site = next(site for site in model.sites if site.endswith("ssm.gated"))
    sae = made(model, site)
    items = [Scale(Feature(sae, list(range(0, N, 2))), 3.0), Add(Feature(sae, 1), 2.0, positions=slice(3, None))]
    ids = torch.tensor(prompts(7))
    with hold(model, items):
        tokens, steps = generated(model, ids)
    again, expected = from_scratch(model, items, ids[0].tolist())
    assert tokens == again
    assert relative(steps[:, 0], expected) < 1e-4
    assert relative(steps[:, 0], generated(model, ids)[1]) > 1e-3


def test_steer_and_ablate_take_a_dictionary(model: cb.Model, sae: dictionaries.Dictionary, active: list[int]) -> None:
    def held(context: Any) -> Tensor:
        with context, torch.no_grad():
            with model.trace(IDS):
                logits = model.logits.save()
        return logits

    one, two = active[0], active[:2]
    assert torch.equal(held(ablate(model, sae, one)), intervene(model, IDS, Ablate(Feature(sae, one))).logits)
    half = held(ablate(model, sae, feature_id=two, strength=0.5, positions=-1))
    assert relative(half, by_hand(model, sae, lambda f: put(f, -1, two, 0.5 * f[:, -1, two]))) < 1e-6
    steered = held(steer(model, sae, feature_id=two, strength=[1.0, 2.0]))
    assert relative(steered, intervene(model, IDS, Add(Feature(sae, two), torch.tensor([1.0, 2.0]))).logits) < 1e-6


def test_the_logits_have_a_gradient_in_the_strength(
    model: cb.Model, sae: dictionaries.Dictionary, active: list[int]
) -> None:
    def loss(strength: Tensor) -> Tensor:
        with hold(model, Add(Feature(sae, active[0]), 1.0, strength=strength)):
            with model.trace(IDS):
                out = model.logits.double().square().mean().save()
        return out

    strength = torch.tensor(0.3, requires_grad=True)
    loss(strength).backward()
    with torch.no_grad():
        slope = (loss(torch.tensor(0.4)) - loss(torch.tensor(0.2))) / 0.2
    assert strength.grad is not None and abs(slope) > 1e-6
    assert abs(strength.grad - slope) < 2e-2 * abs(slope)


def test_a_transcoder_reads_one_site_and_writes_another(model: cb.Model) -> None:
    read, write = "layers.0.ssm.gated", "layers.0.ssm.out"
    x, y = (capture(model, IDS, site)[site] for site in (read, write))
    transcoder = made(model, read, d_out=y.shape[-1])
    transcoder.site_out = write
    with torch.no_grad():
        i = int(transcoder.encode(x)[0, -1].argmax())
    items = [Scale(write, 0.5), Set(Feature(transcoder, i), 2.0), Ablate(Feature(transcoder, 1)), Scale(write, 3.0)]
    found = intervene(model, IDS, items, [read, write])
    with torch.no_grad():
        f = transcoder.encode(x)
        after = put(put(f.clone(), slice(None), i, 2.0), slice(None), 1, 0.0)
        expected = 3 * (0.5 * y + (after - f) @ transcoder.W_dec)
    assert torch.equal(found[read], x)
    assert relative(found[write], expected) < 1e-6
    with hold(model, items):
        steps = generated(model, IDS)[1]
    assert relative(steps[:, 0], from_scratch(model, items, IDS[0].tolist())[1]) < 1e-4
    with pytest.raises(cb.BadInput, match="comes before"):
        intervene(model, IDS, Set(Feature(transcoder, i, site=write, site_out=read), 2.0))


def test_what_cannot_be_done_is_refused(model: cb.Model, sae: dictionaries.Dictionary) -> None:
    def refused(sentence: str, call: Callable[[], Any]) -> None:
        with pytest.raises(cb.BadInput, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)

    for wrong in (N, -1, True, 1.5, [], [1, 1], [0, N], "3"):
        refused(f"features 0 to {N - 1}", lambda wrong=wrong: Feature(sae, wrong))
    refused("takes a dictionary, with encode and W_dec, not Tensor", lambda: Feature(torch.ones(3, 4), 3))
    homeless = dictionaries.build("topk", d_in=8, d_dict=N, k=2)
    refused("does not know its site", lambda: Feature(homeless, 3))
    refused("site_out=.* is for transcoders", lambda: Feature(sae, 3, site_out=SITE))
    refused("heads= and channels= say nothing", lambda: Set(Feature(sae, 3), 1.0, heads=[0]))
    refused("heads= and channels= say nothing", lambda: Ablate(Feature(sae, 3), channels=[0]))
    refused("named by its address", lambda: cb.Knockout(Feature(sae, 3), 0))
    refused("reference=", lambda: hold(model, Ablate(Feature(sae, 3), mode="mean")).__enter__())
    refused("feature_id=None; this dictionary has features 0 to", lambda: ablate(model, sae))
    refused("give the dictionary", lambda: ablate(model, SITE, 3))
    refused("one for each of the 2 features", lambda: steer(model, sae, [1, 2], strength=[1.0, 2.0, 3.0]))
    narrow, void = torch.ones(3, 7), torch.full((3, 64), torch.nan)
    for sentence, item in [
        ("has 64 components a token, and the dictionary encodes 8", Set(Feature(homeless, 3, site=SITE), 1.0)),
        ("stands for 2 sites", Set(Feature(sae, 3, site="layers.*.ssm.gated"), 1.0)),
        ("does not broadcast", Set(Feature(sae, [3, 4]), torch.ones(3))),
        ("activations of the site, whose last axis is 64", Ablate(Feature(sae, 3), "mean", reference=narrow)),
        ("holds no token without NaN", Ablate(Feature(sae, 3), "mean", reference=void)),
    ]:
        refused(sentence, lambda item=item: intervene(model, IDS, item))
    sae.blocks = {SITE: 32, "layers.1.ssm.gated": 32}
    refused("reads layers.0.ssm.gated, layers.1.ssm.gated together", lambda: Feature(sae, 3))
    sae.blocks = {}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> cb.Model:
    """A model that a server can load too."""
    hf = random_model(ARCHITECTURES["mamba2"], vocab_size=257)
    return cb.load_model(save_for_server(hf, tmp_path_factory.mktemp("mamba2")))


@pytest.mark.parametrize("place", ["local", "server"])
def test_features_are_the_same_elsewhere(place: str, ndif_server: NdifServer, stored: cb.Model) -> None:
    model, remote = stored, "local" if place == "local" else ndif_server.url
    prompts = ["how does it compute", "short"]
    x, y = (capture(model, prompts, site)[site].nan_to_num() for site in (SITE, "layers.0.ssm.out"))
    sae = dictionaries.build("topk", d_in=x.shape[-1], d_dict=N, k=K)
    many = dictionaries.build("batchtopk", d_in=x.shape[-1], d_dict=N, k=K, d_out=y.shape[-1])
    many.site, many.site_out = SITE, "layers.0.ssm.out"
    items = [
        Set(Feature(sae, [3, 4], site=SITE), 2.0, positions=[-1]),
        Ablate(Feature(sae, 7, site=SITE), "mean", reference=capture(model, prompts, SITE)[SITE]),
        Add(Feature(many, 5), 1.0, positions=0),
        Scale(Feature(many, [6, 8]), 4.0),
    ]
    here, there = intervene(model, prompts, items), intervene(model, prompts, items, remote=remote)
    assert here.delta_norm > 1e-3
    torch.testing.assert_close(there.logits, here.logits, rtol=1e-5, atol=1e-6, equal_nan=True)
    with hold(model, items[1:]):
        text = [model.generate_text(prompts, max_new_tokens=2, remote=where) for where in (False, remote)]
    assert text[0] == text[1]
