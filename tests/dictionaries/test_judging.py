"""Transcoders and crosscoders judged on a model: at their extremes, and against activations captured apart."""

from __future__ import annotations

import json
import math

import pytest
import torch

import circuitbench as cb
from circuitbench import dictionaries
from circuitbench.dictionaries import Dictionary, evaluation

TEXT = [[5, 9, 2, 17, 31, 8, 3, 3, 12, 44, 7, 7, 21, 6, 2, 30]]
READ, WRITTEN = "layers.1.ssm.gated", "layers.1.ssm.out"
BOTH = ("layers.0.resid_post", "layers.1.resid_post")


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("random:mamba2")


def tokens(model: cb.Model, *sites: str) -> torch.Tensor:
    """Activations of sites, one after the other in a row."""
    found = cb.capture(model, TEXT, list(sites))
    return torch.cat([found.tokens(site) for site in sites], 1)


def judged(dictionary: Dictionary, model: cb.Model) -> dictionaries.Evaluation:
    return dictionaries.evaluate(dictionary, model, TEXT, context=16, progress=False)


def test_a_transcoder_that_is_the_layer_itself_costs_nothing(model: cb.Model) -> None:
    """out_proj is linear: as a transcoder's skip it reconstructs what the mixer writes, exactly."""
    weight = model.hf.get_submodule("backbone.layers.1.mixer.out_proj").weight
    assert isinstance(weight, torch.Tensor)
    d_out, d_in = weight.shape
    transcoder = dictionaries.build("topk", d_in=d_in, d_out=d_out, d_dict=32, k=4, skip=True)
    assert transcoder.W_skip is not None
    transcoder.W_skip.data = weight.detach().clone()
    transcoder.W_dec.data.zero_()
    transcoder.site, transcoder.site_out = READ, WRITTEN
    report = judged(transcoder, model)
    assert report.fvu < 1e-9 and report.ce_spliced == pytest.approx(report.ce_clean, rel=1e-6)
    transcoder.W_skip.data.zero_()
    y = tokens(model, WRITTEN)
    transcoder.b_dec.data = y.mean(0)
    report = judged(transcoder, model)
    assert report.fvu == pytest.approx(1, rel=1e-4)
    assert report.ce_spliced == pytest.approx(report.ce_ablated["mean"], rel=1e-6)


def test_a_crosscoder_replaces_all_its_sites_at_once(model: cb.Model) -> None:
    blocks = {site: cb.capture(model, TEXT[:1], site)[site].shape[-1] for site in BOTH}
    d = sum(blocks.values())
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    perfect = dictionaries.from_weights("topk", W_enc=both.T, W_dec=both, k=d, blocks=blocks)
    report = judged(perfect, model)
    assert report.fvu < 1e-9 and abs(report.kl) < 1e-8 and set(report.reconstruction.fvu_by_site) == set(BOTH)
    halved = dictionaries.from_weights("topk", W_enc=both.T, W_dec=both / 2, k=d, blocks=blocks)
    report, x = judged(halved, model), tokens(model, *BOTH)
    expected = evaluation.reconstruction(halved, x)
    assert report.reconstruction.fvu_by_site == pytest.approx(expected.fvu_by_site, rel=1e-4)
    assert report.reconstruction.l2_ratio == pytest.approx(0.5, rel=1e-5)
    # The last of the sites decides what the model says: the spliced run is that of half the last one.
    ids = torch.tensor(TEXT)
    logits = cb.intervene(model, ids, cb.Scale(BOTH[1], 0.5)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert report.ce_spliced == pytest.approx(loss.item(), rel=1e-5)


def test_an_evaluation_is_told_to_files_and_to_saebench(model: cb.Model) -> None:
    sae = dictionaries.build("topk", d_in=tokens(model, READ).shape[1], d_dict=64, k=4)
    sae.site = READ
    report = judged(sae, model)
    told = json.loads(json.dumps(report.to_dict()))
    assert (told["fvu"], told["kl"], told["ce_ablated"]) == (report.fvu, report.kl, dict(report.ce_ablated))
    assert math.isclose(told["kl_ablated"]["zero"], report.splice.kl_ablated["zero"])
    if report.ce_ablated["zero"] > report.ce_clean:
        assert report.to_saebench()["model_performance_preservation"]["ce_loss_score"] == report.ce_recovered("zero")
