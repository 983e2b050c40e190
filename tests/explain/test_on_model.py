"""Examples and logit effects on a live model, and their way to disk and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import circuitbench as cb
from circuitbench import dictionaries, explain
from circuitbench.activations import packed
from circuitbench.architectures import ARCHITECTURES
from circuitbench.errors import BadInput
from circuitbench.models.random import random_model
from tests.architectures.cases import load

SITE = "layers.0.ssm.gated"


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("random:mamba2")


@pytest.fixture(scope="module")
def sae(model: cb.Model) -> dictionaries.Dictionary:
    sae = dictionaries.build("topk", d_in=cb.capture(model, [[1, 2]], SITE)[SITE].shape[-1], d_dict=30, k=4)
    sae.site = SITE
    return sae


@pytest.fixture(scope="module")
def examples(model: cb.Model, sae: dictionaries.Dictionary) -> explain.FeatureExamples:
    return explain.feature_examples(sae, model, text(), context=16, n=3, before=3, after=2, progress=False)


def text() -> list[list[int]]:
    torch.manual_seed(3)
    return [torch.randint(1, 60, (n,)).tolist() for n in (40, 7, 25)]


def test_examples_are_the_activations_of_the_running_model(
    model: cb.Model, sae: dictionaries.Dictionary, examples: explain.FeatureExamples
) -> None:
    sequences = list(packed(text(), 16, model.tokenizer.eos_token_id))
    assert sum(map(len, sequences)) >= 72 and {len(one) for one in sequences[:-1]} == {16}
    codes = [sae.encode(cb.capture(model, [ids], SITE)[SITE])[0].detach() for ids in sequences]
    n_checked = 0
    for feature in range(30):
        best = []
        for s, code in enumerate(codes):
            values = code[:, feature]
            if values.max() > 0:
                best.append((values.max().item(), s))
        best = sorted(best, reverse=True)[:3]
        found = examples.of(feature)
        assert [example.sequence for example in found] == [s for _, s in best]
        assert [example.value for example in found] == pytest.approx([v for v, _ in best], rel=1e-4)
        n_checked += len(found)
    assert n_checked > 40
    used = {i for feature in range(30) for example in examples.of(feature) for i in example.token_ids}
    assert used <= set(examples.words)
    assert all(examples.words[i] == model.tokenizer.decode([i]) for i in used)


@pytest.mark.parametrize("variant", ["falcon_h1", "granitemoehybrid-no-experts"])
def test_logit_effects_go_through_the_models_own_projection_and_multipliers(variant: str) -> None:
    model = load(variant)
    last = next(s for s in reversed(model.sites) if s.endswith(".ssm.gated"))
    width = cb.capture(model, [[1, 2]], last)[last].shape[-1]
    directions = torch.randn(5, width)
    effects = torch.cat(list(explain.logit_effects(model, last, directions)))
    out = last.removesuffix("gated") + "out"
    # Independently: the projection by finite difference on another prompt, then what follows it.
    prompt = [[5, 9, 11]]
    base = cb.capture(model, prompt, out)[out][0, -1]
    added = [cb.intervene(model, prompt, cb.Add(last, d, positions=-1), out)[out][0, -1] - base for d in directions]
    added = torch.stack(added)
    final = f"layers.{len(model.layers) - 1}.resid_post"
    rows = []
    for a in added:
        # Alone in the stream, the direction is what the norm divides by; its length is known.
        logits = [
            cb.intervene(model, prompt, cb.Set(final, sign * 1e3 * a, positions=-1)).logits[0, -1] for sign in (1, -1)
        ]
        rows.append((logits[0] - logits[1]) / 2 * a.square().mean().sqrt())
    expected = torch.stack(rows)
    expected -= expected.mean(1, keepdim=True)
    assert (effects - expected).norm() < 1e-3 * expected.norm()
    assert expected.norm() > 1e-3


def test_logit_effects_are_the_unembedding_times_the_gain() -> None:
    model = cb.load_model(random_model(ARCHITECTURES["mamba2"], vocab_size=50))
    hf = model.hf
    with torch.no_grad():
        hf.backbone.norm_f.weight.uniform_(0.5, 2.0)
        directions = torch.randn(300, hf.config.hidden_size * hf.config.expand)
        path = hf.lm_head.weight @ torch.diag(hf.backbone.norm_f.weight) @ hf.backbone.layers[0].mixer.out_proj.weight
        expected = directions @ path.T
    expected -= expected.mean(1, keepdim=True)
    effects = torch.cat(list(explain.logit_effects(model, SITE, directions)))
    assert (effects - expected).norm() < 1e-4 * expected.norm()


def test_what_is_stored_comes_back(examples: explain.FeatureExamples, tmp_path: Path) -> None:
    examples.save(tmp_path / "examples")
    again = explain.load_examples(tmp_path / "examples")
    for feature in range(30):
        assert again.of(feature) == examples.of(feature)
        assert again.across(feature) == examples.across(feature)
    for name in ("density", "ranges", "histogram", "n_tokens", "words", "about", "before", "n_sequences"):
        old, new = getattr(examples, name), getattr(again, name)
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
    assert all(torch.equal(a, b) for a, b in zip(again.promoted, examples.promoted, strict=True))


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda folder: (folder / "examples.json").unlink(), "has no examples.json"),
        (lambda folder: (folder / "examples.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "examples.json").write_text("{}"), "not of the format"),
        (lambda folder: cut(folder / "examples.safetensors"), "is damaged"),
        (lambda folder: replaced(folder, "histogram", None), "histogram is missing; it must be torch.int64 .30, 64."),
        (lambda folder: replaced(folder, "ranks", torch.zeros(30, 3)), "ranks is torch.float32 .30, 3."),
        (lambda folder: replaced(folder, "promoted.tokens", torch.zeros(2, 3, dtype=torch.int32)), "promoted.tokens"),
        (lambda folder: renamed(folder, "n"), "lacks an entry"),
        (lambda folder: renamed(folder, "words"), "lacks an entry"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_said(
    examples: explain.FeatureExamples, tmp_path: Path, break_it: Any, sentence: str
) -> None:
    examples.save(tmp_path)
    break_it(tmp_path)
    with pytest.raises(BadInput, match=sentence):
        explain.load_examples(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replaced(folder: Path, name: str, value: torch.Tensor | None) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "examples.safetensors")
    del tensors[name]
    save_file(tensors if value is None else {**tensors, name: value}, folder / "examples.safetensors")


def renamed(folder: Path, name: str) -> None:
    path = folder / "examples.json"
    path.write_text(path.read_text().replace(f'"{name}":', '"other":'))


def test_what_cannot_be_gathered_is_refused(model: cb.Model, sae: dictionaries.Dictionary) -> None:
    def gathered(**settings: Any) -> Any:
        return explain.feature_examples(sae, model, text(), **{"progress": False, **settings})

    with pytest.raises(BadInput, match="components a token, and the dictionary encodes"):
        gathered(site="layers.0.resid_post", logit_tokens=0)
    with pytest.raises(BadInput, match="No fixed linear map leads from layers.0.ssm.y to the logits"):
        gathered(site="layers.0.ssm.y")
    with pytest.raises(BadInput, match="stands for"):
        gathered(site="layers.*.ssm.gated")
    with pytest.raises(BadInput, match="context=1"):
        gathered(context=1)
    with pytest.raises(BadInput, match="no tokens"):
        explain.feature_examples(sae, model, [], progress=False)
