"""The encoder's product in bfloat16 chooses features; what is chosen, and all that is learned, is float32."""

from __future__ import annotations

import pytest
import torch

from circuitbench import dictionaries
from circuitbench.dictionaries.recipe import recipe
from circuitbench.dictionaries.run import Run
from tests.dictionaries.planted import planted


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_what_is_chosen_by_rounded_products_is_exact(kind: str) -> None:
    x = planted(200, d_in=32, n_features=90, active=3)[0]
    dictionary = dictionaries.build(kind, d_in=32, d_dict=120, k=5)
    dictionary.b_dec.data.copy_(x.mean(0))
    exact = (x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    dictionary.product_dtype = torch.bfloat16
    rounded = dictionary.preactivations(x)
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().amax() > 1e-3, "the product is a rounded one"
    code = dictionary.encode_batch(x) if kind == "batchtopk" else dictionary.encode_sparse(x)
    torch.testing.assert_close(code.values, exact[code.rows, code.columns].relu(), rtol=1e-5, atol=1e-5)
    dictionary.product_dtype = None
    wanted = (dictionary.encode_batch(x) if kind == "batchtopk" else dictionary.encode_sparse(x)).to_dense() > 0
    chosen = code.to_dense() > 0
    assert 0 < (chosen & ~wanted).sum() < 0.03 * wanted.sum(), "only near ties are chosen otherwise"
    # The gradient is that of the exact values at the entries that were chosen.
    weights = torch.randn(len(code.values), generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(code.values @ weights, dictionary.W_enc)[0]
    reference = torch.autograd.grad(exact[code.rows, code.columns].relu() @ weights, dictionary.W_enc)[0]
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_it_trains_as_well(kind: str) -> None:
    x = planted(1000, d_in=32, n_features=50, active=3)[0]
    settings = {"kind": kind, "d_dict": 64, "steps": 100, "batch_size": 64, "progress": False}
    settings |= {"k": 4} if kind == "topk" else {"l0": 4.0}
    full, rounded = (dictionaries.train(x, **settings, precision=p) for p in ("float32", "bfloat16"))
    assert rounded.history != full.history
    at_the_end = [sum(result.history["fvu"][-20:]) / 20 for result in (rounded, full)]
    assert at_the_end[0] == pytest.approx(at_the_end[1], rel=0.05)
    assert rounded.dictionary.product_dtype is None, "what is finished computes as any other"


def test_parameters_and_moments_stay_float32() -> None:
    x = planted(100, d_in=16, n_features=40, active=3)[0]
    run = Run(recipe({"x": 16}, d_dict=48, k=4, steps=5, batch_size=64, precision="bfloat16"), {"x": x})
    run.train_on({"x": x[:64]})
    found = {tensor.dtype for name, tensor in run.tensors().items() if name != "rows_since_active"}
    assert found - {torch.float64} == {torch.float32}
