"""Transcoders and crosscoders from text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import circuitbench as cb
from circuitbench import dictionaries
from circuitbench.dictionaries.on_sites import train_crosscoder, train_transcoder
from circuitbench.errors import BadInput

SMALL: dict[str, Any] = {
    "context": 16,
    "prompts_per_forward": 2,
    "progress": False,
    "steps": 30,
    "batch_size": 32,
    "k": 4,
}


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("random:mamba2")


@pytest.fixture(scope="module")
def text() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 50, (48,), generator=generator).tolist() for _ in range(3)]


def test_a_transcoder_reconstructs_the_other_site(model: cb.Model, text: list[list[int]]) -> None:
    """Of another width; where a linear path is all that it takes, the skip finds it."""
    ids = torch.tensor(text)
    found = cb.capture(model, ids, ["layers.1.ssm.gated", "layers.1.ssm.out"])
    x, y = (found[f"layers.1.ssm.{name}"].flatten(0, 1) for name in ("gated", "out"))
    for skip in (False, True):
        dictionary = train_transcoder(
            model, "layers.1.ssm.gated", "layers.1.ssm.out", text, d_dict=64, skip=skip, **SMALL
        )
        assert (dictionary.d_in, dictionary.d_out) == (x.shape[1], y.shape[1])
        assert (dictionary.site, dictionary.site_out) == ("layers.1.ssm.gated", "layers.1.ssm.out")
        unexplained = (dictionary(x) - y).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
        assert unexplained < (0.5 if skip else 1)  # one is a linear function of the other
    with pytest.raises(BadInput, match="site and site_out are both"):
        train_transcoder(model, "layers.1.ssm.out", "layers.1.out_proj_out", text, d_dict=8, **SMALL)


def test_a_crosscoder_reads_two_models_at_the_same_tokens(model: cb.Model, text: list[list[int]]) -> None:
    other = cb.load_model("random:mamba2")
    sites = [(model, "layers.1.ssm.out"), (other, "layers.0.resid_post")]
    dictionary = train_crosscoder(sites, text, d_dict=32, **SMALL)
    assert [name.partition(": ")[2] for name in dictionary.blocks] == ["layers.1.ssm.out", "layers.0.resid_post"]
    assert len(set(dictionary.blocks)) == 2 and dictionary.d_in == sum(dictionary.blocks.values())
    assert dictionary.block_norms().shape == (2, 32)
    rows = torch.cat([cb.capture(one, torch.tensor(text), site)[site].flatten(0, 1) for one, site in sites], 1)
    torch.testing.assert_close(dictionary.b_dec, rows.mean(0), atol=0.5 * rows.std().item(), rtol=0)
    assert (dictionary(rows) - rows).pow(2).sum() < (rows - rows.mean(0)).pow(2).sum()
    one = train_crosscoder([(model, "layers.0.ssm.out"), (model, "layers.1.ssm.out")], text, d_dict=32, **SMALL)
    assert list(one.blocks) == ["layers.0.ssm.out", "layers.1.ssm.out"]
    with pytest.raises(BadInput, match="a crosscoder has two or more"):
        train_crosscoder(sites[:1], text, d_dict=32, **SMALL)
    with pytest.raises(BadInput, match="an iterator can be read once"):
        train_crosscoder(sites, iter(text), d_dict=32, **SMALL)


def test_features_of_one_model_and_of_both_are_told_apart() -> None:
    """Planted: a third belongs to the first block alone, a third to the second, a third to both; scales far apart."""
    generator = torch.Generator().manual_seed(0)
    n, d, each = 6_000, 24, 8
    first, second = (F.normalize(torch.randn(3 * each, d, generator=generator), dim=1) for _ in range(2))
    first[each : 2 * each] = 0
    second[:each] = 0
    active = (torch.rand(n, 3 * each, generator=generator) < 0.06) * (1 + torch.rand(n, 3 * each, generator=generator))
    rows = {"A: layers.3": active @ first, "B: layers.3": 100 * (active @ second)}
    result = dictionaries.train(rows, sites=list(rows), d_dict=32, k=3, steps=250, batch_size=128, progress=False)
    truth = F.normalize(torch.cat([first, second], 1), dim=1)
    norms = result.dictionary.block_norms()
    W_dec = result.dictionary.W_dec.clone()
    W_dec[:, d:] /= 100 * (second.norm() / first.norm())
    best = (truth @ F.normalize(W_dec, dim=1).T).max(1)
    assert (best.values > 0.9).float().mean() > 0.9
    share = norms[0, best.indices]
    assert share[:each].median() > 0.9 and share[each : 2 * each].median() < 0.1
    assert (share[2 * each :] - 0.5).abs().median() < 0.1
    torch.testing.assert_close(norms.sum(0), torch.ones(32))
