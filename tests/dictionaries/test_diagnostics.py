"""γ is what its definition says, and predicts the dead features of a random encoder."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch.nn import functional as F

from circuitbench import dictionaries
from circuitbench.dictionaries import diagnostics
from tests.dictionaries.planted import planted


def test_gamma_is_the_length_of_the_mean_over_that_of_the_standard_deviations() -> None:
    x = planted(400, d_in=16, n_features=40, active=3)[0]
    expected = numpy.linalg.norm(x.numpy().mean(0)) / numpy.linalg.norm(x.numpy().std(0))
    settings = {"d_dict": 48, "k": 4, "steps": 2, "batch_size": 64, "progress": False}
    for scale in (1.0, 100.0):
        result = dictionaries.train(scale * x, **settings)
        assert result.diagnostics["gamma"] == pytest.approx(expected, rel=1e-4)
        assert result.dictionary.metadata["training"]["diagnostics"] == result.diagnostics
    centred = dictionaries.train(x - x.mean(0), **settings)
    assert centred.diagnostics["gamma"] < 1e-5


def test_a_crosscoders_sites_count_in_their_own_units() -> None:
    x = planted(400, d_in=16, n_features=40, active=3)[0]
    a, b = x[:, :6], x[:, 6:]
    both = torch.cat([part / part.var(0).mean().sqrt() for part in (a, b)], 1)
    settings = {"d_dict": 48, "k": 4, "steps": 2, "batch_size": 64, "progress": False}
    alone = dictionaries.train(both, **settings).diagnostics["gamma"]
    result = dictionaries.train({"a": 7 * a, "b": b}, sites=("a", "b"), **settings)
    assert result.diagnostics["gamma"] == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("gamma", [0.5, 3.0, 10.0])
def test_the_predicted_dead_share_is_what_random_features_show(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    d, n = 96, 100
    mean = torch.full((d,), gamma)
    x = mean + torch.randn(n, d, generator=generator)
    assert diagnostics.outlier_severity(mean, torch.ones(d)) == pytest.approx(gamma)
    directions = F.normalize(torch.randn(20_000, d, generator=generator), dim=1)
    dead = ((x @ directions.T).amax(0) <= 0).float().mean().item()
    assert diagnostics.dead_at_start(gamma, n) == pytest.approx(dead, abs=0.02)


def test_it_is_told_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    x = planted(100, d_in=16, n_features=40, active=3)[0]
    result = dictionaries.train(x, d_dict=48, k=4, steps=1, batch_size=64)
    told = capsys.readouterr()
    assert diagnostics.said(result.diagnostics["gamma"], 100) in told.err and not told.out
    assert f"{result.diagnostics['gamma']:.2f}" in told.err and "b_dec starts at the mean" in told.err
