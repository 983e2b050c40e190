"""Dictionaries on a small language model: against plain hooks on the Hugging Face module, and at their extremes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import circuitbench as cb
from circuitbench.activations import ActivationStream, store
from circuitbench.dictionaries import (
    Dictionary,
    from_weights,
    load_dictionary,
    train_many_on_text,
)
from circuitbench.errors import BadInput, SiteNotFound
from circuitbench.explain import feature_examples
from circuitbench.models.zoo import corpus

SITE = "layers.2.ssm.gated"


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("zoo:pylm-hybrid")


@pytest.fixture(scope="module")
def text() -> list[str]:
    return [document.text[:1_500] for document in corpus.split()[1][:4]]


def ids_of(model: cb.Model, text: list[str]) -> Tensor:
    pieces = [model.tokenizer(piece)["input_ids"] for piece in text]
    joined = [token for piece in pieces for token in [*piece, model.tokenizer.eos_token_id]]
    return torch.tensor(joined[:-1])


@contextmanager
def gated(model: cb.Model, change=None) -> Iterator[list[Tensor]]:
    """What goes into layer 2's output projection, seen or replaced by a plain hook."""
    seen: list[Tensor] = []

    def hook(module, args):
        seen.append(args[0])
        return None if change is None else (change(args[0]),)

    handle = model.hf.model.layers[2].mamba.out_proj.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def loss(model: cb.Model, batches: list[Tensor]) -> float:
    """The mean loss over all predicted tokens, by Hugging Face's module."""
    total, n = 0.0, 0
    for ids in batches:
        logits = model.hf(ids, use_cache=False).logits
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        n += ids[:, 1:].numel()
    return total / n


def identity(d: int) -> Dictionary:
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    dictionary = from_weights("topk", W_enc=both.T, W_dec=both, k=d)
    dictionary.site = SITE
    return dictionary


def constant(value: Tensor) -> Dictionary:
    nothing = torch.zeros(len(value), 4)
    dictionary = from_weights("topk", W_enc=nothing, W_dec=nothing.T, b_dec=value, k=1)
    dictionary.site = SITE
    return dictionary


def batches_of(model: cb.Model, text: str | list[str], context: int, n: int) -> list[Tensor]:
    stream = ActivationStream(model, SITE, text, context=context, sequences_per_forward=n)
    return [ids for ids, _ in stream.forwards()]


def activations(model: cb.Model, text: str | list[str], context: int) -> Tensor:
    return torch.cat(list(ActivationStream(model, SITE, text, context=context).site()))


@torch.no_grad()
def test_activations_are_those_of_every_token_but_special_ones(model: cb.Model, text: list[str]) -> None:
    batches = batches_of(model, text, 100, 3)
    assert torch.equal(torch.cat([batch.flatten() for batch in batches]), ids_of(model, text))
    with gated(model) as seen:
        for batch in batches:
            model.hf(batch, use_cache=False)
    expected = torch.cat([rows.flatten(0, 1) for rows in seen])[ids_of(model, text) != model.tokenizer.eos_token_id]
    found = activations(model, text, 100)
    assert len(found) == len(ids_of(model, text)) - 3  # one end of text between each two pieces
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_losses_are_those_of_plain_hooks(model: cb.Model, text: list[str]) -> None:
    batches = batches_of(model, text[0], 64, 4)
    mean = activations(model, text[0], 64).mean(0)
    report = cb.evaluate(constant(mean), model, text[0], context=64, prompts_per_forward=4, progress=False)
    assert report.ce_clean == pytest.approx(loss(model, batches), rel=1e-5)
    with gated(model, torch.zeros_like):
        assert report.ce_ablated["zero"] == pytest.approx(loss(model, batches), rel=1e-5)
    with gated(model, lambda x: mean.expand_as(x)):
        assert report.ce_ablated["mean"] == pytest.approx(loss(model, batches), rel=1e-5)
    # A dictionary that always says the mean is as bad as the mean.
    assert report.ce_spliced == pytest.approx(report.ce_ablated["mean"], rel=1e-6)
    assert report.ce_recovered("mean") == pytest.approx(0.0, abs=1e-4)
    assert report.fvu == pytest.approx(1.0, rel=1e-4) and report.l0 == 0 and report.dead_share == 1
    assert report.kl > 0.01


def test_a_perfect_dictionary_costs_nothing(model: cb.Model, text: list[str]) -> None:
    report = cb.evaluate(identity(384), model, text, context=128, progress=False)
    assert report.fvu < 1e-9 and report.l0 > 300
    assert report.ce_spliced == pytest.approx(report.ce_clean, rel=1e-6)
    assert report.ce_recovered("zero") == pytest.approx(1.0, abs=1e-5)
    assert abs(report.kl) < 1e-8


def test_special_tokens_keep_their_own_activation(model: cb.Model) -> None:
    ends = [model.tokenizer.eos_token] * 5
    with pytest.raises(BadInput, match="no tokens"):
        cb.evaluate(constant(torch.zeros(384)), model, "".join(ends), progress=False)
    text = "".join([*ends, "x", *ends])
    report = cb.evaluate(constant(torch.zeros(384)), model, [text, "y = 1"], context=11, progress=False)
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    kept = torch.tensor([[token != 0 for token in ids[0].tolist()]])[..., None]
    assert kept.sum() == 1
    with torch.no_grad(), gated(model, lambda x: torch.where(kept[:, : x.shape[1]], 0, x)):
        alone = loss(model, [ids])
    batches = batches_of(model, [text, "y = 1"], 11, 1)
    assert torch.equal(batches[0], ids)
    n = [batch[:, 1:].numel() for batch in batches]
    with torch.no_grad(), gated(model, lambda x: torch.where((batches[1] != 0)[..., None], 0, x)):
        rest = loss(model, batches[1:])
    assert report.ce_spliced == pytest.approx((n[0] * alone + n[1] * rest) / sum(n), rel=1e-5)


def test_a_trained_dictionary_explains_held_out_text(model: cb.Model, text: list[str], tmp_path: Path) -> None:
    settings = {"d_dict": 512, "k": 16, "steps": 80, "batch_size": 256, "progress": False, "out": tmp_path}
    sae = cb.train_sae(model, "layers.-2.H1", text[:3], **settings)
    assert (sae.site, sae.model_name) == (SITE, "pylm-hybrid")
    report = cb.evaluate(sae, model, text[3], progress=False)
    untrained = cb.dictionaries.build("topk", d_in=384, d_dict=512, k=16)
    before = cb.evaluate(untrained, model, text[3], site=SITE, progress=False)
    assert report.fvu < 0.8 * before.fvu
    assert report.ce_clean < report.ce_spliced < before.ce_spliced
    saved = load_dictionary(tmp_path)
    assert saved.site == SITE and torch.equal(saved.W_dec, sae.W_dec)


def test_examples_are_where_the_feature_is_strongest(model: cb.Model, text: list[str]) -> None:
    sae = identity(384)
    examples = feature_examples(sae, model, text, n=2, before=3, after=2, context=90, progress=False)
    found = activations(model, text, 90)
    kept = ids_of(model, text)[ids_of(model, text) != 0]
    feature = 17  # component 17, where it is positive
    best = examples.of(feature)[0]
    place = int(found[:, feature].argmax())
    assert best.value == pytest.approx(found[place, feature].item(), rel=1e-4)
    assert best.token_ids[best.peak] == kept[place]
    assert examples.density[feature].item() == pytest.approx((found[:, feature] > 0).float().mean().item())


def test_text_stream_and_store_train_the_same_dictionary(model: cb.Model, text: list[str], tmp_path: Path) -> None:
    recipe = {"d_dict": 64, "k": 4, "steps": 4, "batch_size": 128, "progress": False}
    stream = ActivationStream(model, [SITE, "layers.0.ssm.y"], text, context=128)
    stored = store(stream, tmp_path / "store", sequences_per_shard=16)
    trained = [
        cb.train_sae(model, SITE, source, **recipe, **reading)
        for source, reading in ((text, {"context": 128}), (stream, {}), (stored, {}))
    ]
    rows = torch.cat(list(stored.site(SITE)))
    plain = cb.dictionaries.train(rows, **recipe).dictionary
    for sae in trained:
        torch.testing.assert_close(sae.W_enc, plain.W_enc, rtol=1e-4, atol=1e-5)
        assert (sae.site, sae.model_name) == (SITE, "pylm-hybrid")
        assert sae.metadata["activations"] == {"context": 128, "keep_special": False, "shapes": {SITE: [384]}}
    with pytest.raises(BadInput, match="context: the stream that was given has its own"):
        cb.train_sae(model, SITE, stream, context=64, **recipe)
    with pytest.raises(BadInput, match=r"layers.2.ssm.y: not one of the sites here"):
        cb.train_sae(model, "layers.2.ssm.y", stored, **recipe)


def test_many_dictionaries_of_several_sites_come_from_one_stream(
    model: cb.Model, text: list[str], tmp_path: Path
) -> None:
    recipes = [{"site": "layers.2.H1"}, {"site": "layers.0.ssm.y", "k": 8}, {"sites": [SITE, "layers.0.ssm.out"]}]
    out = [tmp_path / str(number) for number in range(3)]
    how = {"steps": 3, "batch_size": 64, "context": 128, "progress": False}
    given = [{"k": 4, "d_dict": 64, **recipe} for recipe in recipes]
    first, second, crosscoder = (result.dictionary for result in train_many_on_text(model, text, given, out=out, **how))
    assert (first.site, second.site) == (SITE, "layers.0.ssm.y")
    assert list(crosscoder.blocks) == [SITE, "layers.0.ssm.out"]
    alone = cb.train_sae(model, SITE, text, k=4, d_dict=64, **how)
    assert torch.equal(first.W_enc, alone.W_enc)
    assert second.metadata["activations"]["shapes"] == {"layers.0.ssm.y": second_shape(model)}
    assert load_dictionary(out[1]).metadata["activations"] == second.metadata["activations"]
    # A site with heads is spliced in its own shape.
    report = cb.evaluate(second, model, text[0][:300], context=64, progress=False)
    assert report.ce_clean != report.ce_spliced and 0 < report.fvu < 2
    with pytest.raises(BadInput, match="A recipe names what its dictionary reads"):
        train_many_on_text(model, text, [{"k": 3}], **how)


def second_shape(model: cb.Model) -> list[int]:
    return list(cb.capture(model, "x", "layers.0.ssm.y")["layers.0.ssm.y"].shape[2:])


@pytest.mark.parametrize(
    ("site", "given", "error", "message"),
    [
        ("layers.*.ssm.gated", "x = 1", BadInput, "stands for 2 sites"),
        ("layers.0.ssm.mixing", "x = 1", BadInput, "no row for each token"),
        ("layers.1.ssm.gated", "x = 1", SiteNotFound, r"layer 1 \(attention\) has"),
        (SITE, "", BadInput, "The text has no tokens"),
        (SITE, ["x", 3], BadInput, "path, token ids or a row, not int"),
    ],
)
def test_bad_input_is_said_in_one_sentence(model: cb.Model, site: str, given, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        cb.train_sae(model, site, given, progress=False)


def test_a_dictionary_that_does_not_fit_is_refused(model: cb.Model) -> None:
    small = cb.dictionaries.build("topk", d_in=8, d_dict=16, k=2)
    with pytest.raises(BadInput, match="does not know its site"):
        cb.evaluate(small, model, "x = 1", progress=False)
    with pytest.raises(BadInput, match="from 8 to 8, and layers.2.ssm.gated has 384"):
        cb.evaluate(small, model, "x = 1", site=SITE, progress=False)
    with pytest.raises(BadInput, match="context=1"):
        cb.evaluate(small, model, "x = 1", site=SITE, context=1, progress=False)
