"""Every kind's loss and gradient against the textbook's formula on dense float64 matrices, in every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries.base import Step
from circuitbench.errors import BadInput
from tests.dictionaries.examples import FORMS, SETTINGS, example

N, D_DICT, K, BANDWIDTH, WEIGHT = 24, 20, 3, 0.6, 0.7


def double(kind: str, form: str) -> dictionaries.Dictionary:
    """With biases that leave few features active, and decoder rows of many lengths."""
    dictionary = example(kind, **FORMS[form]).double()
    with torch.no_grad():
        for name in dictionary.encoder_biases:
            getattr(dictionary, name).sub_(1.5)
    return dictionary


def data(dictionary: dictionaries.Dictionary) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, dictionary.d_in, dtype=torch.float64)
    return x, torch.randn(N, dictionary.d_out, dtype=torch.float64) if dictionary.transcodes else x


def step_for(dictionary: dictionaries.Dictionary, decoder_norm: str = "unit", dead: Tensor | None = None) -> Step:
    options: dict[str, Any] = dict(type(dictionary).training_options)
    options |= {"sparsity": WEIGHT, "sparsity_warmup": 0.0} if "sparsity" in options else {}
    options |= {"bandwidth": BANDWIDTH} if "bandwidth" in options else {}
    dead = torch.tensor([], dtype=torch.long) if dead is None else dead
    # What a run remembers after its first batch, from which on nothing is set by hand.
    return Step(0.5, dead, options, decoder_norm, {"sparsity": torch.zeros(2)})


Dense = Callable[[dict[str, Any], Tensor, Tensor, bool], Tensor]


def pre(p: dict[str, Any], x: Tensor, bias: str | None = "b_enc") -> Tensor:
    shifted = x if p["transcodes"] else x - p["b_dec"]
    return shifted @ p["W_enc"] + (p[bias] if bias else 0)


def decoded(p: dict[str, Any], x: Tensor, code: Tensor) -> Tensor:
    return code @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"].T if "W_skip" in p else 0)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).pow(2).mean()


def norms(p: dict[str, Any], free: bool) -> Tensor | int:
    return p["W_dec"].norm(dim=1) if free else 1


def standard(p: dict[str, Any], x: Tensor, target: Tensor, free: bool) -> Tensor:
    code = pre(p, x).relu()
    penalty = (code * norms(p, free)).sum(1).mean() / target.shape[1]
    return mean_square(decoded(p, x, code), target) + WEIGHT * penalty


def gated(p: dict[str, Any], x: Tensor, target: Tensor, free: bool) -> Tensor:
    gate = pre(p, x, "b_gate")
    magnitude = (pre(p, x, None) * p["r_mag"].exp() + p["b_mag"]).relu()
    code = (gate > 0).double() * magnitude
    frozen = {name: value.detach() if name in ("W_dec", "W_skip") else value for name, value in p.items()}
    by_gate = gate.relu() @ frozen["W_dec"] + p["b_dec"].detach()
    by_gate = by_gate + (x @ frozen["W_skip"].T if "W_skip" in p else 0)
    penalty = (gate.relu() * norms(p, free)).sum(1).mean() / target.shape[1]
    return mean_square(decoded(p, x, code), target) + mean_square(by_gate, target) + WEIGHT * penalty


def jumprelu(p: dict[str, Any], x: Tensor, target: Tensor, free: bool) -> Tensor:
    """A surrogate with the paper's pseudo-derivatives: ∂JumpReLU/∂θ = −θ/ε·K((z−θ)/ε), ∂step/∂θ = −K((z−θ)/ε)/ε."""
    z, theta = pre(p, x), p["threshold"].double()
    kernel = ((z - theta).abs() < BANDWIDTH / 2).double().detach()
    active = (z > theta).double().detach()
    moved = theta - theta.detach()  # 0, with a derivative of 1
    code = active * z - (theta * kernel).detach() / BANDWIDTH * moved
    l0 = active - kernel / BANDWIDTH * moved
    return mean_square(decoded(p, x, code), target) + WEIGHT * l0.sum(1).mean() / target.shape[1]


def top(scores: Tensor, count: int) -> Tensor:
    return scores >= scores.flatten().sort(descending=True).values[count - 1]


def topk(p: dict[str, Any], x: Tensor, target: Tensor, free: bool) -> Tensor:
    z = pre(p, x)
    chosen = torch.stack([top(row, K) for row in z * (norms(p, free))])
    return mean_square(decoded(p, x, chosen * z.relu()), target)


def abstopk(p: dict[str, Any], x: Tensor, target: Tensor, free: bool) -> Tensor:
    z = pre(p, x)
    chosen = torch.stack([top(row, K) for row in z.abs() * (norms(p, free))])
    return mean_square(decoded(p, x, chosen * z), target)


def batch_code(p: dict[str, Any], x: Tensor, free: bool) -> Tensor:
    z = pre(p, x)
    return top((z * norms(p, free)).relu(), K * N) * z.relu()


def batchtopk(p: dict[str, Any], x: Tensor, target: Tensor, free: bool) -> Tensor:
    return mean_square(decoded(p, x, batch_code(p, x, free)), target)


def matryoshka(p: dict[str, Any], x: Tensor, target: Tensor, free: bool) -> Tensor:
    code = batch_code(p, x, free)
    sizes = SETTINGS["matryoshka"]["prefixes"]
    nested = [mean_square(decoded(p, x, code * (torch.arange(D_DICT) < size)), target) for size in sizes]
    return torch.stack(nested).mean()


DENSE: dict[str, Dense] = {
    "standard": standard, "gated": gated, "jumprelu": jumprelu,
    "topk": topk, "abstopk": abstopk, "batchtopk": batchtopk, "matryoshka": matryoshka,
}  # fmt: skip


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", DENSE)
def test_loss_and_gradients_are_those_of_the_formula(kind: str, form: str, decoder_norm: str) -> None:
    dictionary = double(kind, form)
    x, target = data(dictionary)
    objective = dictionary.objective(x, target, step_for(dictionary, decoder_norm))
    parameters = dict(dictionary.named_parameters())
    gradients = torch.autograd.grad(objective.loss, list(parameters.values()), allow_unused=True)

    copies = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    expected = DENSE[kind]({**copies, "transcodes": dictionary.transcodes}, x, target, decoder_norm == "free")
    references = torch.autograd.grad(expected, list(copies.values()), allow_unused=True)
    torch.testing.assert_close(objective.loss, expected)
    assert 0 < objective.code.l0 < 0.6 * D_DICT
    for name, gradient, reference in zip(parameters, gradients, references, strict=True):
        rtol, atol = (1e-5, 1e-7) if name == "threshold" else (1e-9, 1e-12)
        torch.testing.assert_close(
            gradient, reference, msg=lambda said, name=name: f"{name}: {said}", rtol=rtol, atol=atol
        )
        assert reference.abs().sum() > 0, f"{name}: a gradient of 0 compares nothing"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", DENSE)
def test_folding_changes_units_and_nothing_else(kind: str, form: str) -> None:
    """A dictionary of scaled data becomes that of the data; decoder rows of length 1, the same function."""
    dictionary = double(kind, form)
    x, _ = data(dictionary)
    code, out = dictionary.encode(x), dictionary(x)
    assert 0 < (code > 0).sum() < 0.6 * code.numel()
    lengths = dictionary.W_dec.norm(dim=1)
    if kind not in ("batchtopk", "matryoshka"):  # their threshold is one for activations times lengths: see below
        dictionary.fold_decoder_norm()
        torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(D_DICT, dtype=torch.float64))
        if kind not in ("topk", "abstopk"):  # selects by what the activations are
            torch.testing.assert_close(dictionary(x), out, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(dictionary.encode(x), code * lengths, rtol=1e-5, atol=1e-6)
    code, out = dictionary.encode(x), dictionary(x)
    scale, target_scale = torch.tensor(3.0), torch.tensor(7.0 if dictionary.transcodes else 3.0)
    if dictionary.blocks:
        widths = torch.tensor(list(dictionary.blocks.values()))
        scale = target_scale = torch.tensor([2.0, 5.0]).repeat_interleave(widths)
    dictionary.fold_scale(scale, target_scale)
    torch.testing.assert_close(dictionary(x * scale), out * target_scale, rtol=1e-5, atol=1e-5)
    factor = target_scale.mean()
    torch.testing.assert_close(dictionary.encode(x * scale), code * factor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_folding_lengths_keeps_the_threshold_of_what_was_compared(kind: str) -> None:
    """Trained with free decoder rows, entries were compared as activation times length."""
    dictionary = double(kind, "autoencoder")
    x, _ = data(dictionary)
    lengths, threshold = dictionary.W_dec.norm(dim=1), float(dictionary.threshold.mean())
    dictionary.threshold.fill_(threshold)
    product = dictionary.preactivations(x) * lengths
    dictionary.fold_decoder_norm()
    torch.testing.assert_close(dictionary.encode(x), torch.where(product > threshold, product, 0))


@pytest.mark.parametrize("kind", ["jumprelu", "batchtopk", "matryoshka"])
def test_thresholds_stay_in_float32(kind: str) -> None:
    """Whatever the rest is cast to, and without a rounding on the way."""
    dictionary = example(kind)
    before = dictionary.threshold.detach().clone()
    for cast in (dictionary.bfloat16, dictionary.half, dictionary.double, lambda: dictionary.to(torch.bfloat16)):
        cast()
        assert dictionary.threshold.dtype == torch.float32 and torch.equal(dictionary.threshold, before)
    assert dictionary.W_enc.dtype == torch.bfloat16
    assert dictionary(torch.randn(5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    settings: dict[str, Any] = {} if kind == "jumprelu" else {"k": 2}
    built = dictionaries.build(kind, d_in=4, d_dict=8, dtype=torch.bfloat16, **settings)
    assert built.threshold.dtype == torch.float32
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    objective = dictionary.objective(x, x, step_for(dictionary))
    assert torch.isfinite(objective.loss)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", DENSE)
def test_lost_features_are_pulled_back_by_their_encoder(kind: str, form: str) -> None:
    """AuxK, or the pre-activation loss: the gradient reaches the encoder of dead features, and of no others."""
    dictionary = double(kind, form)
    x, target = data(dictionary)
    dead = torch.arange(3)
    with torch.no_grad():
        dictionary.encoder_bias[dead] += 2.0
    step, calm = step_for(dictionary, dead=dead), step_for(dictionary)
    step.options = {**step.options, "dead_weight": 0.1} if "dead_weight" in step.options else step.options
    with_dead, without = (dictionary.objective(x, target, s) for s in (step, calm))
    W_enc, bias = dictionary.W_enc, dictionary.encoder_bias
    change = torch.autograd.grad(with_dead.loss - without.loss, [W_enc, bias])[0].norm(dim=0)
    if "dead_weight" in step.options:
        parameters: dict[str, Any] = {**dict(dictionary.named_parameters()), "transcodes": dictionary.transcodes}
        bound = getattr(dictionary, "threshold", torch.zeros(D_DICT))
        missing = bound - pre(parameters, x, dictionary.encoder_biases[0])
        expected = 0.1 * (missing[:, dead].relu() * dictionary.W_dec[dead].norm(dim=1)).sum(1).mean() / dictionary.d_out
        torch.testing.assert_close(with_dead.loss - without.loss, expected, rtol=1e-6, atol=1e-9)
    assert (change[dead] > 0).all()
    assert (change[3:] < 1e-12).all()


def test_prefixes_must_end_at_the_dictionary() -> None:
    assert dictionaries.build("matryoshka", d_in=4, d_dict=64, k=2).settings["prefixes"] == (4, 8, 16, 32, 64)
    assert dictionaries.build("matryoshka", d_in=4, d_dict=3, k=2).settings["prefixes"] == (1, 3)
    for prefixes in ((4, 8), (8, 4, 16), (0, 16), ()):
        with pytest.raises(BadInput, match="the last one d_dict = 16"):
            dictionaries.build("matryoshka", d_in=4, d_dict=16, k=2, prefixes=prefixes)


def test_shares_of_blocks() -> None:
    dictionary = example("topk", **FORMS["crosscoder"])
    norms = torch.stack([part.norm(dim=1) for part in dictionary.W_dec.detach().split([2, 4], dim=1)])
    torch.testing.assert_close(dictionary.block_norms(), norms / norms.sum(0))
    before = dictionary.block_norms()
    dictionary.fold_scale(*[torch.tensor([0.01, 0.01, 50.0, 50.0, 50.0, 50.0])] * 2)
    torch.testing.assert_close(dictionary.block_norms(), before)
    with pytest.raises(BadInput, match="block_norms belongs to a crosscoder"):
        example("topk").block_norms()
