"""AbsTopK: activations have a sign, and nothing that counts or judges features may depend on which."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries import evaluation, losses, recovery, synthetic
from circuitbench.dictionaries.correlations import mppc
from circuitbench.errors import BadInput
from circuitbench.explain import FeatureExamples
from tests.dictionaries.examples import FORMS, example

N, D_DICT, K = 40, 20, 3


def reference(dictionary: dictionaries.Dictionary, x: Tensor) -> Tensor:
    """With a threshold on sizes, and no indices."""
    z = (x if dictionary.transcodes else x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    return torch.where(z.abs() >= z.abs().sort(dim=1, descending=True).values[:, K - 1 : K], z, 0)


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_in_size_with_their_sign(form: str) -> None:
    dictionary = example("abstopk", **FORMS[form]).double()
    x = torch.randn(N, 6, dtype=torch.float64)
    code = dictionary.encode(x)
    torch.testing.assert_close(code, reference(dictionary, x))
    assert ((code != 0).sum(1) == K).all() and 0.2 < (code < 0).sum() / (N * K) < 0.8
    sparse = dictionary.encode_sparse(x)
    assert float(sparse.l0) == K and len(sparse.active_features()) == N * K
    skipped = x @ dictionary.W_skip.T if dictionary.W_skip is not None else 0
    torch.testing.assert_close(dictionary(x), code @ dictionary.W_dec + dictionary.b_dec + skipped)


@pytest.mark.parametrize("form", FORMS)
def test_two_sides_are_a_topk_dictionary_of_the_same_function(form: str) -> None:
    dictionary = example("abstopk", **FORMS[form]).double()
    assert isinstance(dictionary, dictionaries.AbsTopK)
    sides = dictionary.two_sided()
    x = torch.randn(N, 6, dtype=torch.float64)
    code, of_sides = dictionary.encode(x), sides.encode(x)
    assert type(sides) is dictionaries.TopK and (of_sides >= 0).all()
    torch.testing.assert_close(of_sides, torch.cat([code.relu(), (-code).relu()], dim=1))
    torch.testing.assert_close(sides(x), dictionary(x))
    assert (sides.site, sides.site_out, sides.blocks) == (dictionary.site, dictionary.site_out, dictionary.blocks)


def turned(dictionary: dictionaries.Dictionary) -> dictionaries.Dictionary:
    """The same function, with the direction and the activations of every other feature turned round."""
    sign = torch.ones(dictionary.d_dict).to(dictionary.W_dec)
    sign[::2] = -1
    other = dictionaries.from_weights(
        "abstopk",
        W_enc=dictionary.W_enc.detach() * sign,
        W_dec=dictionary.W_dec.detach() * sign[:, None],
        b_enc=dictionary.b_enc.detach() * sign,
        b_dec=dictionary.b_dec.detach(),
        k=dictionary.settings["k"],
    )
    return other.requires_grad_(False)


def test_what_is_measured_does_not_depend_on_the_side_a_feature_is_written_from() -> None:
    dictionary = example("abstopk").double().requires_grad_(False)
    x = torch.randn(200, 6, dtype=torch.float64)
    one, other = (evaluation.reconstruction(d, x) for d in (dictionary, turned(dictionary)))
    code = dictionary.encode(x)
    assert one.l0 == K and one.l1 == pytest.approx(code.abs().sum(1).mean().item())
    torch.testing.assert_close(one.density, (code != 0).double().mean(0).float())
    assert (other.l0, other.dead_share) == (one.l0, one.dead_share)
    assert (other.fvu, other.l1) == pytest.approx((one.fvu, one.l1))
    assert torch.equal(other.density, one.density)


def test_a_truth_is_found_whichever_side_it_is_written_from() -> None:
    """Latents that are the true directions, half of them turned round, are as good as the true directions."""
    truth = synthetic.Truth(d_in=24, n_features=32, l0=3.0, hierarchy=(4, 2), seed=3)
    settings = {"W_enc": truth.directions.T.contiguous(), "W_dec": truth.directions, "b_dec": truth.offset, "k": 3}
    dictionary = dictionaries.from_weights("abstopk", **settings)
    one, other = (recovery.score(d, truth, n=2000) for d in (dictionary, turned(dictionary)))
    assert one == other
    assert (
        one.mmcs == pytest.approx(1) and one.recovered == 1 and one.f1 > 0.5 and 2.5 < one.l0 <= 3
    )  # a row of 0 has none
    plain = recovery.score(dictionaries.from_weights("topk", **settings), truth, n=2000)
    assert abs(plain.recall - one.recall) < 0.2 and plain.mmcs == pytest.approx(1)


def test_auxk_takes_the_largest_in_size() -> None:
    dictionary = example("abstopk").double()
    x = torch.randn(N, 6, dtype=torch.float64)
    dead = torch.arange(8)
    z = ((x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc)[:, dead]
    kept = torch.where(z.abs() >= z.abs().sort(dim=1, descending=True).values[:, 2:3], z, 0)
    left_over = (x - dictionary(x)).detach()
    expected = (left_over - kept @ dictionary.W_dec[dead]).pow(2).sum() / (left_over - left_over.mean(0)).pow(2).sum()
    found = losses.auxk(dictionary, x, dead)  # d_in / 2 = 3 of them on a row
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, dictionary.W_enc)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].norm() > 0


def test_it_learns() -> None:
    """Features with a sign, as many as there are: what a dictionary of one-sided features cannot hold in as few."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 12, generator=generator), dim=1)
    code = torch.randn(6000, 24, generator=generator) * (torch.rand(6000, 24, generator=generator) < 2 / 24)
    how = {"d_dict": 24, "k": 2, "steps": 100, "batch_size": 256, "lr": 0.03, "progress": False}
    fvu = {
        kind: evaluation.reconstruction(
            dictionaries.train(code[:5000] @ directions, kind=kind, **how).dictionary, code[5000:] @ directions
        ).fvu
        for kind in ("abstopk", "topk")
    }
    assert fvu["abstopk"] < 0.8 * fvu["topk"], fvu


def test_what_looks_at_one_direction_at_a_time_asks_for_two_sides() -> None:
    dictionary = example("abstopk")
    assert isinstance(dictionary, dictionaries.AbsTopK)
    x = torch.randn(2, 30, 6)
    rows = x.flatten(0, 1)
    with pytest.raises(BadInput, match=r"give dictionary.two_sided\(\)"):
        mppc(dictionary, rows, example("topk"), rows)
    ids = torch.zeros(2, 30, dtype=torch.int64)
    with pytest.raises(BadInput, match="abstopk"):
        FeatureExamples(D_DICT).add(dictionary.encode(x).detach(), ids)
    sides = dictionary.two_sided()
    mppc(sides, rows, sides, rows)
    examples = FeatureExamples(2 * D_DICT)
    examples.add(sides.encode(x), ids)
    assert int(examples.active_tokens.sum()) == 60 * K
