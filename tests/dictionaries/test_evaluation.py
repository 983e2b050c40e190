"""Every number of an evaluation against its definition, computed in one piece or by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries import evaluation
from circuitbench.errors import BadInput


@pytest.fixture
def dictionary() -> dictionaries.Dictionary:
    return dictionaries.build("topk", d_in=8, d_dict=32, k=3)


def test_reconstruction_equals_its_definitions(dictionary: dictionaries.Dictionary) -> None:
    x = torch.randn(101, 8) + 50
    code, error = dictionary.encode(x).double(), (x - dictionary(x)).double()
    got = evaluation.reconstruction(dictionary, x, batch_size=17)
    assert got.n_rows == 101
    assert got.fvu == pytest.approx((error.pow(2).sum() / (x - x.mean(0)).double().pow(2).sum()).item(), rel=1e-4)
    assert got.explained_variance == 1 - got.fvu
    assert got.mse == pytest.approx(error.pow(2).mean().item(), rel=1e-5)
    assert got.l0 == pytest.approx((code > 0).sum(1).double().mean().item())
    assert got.l1 == pytest.approx(code.sum(1).mean().item(), rel=1e-5)
    assert got.dead_share == (code == 0).all(0).double().mean().item() > 0
    torch.testing.assert_close(got.density, (code > 0).double().mean(0).float())
    pieces = evaluation.reconstruction(dictionary, iter(x.split(40)))
    assert pieces.fvu == pytest.approx(got.fvu) and torch.equal(pieces.density, got.density)


def test_the_mean_alone_has_fvu_one_and_a_perfect_dictionary_zero() -> None:
    x = torch.randn(50, 4)
    silent = dictionaries.from_weights(
        "topk", W_enc=torch.zeros(4, 8), W_dec=torch.zeros(8, 4), b_enc=-torch.ones(8), b_dec=x.mean(0), k=2
    )
    got = evaluation.reconstruction(silent, x)
    assert got.fvu == pytest.approx(1, abs=1e-6) and got.l0 == 0 and got.dead_share == 1
    both_signs = torch.cat([torch.eye(4), -torch.eye(4)])
    perfect = dictionaries.from_weights("topk", W_enc=both_signs.T.clone(), W_dec=both_signs, k=4)
    got = evaluation.reconstruction(perfect, x)
    assert got.fvu == pytest.approx(0, abs=1e-10) and got.l0 == 4 and got.dead_share == 0


def test_activations_on_which_nothing_can_be_measured_are_refused(dictionary: dictionaries.Dictionary) -> None:
    for activations, message in [
        (torch.ones(5, 8), "all the same row"),
        (torch.full((5, 8), float("nan")), "not finite"),
        ([], "no held-out activations"),
        (torch.randn(2, 3, 8), "give rows"),
        (torch.randn(3, 7), "must be d_in = 8"),
    ]:
        with pytest.raises(BadInput, match=message):
            evaluation.reconstruction(dictionary, activations)


def test_recovered_is_one_where_splicing_is_free_and_zero_where_it_is_as_bad_as_ablation() -> None:
    assert evaluation.recovered(2.0, 2.0, 5.0) == 1
    assert evaluation.recovered(2.0, 5.0, 5.0) == 0
    assert evaluation.recovered(2.0, 2.3, 5.0) == pytest.approx(0.9)
    with pytest.raises(BadInput, match="is not above the clean one"):
        evaluation.recovered(2.0, 2.0, 2.0)


def test_a_splice_counts_each_real_token_once_whatever_the_padding() -> None:
    """Losses and KL by hand, over prompts of different length, padded on the left with ids that must not count."""
    vocab, lengths = 11, [6, 2, 4]
    table = {name: torch.randn(vocab, vocab) for name in ("clean", "spliced", "zero")}  # a bigram model
    prompts = [torch.randint(vocab, (length,)) for length in lengths]
    ids = torch.stack([torch.cat([torch.zeros(6 - len(p), dtype=torch.int64), p]) for p in prompts])
    mask = torch.stack([torch.arange(6) >= 6 - len(p) for p in prompts])

    def run(name: str):
        return lambda batch: table[name][batch[0]]

    got = evaluation.splice(
        [(ids[:2], mask[:2]), (ids[2:], mask[2:])],
        clean=run("clean"),
        spliced=run("spliced"),
        ablated={"zero": run("zero")},
    )

    def loss(name: str) -> float:
        pairs = [(a, b) for p in prompts for a, b in zip(p.tolist(), p.tolist()[1:], strict=False)]
        return -sum(table[name].log_softmax(-1)[a, b].item() for a, b in pairs) / len(pairs)

    def kl() -> float:
        before = [token for p in prompts for token in p.tolist()[:-1]]
        p, q = table["clean"].softmax(-1), table["spliced"].softmax(-1)
        return sum((p[a] * (p[a] / q[a]).log()).sum().item() for a in before) / len(before)

    assert got.n_tokens == 5 + 1 + 3
    assert got.ce_clean == pytest.approx(loss("clean"), rel=1e-5)
    assert got.ce_spliced == pytest.approx(loss("spliced"), rel=1e-5)
    assert got.kl == pytest.approx(kl(), rel=1e-5)
    if loss("zero") > loss("clean"):
        expected = (loss("zero") - loss("spliced")) / (loss("zero") - loss("clean"))
        assert got.recovered("zero") == pytest.approx(expected, rel=1e-5)
    with pytest.raises(BadInput, match="ablation 'mean' was not measured; there are: 'zero'"):
        got.recovered("mean")


def test_a_splice_that_changes_nothing_has_no_kl() -> None:
    logits = torch.randn(2, 5, 9)
    batch: tuple[Tensor, Tensor] = torch.randint(9, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    got = evaluation.splice([batch], clean=lambda _: logits, spliced=lambda _: logits + 3.0, ablated={})
    assert math.isclose(got.kl, 0, abs_tol=1e-12)
    with pytest.raises(BadInput, match="no token to predict"):
        evaluation.splice([], clean=lambda _: logits, spliced=lambda _: logits, ablated={})
