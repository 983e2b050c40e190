"""Splices whose result is known: with the error nothing changes; an edit moves the site by what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench import dictionaries
from circuitbench.dictionaries.splice_run import splice
from circuitbench.errors import BadInput

PROMPTS = ["5 9 2 17 31", "8 3"]
SITE, OUT = "layers.1.ssm.gated", "layers.1.ssm.out"


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("random:mamba2")


def width(model: cb.Model, site: str) -> int:
    return cb.capture(model, PROMPTS, site)[site].shape[-1]


@pytest.fixture
def sae(model: cb.Model) -> dictionaries.Dictionary:
    sae = dictionaries.build("topk", d_in=width(model, SITE), d_dict=96, k=6)
    sae.site = SITE
    return sae


@pytest.fixture
def transcoder(model: cb.Model) -> dictionaries.Dictionary:
    d_in, d_out = width(model, SITE), width(model, OUT)
    found = dictionaries.build("topk", d_in=d_in, d_out=d_out, d_dict=96, k=6, skip=True)
    assert found.W_skip is not None
    found.W_skip.data.normal_()
    found.site, found.site_out = SITE, OUT
    return found


@pytest.fixture
def crosscoder(model: cb.Model) -> dictionaries.Dictionary:
    blocks = {f"layers.{layer}.ssm.gated": width(model, SITE) for layer in (0, 1)}
    return dictionaries.build("topk", d_in=sum(blocks.values()), d_dict=96, k=6, blocks=blocks)


def real(logits: Tensor) -> Tensor:
    return logits[~logits.isnan()]


@pytest.mark.parametrize("which", ["sae", "transcoder", "crosscoder"])
def test_with_the_error_kept_nothing_changes(model: cb.Model, which: str, request: pytest.FixtureRequest) -> None:
    dictionary = request.getfixturevalue(which)
    kept = splice(model, dictionary, PROMPTS)
    assert real(kept.clean_logits).numel() == 7 * kept.logits.shape[2]
    torch.testing.assert_close(kept.logits, kept.clean_logits, rtol=0, atol=1e-5, equal_nan=True)
    bare = splice(model, dictionary, PROMPTS, keep_error=False)
    assert (real(bare.logits) - real(bare.clean_logits)).abs().max() > 1e-3


def test_without_the_error_the_site_is_the_reconstruction(model: cb.Model, sae: dictionaries.Dictionary) -> None:
    x = cb.capture(model, PROMPTS, SITE)[SITE]
    estimate = torch.full_like(x, torch.nan)
    for row, length in enumerate((5, 2)):
        estimate[row, :length] = sae(x[row, :length])
    got = splice(model, sae, PROMPTS, keep_error=False)
    expected = cb.intervene(model, PROMPTS, cb.Set(SITE, estimate)).logits
    torch.testing.assert_close(got.logits, expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.error, x - estimate, equal_nan=True)
    torch.testing.assert_close(got.features[1, :2], sae.encode(x[1, :2]))


def test_an_edit_with_the_error_kept_adds_its_direction(model: cb.Model, sae: dictionaries.Dictionary) -> None:
    def edit(features: Tensor) -> Tensor:
        features[:, 7] += 3.0
        return features

    got = splice(model, sae, PROMPTS, edit=edit)
    expected = cb.intervene(model, PROMPTS, cb.Add(SITE, sae.W_dec[7].detach(), strength=3.0)).logits
    torch.testing.assert_close(got.logits, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    as_feature = cb.intervene(model, PROMPTS, cb.Add(cb.Feature(sae, 7), 3.0)).logits
    torch.testing.assert_close(got.logits, as_feature, equal_nan=True, rtol=1e-5, atol=1e-5)
    last = splice(model, sae, PROMPTS, edit=edit, positions="last")
    torch.testing.assert_close(last.logits[0, :4], last.clean_logits[0, :4], rtol=0, atol=1e-5)
    torch.testing.assert_close(last.logits[1, 0], last.clean_logits[1, 0], rtol=0, atol=1e-5)
    assert (last.logits[:, 1] - last.clean_logits[:, 1])[1].abs().max() > 1e-4


def test_what_does_not_fit_is_refused(model: cb.Model, sae: dictionaries.Dictionary) -> None:
    small = dictionaries.build("topk", d_in=8, d_dict=16, k=2)
    with pytest.raises(BadInput, match="does not know its site"):
        splice(model, small, PROMPTS)
    with pytest.raises(BadInput, match=f"from 8 to 8, and {SITE} has"):
        splice(model, small, PROMPTS, site=SITE)
    with pytest.raises(BadInput, match="must return the same shape"):
        splice(model, sae, PROMPTS, edit=lambda features: features[:, :3])
