"""Sparse probes where the answer was planted, and the parts they are made of against brute force."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import circuitbench as cb
from circuitbench import dictionaries
from circuitbench.dictionaries import probing, synthetic
from circuitbench.errors import BadInput


@pytest.fixture(scope="module")
def truth() -> synthetic.Truth:
    return synthetic.Truth(d_in=32, n_features=24, l0=6.0, spread_steps=300)


@pytest.fixture(scope="module")
def sae(truth: synthetic.Truth) -> dictionaries.Dictionary:
    d = truth.directions
    return dictionaries.from_weights("topk", W_enc=d.T, W_dec=d, b_enc=torch.full((24,), -0.1), k=24)


def test_one_feature_is_enough_for_what_it_means(truth: synthetic.Truth, sae: dictionaries.Dictionary) -> None:
    x, activations = truth.sample(800, seed=1)
    probe = probing.sparse_probe(sae, x, activations[:, 7] > 0, ks=(1, 3))
    assert probe.by_k[1].features == (7,) and probe.by_k[3].features[0] == 7
    assert (probe.by_k[1].accuracy, probe.by_k[1].auroc, probe.by_k[1].f1) == (1, 1, 1)
    assert probe.n_train + probe.n_test == 800 and probe.majority < 0.8
    assert json.loads(json.dumps(probe.to_dict()))["by_k"]["1"]["features"] == [7]


def test_a_concept_of_two_features_needs_two(truth: synthetic.Truth, sae: dictionaries.Dictionary) -> None:
    x, activations = truth.sample(2_000, seed=2)
    probe = probing.sparse_probe(sae, x, (activations[:, 3] > 0) | (activations[:, 11] > 0), ks=(1, 2))
    assert set(probe.by_k[2].features) == {3, 11}
    assert probe.by_k[2].accuracy > 0.99 > 0.9 > probe.by_k[1].accuracy
    # What a linear probe of the site itself reaches is the most that a linear code of it can give.
    assert probe.baseline.auroc > 0.95


def test_labels_that_mean_nothing_are_not_found(truth: synthetic.Truth, sae: dictionaries.Dictionary) -> None:
    x, _ = truth.sample(2_000, seed=3)
    probe = probing.sparse_probe(sae, x, torch.rand(2_000) < 0.5, ks=(5,))
    assert abs(probe.by_k[5].auroc - 0.5) < 0.08 and abs(probe.baseline.auroc - 0.5) < 0.08


def test_a_regression_is_at_the_minimum_of_its_loss() -> None:
    """The gradient of the penalised loss at the solution, written out, is 0."""
    x, y = torch.randn(60, 3, dtype=torch.float64), torch.rand(60) < 0.4
    z = (x - x.mean(0)) / x.std(0)
    eye = torch.cat([torch.zeros(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)])
    probes = probing._scores(x, y, x.mean(0) + eye * x.std(0), penalty=0.1)
    b, w = probes[0], probes[1:] - probes[0]
    residual = torch.sigmoid(z @ w + b) - y.double()
    torch.testing.assert_close(z.T @ residual / 60 + 0.1 * w, torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert residual.mean().abs() < 1e-6


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    scores, y = torch.randn(40, dtype=torch.float64).mul(2).round(), torch.rand(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(scores[y].tolist(), scores[~y].tolist())]
    accuracy, auroc, f1 = probing._judged(scores, y)
    assert auroc == pytest.approx(sum(pairs) / len(pairs))
    assert accuracy == pytest.approx(sum((s > 0) == t for s, t in zip(scores.tolist(), y.tolist(), strict=True)) / 40)
    precision, recall = y[scores > 0].double().mean().item(), (scores[y] > 0).double().mean().item()
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))


def test_texts_are_probed_by_their_mean_or_token_by_token() -> None:
    """Every token of a random model is told apart by its own embedding: "is it token 5" is found at every position."""
    model = cb.load_model("random:mamba2")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 12, (30, 6), generator=generator)
    ids[::2][ids[::2] == 5] = 4
    ids[1::2, 2] = 5
    texts = [" ".join(map(str, row)) for row in ids.tolist()]
    d = cb.capture(model, texts[:1], "embed")["embed"].shape[-1]
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    sae = dictionaries.from_weights("topk", W_enc=both.T, W_dec=both, k=d)
    sae.site = sae.site_out = "embed"
    by_token = probing.probe_texts(sae, model, texts, (ids == 5).tolist(), ks=(1, 8))
    assert by_token.n_train + by_token.n_test == 180
    assert by_token.baseline.accuracy == 1 and by_token.by_k[8].auroc > 0.95
    by_text = probing.probe_texts(sae, model, texts, [False, True] * 15, ks=(8,))
    assert by_text.n_train + by_text.n_test == 30 and by_text.baseline.auroc > 0.9
    with pytest.raises(BadInput, match="text 0 has 6 tokens and 5 labels"):
        probing.probe_texts(sae, model, texts, [[True] * 5] * 30)
    with pytest.raises(BadInput, match="30 texts came with 2 labels"):
        probing.probe_texts(sae, model, texts, [True, False])


def test_what_cannot_be_probed_is_refused(sae: dictionaries.Dictionary) -> None:
    x = torch.randn(20, 32)
    with pytest.raises(BadInput, match="1 of 20 rows are labelled True"):
        probing.sparse_probe(sae, x, torch.arange(20) == 0)
    with pytest.raises(BadInput, match="between 1 and d_dict = 24"):
        probing.sparse_probe(sae, x, torch.arange(20) < 10, ks=(25,))
