"""MPPC against the correlations of the whole table, and where there is nothing to find."""

from __future__ import annotations

import pytest
import torch

import circuitbench as cb
from circuitbench import dictionaries
from circuitbench.dictionaries import correlations
from circuitbench.dictionaries.correlations import Baseline
from circuitbench.errors import BadInput


def table(code_a: torch.Tensor, code_b: torch.Tensor) -> torch.Tensor:
    """All correlations at once."""
    together = torch.corrcoef(torch.cat([code_a, code_b], 1).double().T)
    return together[: code_a.shape[1], code_a.shape[1] :]


def test_mppc_is_the_largest_entry_of_the_whole_correlation_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlations, "_PAIRS", 50)  # so that pairs come in several parts, and rows of the table too
    monkeypatch.setattr(correlations, "_ROWS", 7)
    a = dictionaries.build("topk", d_in=6, d_dict=20, k=3)
    b = dictionaries.build("topk", d_in=9, d_dict=31, k=4, seed=1)
    x_a = torch.randn(200, 6)
    x_b = torch.cat([x_a, torch.randn(200, 3)], 1)
    got = correlations.mppc(a, x_a, b, x_b, baseline=None, batch_size=64)
    expected = table(a.encode(x_a), b.encode(x_b)).nan_to_num(-2).max(1)
    torch.testing.assert_close(got.correlation, expected.values)
    assert torch.equal(got.partner, expected.indices) and got.baseline is None and got.n_rows == 200
    pieces = correlations.mppc(a, iter(x_a.split(77)), b, iter(x_b.split(77)), baseline=None)
    torch.testing.assert_close(pieces.correlation, got.correlation)


def test_a_feature_that_never_changes_has_no_correlation() -> None:
    a = dictionaries.build("topk", d_in=6, d_dict=20, k=3)
    a.b_enc.data[4] = -100.0
    x = torch.randn(100, 6)
    got = correlations.mppc(a, x, a, x)
    others = torch.arange(20) != 4
    assert got.correlation[4].isnan() and got.partner[4] == -1
    assert torch.equal(got.partner[others], torch.arange(20)[others])
    torch.testing.assert_close(got.correlation[others], torch.ones(19, dtype=torch.float64))
    assert got.mean == pytest.approx(1)


def test_a_baseline_is_what_there_is_to_find_where_nothing_is() -> None:
    """Of independent activations, the search finds as much as its shuffled baseline, and no more."""
    a = dictionaries.build("topk", d_in=16, d_dict=64, k=4)
    b = dictionaries.build("topk", d_in=16, d_dict=64, k=4, seed=1)
    x, other = torch.randn(2, 2_000, 16)
    assert abs(correlations.mppc(a, x, b, other).excess) < 0.01
    assert correlations.mppc(a, x, a, x).excess > 0.85

    # A rotation leaves a space as it is, but not its directions: below the same features, above chance.
    def chance(kind: Baseline) -> float:
        baseline = correlations.mppc(a, x, a, x, baseline=kind).baseline
        assert baseline is not None
        return baseline.mean().item()

    assert chance("shuffled") + 0.1 < chance("rotated") < 0.8
    with pytest.raises(BadInput, match="no baseline was computed"):
        _ = correlations.mppc(a, x, a, x, baseline=None).excess
    with pytest.raises(BadInput, match="same n tokens"):
        correlations.mppc(a, x, b, other[1:])


def test_dictionaries_of_two_models_meet_on_one_text() -> None:
    models = [cb.load_model(name) for name in ("random:mamba2", "random:mamba")]
    ids = torch.arange(3, 63).reshape(2, 30)
    sides, rows = [], []
    for seed, model in enumerate(models):
        site = "layers.1.resid_post"
        x = cb.capture(model, ids, site)[site]
        sae = dictionaries.build("topk", d_in=x.shape[-1], d_dict=24, k=4, seed=seed)
        sae.site = site
        sides.append((model, sae))
        rows.append(x)
    got = correlations.mppc_on_text(
        sides[0], sides[1], [row.tolist() for row in ids], context=20, prompts_per_forward=2
    )
    assert got.n_rows >= 60  # two documents in a row, perhaps with a separator
    alone = [row.tolist() for row in ids][:1]
    got = correlations.mppc_on_text(sides[0], sides[1], alone, context=30, baseline=None)
    expected = table(*(sae.encode(x[0]) for (_, sae), x in zip(sides, rows, strict=True))).nan_to_num(-2).amax(1)
    alive = ~got.correlation.isnan()
    assert alive.any()
    torch.testing.assert_close(got.correlation[alive], expected[alive], rtol=1e-4, atol=1e-4)
    words = cb.load_model("zoo:pylm-hybrid")
    with pytest.raises(BadInput, match="reads 32 components, and layers.1.resid_post has 192"):
        correlations.mppc_on_text(sides[0], (words, sides[1][1]), "x = 1")
    fitting = dictionaries.build("topk", d_in=192, d_dict=24, k=4)
    fitting.site = "layers.1.resid_post"
    with pytest.raises(BadInput, match="different tokens"):
        correlations.mppc_on_text(sides[0], (words, fitting), "5 17 3")
