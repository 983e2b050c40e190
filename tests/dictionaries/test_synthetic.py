"""The synthetic truth against its closed forms, and the scores against dictionaries whose scores are known."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from circuitbench import dictionaries
from circuitbench.dictionaries import Dictionary, synthetic
from circuitbench.dictionaries.matching import max_cosines
from circuitbench.dictionaries.synthetic import Truth
from circuitbench.errors import BadInput

N = 40_000


def sigmas(share: torch.Tensor, expected: torch.Tensor, n: int = N) -> torch.Tensor:
    """How many standard errors a share of n draws is from what it should be."""
    return (share.double() - expected).abs() / (expected * (1 - expected) / n).sqrt()


def joint(p: float, q: float, correlation: float) -> float:
    """P(two standard normals of this correlation are above their p and q quantiles), by quadrature over one factor."""
    g = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    a, b = torch.special.ndtri(torch.tensor([1 - p, 1 - q], dtype=torch.float64))

    def above(t: torch.Tensor) -> torch.Tensor:
        return torch.special.ndtr((correlation**0.5 * g - t) / (1 - correlation) ** 0.5)

    return torch.trapezoid(above(a) * above(b) * (-g.pow(2) / 2).exp() / (2 * math.pi) ** 0.5, g).item()


@pytest.mark.parametrize("frequency", ["uniform", "zipf"])
def test_features_are_active_as_often_as_asked(frequency) -> None:
    truth = Truth(
        d_in=8, n_features=40, l0=5.0, frequency=frequency, exponent=0.8, correlation=0.4, hierarchy=(3, 2, 2)
    )
    on = truth.sample(N, seed=1)[1] > 0
    assert truth.probability.sum().item() == pytest.approx(5)
    assert sigmas(on.double().mean(0), truth.probability).max() < 4.5
    if frequency == "zipf":
        ranks = torch.arange(1, len(truth.roots) + 1, dtype=torch.float64)
        torch.testing.assert_close(truth.probability[truth.roots], truth.probability[0] * ranks**-0.8)
    else:
        assert len(truth.probability[truth.roots].unique()) == 1


def test_pairs_are_active_together_as_the_copula_says() -> None:
    truth = Truth(d_in=4, n_features=12, l0=2.4, correlation=0.6, group_size=4, frequency="zipf")
    on = (truth.sample(N, seed=2)[1] > 0).double()
    together = on.T @ on / N
    for i in range(12):
        for j in range(i):
            p, q = truth.probability[i].item(), truth.probability[j].item()
            expected = joint(p, q, 0.6 if truth.group[i] == truth.group[j] else 0.0)
            assert sigmas(together[i, j], torch.tensor(expected, dtype=torch.float64)) < 4.5
    assert joint(0.5, 0.5, 0.6) == pytest.approx(1 / 4 + math.asin(0.6) / (2 * math.pi), abs=1e-6)


def test_a_child_is_active_only_where_its_parent_is_and_never_beside_a_sibling() -> None:
    truth = Truth(d_in=4, n_features=50, l0=4.0, hierarchy=(4, 3, 2), child_share=0.7)
    assert (
        truth.parent.tolist()
        == [-1] * 4 + [p for p in range(4) for _ in range(3)] + [p for p in range(4, 16) for _ in range(2)] + [-1] * 10
    )
    on = truth.sample(N, seed=3)[1] > 0
    for feature in range(50):
        children = (truth.parent == feature).nonzero().squeeze(1)
        if not len(children):
            continue
        active = on[:, children].sum(1)
        assert active.max() == 1 and not active[~on[:, feature]].any()
        n = int(on[:, feature].sum())
        share = on[on[:, feature]][:, children].double().mean(0)
        assert sigmas(share, torch.full_like(share, 0.7 / len(children)), n).max() < 4.5


def test_a_row_is_the_sum_of_its_features_and_the_offset() -> None:
    truth = Truth(d_in=16, n_features=64, l0=4.0, shift=7.0, magnitudes=(2.0, 3.0), seed=5)
    x, a = truth.sample(500, seed=1)
    assert truth.offset.norm().item() == pytest.approx(7, rel=1e-5)
    torch.testing.assert_close(x, sum(a[:, i : i + 1] * truth.directions[i] for i in range(64)) + truth.offset)
    active = a[a > 0]
    assert 2 <= active.min() < 2.02 and 2.98 < active.max() <= 3
    settings: dict[str, Any] = truth.settings | {"noise": 0.5}
    noisy = Truth(**settings)
    y, b = noisy.sample(20_000, seed=1)
    torch.testing.assert_close(
        (y - b @ truth.directions - truth.offset).std(0), torch.full((16,), 0.5), rtol=0.03, atol=0
    )


def test_a_seed_says_everything() -> None:
    settings = {
        "d_in": 8,
        "n_features": 24,
        "l0": 3.0,
        "correlation": 0.3,
        "hierarchy": (2, 2),
        "noise": 0.1,
        "shift": 1.0,
    }
    truth = Truth(**settings)
    for got, again in zip(truth.sample(50, seed=4), Truth(**settings).sample(50, seed=4), strict=True):
        assert torch.equal(got, again)
    other = truth.with_seed(1)
    assert not torch.equal(truth.sample(50)[0], truth.sample(50, seed=1)[0])
    assert max_cosines(truth.directions, other.directions)[0].max() < 0.99
    stream = truth.stream(16, seed=2, n_batches=3)
    first, again = list(stream), list(stream)
    assert [len(x) for x in first] == [16] * 3 and all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])


def test_directions_can_be_pushed_apart() -> None:
    def largest(steps: int) -> float:
        directions = Truth(d_in=16, n_features=17, l0=1.0, spread_steps=steps, dtype=torch.float64).directions
        torch.testing.assert_close(directions.norm(dim=1), torch.ones(17, dtype=torch.float64))
        return (directions @ directions.T).fill_diagonal_(0).abs().max().item()

    assert largest(0) > 0.4
    assert 1 / 16 <= largest(100) < 0.1  # 1/16: a simplex, which no 17 unit vectors in 16 dimensions can better


def true_dictionary(truth: Truth, *, scale: float = 1.0) -> Dictionary:
    """The true directions, orthogonal ones: their projections are the activations."""
    W = truth.directions
    k = truth.n_features
    return dictionaries.from_weights("topk", W_enc=W.T * scale, W_dec=W.clone(), b_dec=truth.offset, k=k)


def test_the_truth_itself_scores_one() -> None:
    truth = Truth(d_in=32, n_features=24, l0=3.0, spread_steps=200, shift=2.0, dtype=torch.float64)
    # A little below 0, so that what rounding leaves of silent features stays silent.
    perfect = true_dictionary(truth)
    perfect.b_enc.data.fill_(-0.05)
    got = synthetic.score(perfect, truth, n=4_000)
    assert got.mmcs == pytest.approx(1) and got.recovered == 1
    assert got.f1 > 0.999 and got.precision > 0.999 and got.recall > 0.999
    assert got.l0 == pytest.approx(got.true_l0, rel=1e-3) and got.dead_share == 0
    assert got.fvu < 0.01 and math.isnan(got.absorption)


def test_precision_recall_and_shrinkage_are_counted() -> None:
    """Latents in another order, one always silent, one always on; all activations at 0.8 of the truth."""
    truth = Truth(d_in=8, n_features=8, l0=2.0, spread_steps=200, dtype=torch.float64, magnitudes=(1.0, 1.0))
    torch.testing.assert_close(
        truth.directions @ truth.directions.T, torch.eye(8, dtype=torch.float64), atol=1e-3, rtol=0
    )
    sae = true_dictionary(truth)
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    W = truth.directions[order]
    bias = torch.full((8,), -0.2, dtype=torch.float64)
    bias[0], bias[1] = -9.0, 9.0
    # A decoder row of length 2 with half the activation is the same dictionary.
    sae = dictionaries.from_weights("topk", W_enc=W.T / 2, W_dec=W * 2, b_enc=bias / 2, k=8)
    got = synthetic.score(sae, truth, n=3_000, batch_size=700)
    on = (
        torch.cat(
            [
                truth.sample(rows, 1_000_003 + i)[1]
                for i, rows in zip(range(0, 3000, 700), [700] * 4 + [200], strict=True)
            ]
        )
        > 0
    )
    p = on[:, 1].double().mean().item()
    assert got.recovered == 1 and got.n_rows == 3_000
    assert got.recall == pytest.approx(7 / 8)
    assert got.precision == pytest.approx((6 + p) / 8)
    assert got.f1 == pytest.approx((6 + 2 * p / (1 + p)) / 8)
    assert got.dead_share == 1 / 8
    hits = on[:, [0, 2, 4, 5, 6, 7]].sum().item()
    expected = (0.8 * hits + 10 * on[:, 1].sum().item()) / (hits + on[:, 1].sum().item())
    assert got.shrinkage == pytest.approx(expected, rel=1e-3)


def test_absorption_is_seen() -> None:
    """A parent's latent that is silent where a child speaks, and the child's direction with the parent's in it."""
    truth = Truth(
        d_in=16, n_features=12, l0=2.0, hierarchy=(1, 2), child_share=0.5, spread_steps=500, magnitudes=(1.0, 1.0)
    )
    d = truth.directions
    W_dec, W_enc = d.clone(), d.clone()
    W_dec[1:3] = d[1:3] + 0.7 * d[0]
    W_enc[0] = d[0] - d[1] - d[2]
    bias = torch.full((12,), -0.3)
    absorbed = dictionaries.from_weights("topk", W_enc=W_enc.T, W_dec=W_dec, b_enc=bias, k=12)
    honest = dictionaries.from_weights("topk", W_enc=d.T, W_dec=d, b_enc=bias, k=12)
    assert synthetic.score(absorbed, truth, n=2_000).absorption > 0.99
    assert synthetic.score(honest, truth, n=2_000).absorption < 0.01


def test_random_directions_score_what_random_directions_do() -> None:
    """The cosine of random directions has density (1 − c²)^((d−3)/2); so the expected largest of m is an integral."""
    d, m = 24, 96
    truth = Truth(d_in=d, n_features=200, l0=5.0)
    got = synthetic.score(dictionaries.build("topk", d_in=d, d_dict=m, k=5, seed=3), truth, n=1_000)
    c = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    below = torch.cumulative_trapezoid((1 - c**2) ** ((d - 3) / 2), c)
    expected = 1 - torch.trapezoid((below / below[-1]) ** m, c[1:]).item()
    assert got.mmcs == pytest.approx(expected, abs=0.02)
    assert got.recovered == 0 and math.isnan(got.shrinkage) and got.f1 < 0.2


def test_kinds_are_compared_on_the_same_rows_at_the_same_sparsity() -> None:
    """A label's numbers are those of training it alone on the same seed; the spread is that over seeds."""
    truth = Truth(d_in=12, n_features=16, l0=2.0)
    settings: dict[str, Any] = {"d_dict": 16, "steps": 12, "batch_size": 1024, "progress": False}
    kinds = {"topk": {}, "narrow": {"kind": "topk", "k": 1}, "batchtopk": {}}
    got = synthetic.compare(kinds, truth, seeds=(3, 5), n=500, **settings)
    drawn = truth.with_seed(5)
    alone = dictionaries.train(drawn.stream(1024, seed=5), kind="batchtopk", k=2, seed=5, **settings)
    assert repr(got.scores["batchtopk"][1]) == repr(synthetic.score(alone.dictionary, drawn, n=500))  # NaN is not NaN
    assert max(got.values("narrow", "l0")) <= 1 < min(got.values("topk", "l0"))
    a, b = got.values("topk", "mmcs")
    assert got.mean("topk", "mmcs") == pytest.approx((a + b) / 2)
    assert got.spread("topk", "mmcs") == pytest.approx(abs(a - b) / 2**0.5)
    assert "| narrow |" in str(got) and "absorption" not in str(got)
    assert json.loads(json.dumps(got.to_dict()))["scores"]["topk"][0]["mmcs"] == a
    with pytest.raises(BadInput, match="none twice"):
        synthetic.compare(["topk"], truth, seeds=(1, 1), **settings)


def test_what_cannot_be_is_refused() -> None:
    good: dict[str, Any] = {"d_in": 4, "n_features": 8, "l0": 1.0}
    for change, message in [
        ({"l0": 8.0}, "more often|most frequent one active on 100%"),
        ({"l0": 0.0}, "l0=0.0 was given"),
        ({"correlation": 1.0}, r"in \[0, 1\)"),
        ({"hierarchy": (4, 3)}, "has 16 features, more than n_features=8"),
        ({"hierarchy": (2, 0)}, "at least 1"),
        ({"magnitudes": (0.0, 1.0)}, "0 < low <= high"),
        ({"noise": -1.0}, "noise=-1.0"),
    ]:
        with pytest.raises(BadInput, match=message):
            Truth(**(good | change))
    truth = Truth(**good)
    with pytest.raises(BadInput, match="from 5 to 5, and rows of this truth have 4"):
        synthetic.score(dictionaries.build("topk", d_in=5, d_dict=8, k=1), truth)
    with pytest.raises(BadInput, match="n=0 rows"):
        truth.sample(0)
