"""End-to-end training: the gradient through the model by finite differences, and a KL that falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench import dictionaries
from circuitbench.dictionaries.base import Step
from circuitbench.dictionaries.end_to_end import Through, train_end_to_end
from circuitbench.errors import BadInput
from circuitbench.models.zoo import corpus

SITE = "layers.1.ssm.gated"
SMALL: dict[str, Any] = {"context": 8, "prompts_per_forward": 2, "progress": False}


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("random:mamba2", dtype=torch.float64)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(5, 50, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("downstream", [(), ("layers.1.resid_post",)])
def test_the_gradient_of_a_decoder_is_the_change_of_the_kl(
    model: cb.Model, ids: Tensor, downstream: tuple[str, ...]
) -> None:
    """Of the model's own run on the reconstruction; one token keeps its own activation."""
    through = Through(model, SITE, SITE, downstream, 0.5)
    kept = torch.ones_like(ids, dtype=torch.bool)
    kept[:, 0] = False
    x = through.clean(ids, kept)[SITE].double()
    dictionary = dictionaries.build("standard", d_in=x.shape[1], d_dict=24, dtype=torch.float64)
    with torch.no_grad():
        dictionary.W_dec *= x.norm(dim=1).mean() / 4

    def loss() -> Tensor:
        options = {"l0": None, "sparsity": 0.0, "sparsity_warmup": 0.0, "dead_weight": 0.0}
        step = Step(0.0, torch.tensor([], dtype=torch.long), options, error=lambda _, made: through.loss(made))
        return dictionary.objective(x, x, step).loss

    (gradient,) = torch.autograd.grad(loss(), dictionary.W_dec)
    place = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    around = []
    for shift in (5e-3, -5e-3):
        with torch.no_grad():
            dictionary.W_dec[place] += shift
            around.append(loss().item())
            dictionary.W_dec[place] -= shift
    assert gradient[place].item() == pytest.approx((around[0] - around[1]) / 1e-2, rel=2e-3)
    assert through.loss(x).item() == pytest.approx(0, abs=1e-9), "its own activations change nothing"
    own = cb.intervene(model, ids, [cb.Set(SITE, through.found[SITE][:, :1] * 2, positions=[0])])
    assert not torch.allclose(own.logits, through.found["logits"]), "the token that was kept would have mattered"


def test_it_goes_on_from_a_trained_dictionary(model: cb.Model, ids: Tensor) -> None:
    """A step too small to change anything leaves the function as it was."""
    text = [row.tolist() for row in ids]
    for kind, settings in {"topk": {"k": 4}, "gated": {"l0": 4.0}}.items():
        first = train_end_to_end(model, SITE, text, kind=kind, d_dict=32, steps=3, **settings, **SMALL).dictionary
        assert first.site == SITE
        options = {} if kind == "topk" else settings
        again = train_end_to_end(model, SITE, text, start=first, steps=1, lr=1e-12, **options, **SMALL).dictionary
        x = torch.randn(20, first.d_in)
        torch.testing.assert_close(again(x), first(x), rtol=1e-4, atol=1e-5)


def test_wrong_arguments(model: cb.Model, ids: Tensor) -> None:
    text = [row.tolist() for row in ids]
    other = dictionaries.build("topk", d_in=6, d_dict=32, k=2)
    with pytest.raises(BadInput, match="start reads 6 and writes 6 numbers"):
        train_end_to_end(model, SITE, text, start=other, steps=1, **SMALL)
    with pytest.raises(BadInput, match="start= settles kind and size"):
        train_end_to_end(model, SITE, text, start=other, kind="topk", steps=1, **SMALL)
    with pytest.raises(BadInput, match="not in the model's order"):
        train_end_to_end(model, SITE, text, downstream="layers.0.resid_post", k=4, steps=1, **SMALL)


@pytest.mark.slow
def test_the_kl_falls_on_a_language_model() -> None:
    """From a locally trained dictionary, on held-out text."""
    model = cb.load_model("zoo:pylm-hybrid")
    train, held_out = ([document.text[:3000] for document in part[:12]] for part in corpus.split())
    site = "layers.2.ssm.gated"
    local = dictionaries.train_sae(model, site, train, k=8, expansion=2, steps=150, batch_size=256, progress=False)
    result = train_end_to_end(
        model, site, train, start=local, steps=60, lr=2e-3, context=128, prompts_per_forward=4, progress=False
    )
    before, after = (
        dictionaries.evaluate(one, model, held_out, progress=False).splice.kl for one in (local, result.dictionary)
    )
    assert after < 0.8 * before
