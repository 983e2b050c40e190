"""Every number of an evaluation against its definition, computed in one piece or by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries import evaluation, reporting
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


def brute_force(x: Tensor, estimate: Tensor, batches: list[slice]) -> dict[str, float]:
    """Row by row, in double precision."""
    x, estimate = x.double(), estimate.double()
    rows = list(zip(x, estimate, strict=True))

    def mean(numbers: list[Tensor]) -> float:
        return torch.stack(numbers).mean().item()

    legacy: list[Tensor] = []
    for part in batches:
        center = x[part].mean(0)
        legacy += [1 - (a - b).pow(2).sum() / (a - center).pow(2).sum() for a, b in rows[part]]
    return {
        "fvu": mean([(a - b).pow(2).sum() for a, b in rows]) / mean([(a - x.mean(0)).pow(2).sum() for a in x]),
        "explained_variance_legacy": mean(legacy),
        "mse": mean([(a - b).pow(2).mean() for a, b in rows]),
        "cosine": mean([a @ b / a.norm() / b.norm() for a, b in rows]),
        "l2_in": mean([a.norm() for a, _ in rows]),
        "l2_out": mean([b.norm() for _, b in rows]),
        "l2_ratio": mean([b.norm() / a.norm() for a, b in rows]),
        "relative_bias": mean([b @ b for _, b in rows]) / mean([a @ b for a, b in rows]),
    }


def other_cosines(directions: Tensor) -> float:
    """The largest cosine with another one, one pair at a time."""
    d = directions.double()
    best = [
        max((d[i] @ d[j] / d[i].norm() / d[j].norm()).item() for j in range(len(d)) if j != i) for i in range(len(d))
    ]
    return sum(best) / len(best)


def test_every_number_is_that_of_a_loop_over_rows() -> None:
    sae = dictionaries.build("topk", d_in=6, d_dict=20, k=3, dtype=torch.float64)
    sae.W_enc.data = torch.randn(20, 6, dtype=torch.float64).T
    x = torch.randn(53, 6, dtype=torch.float64) + torch.arange(6)
    got = evaluation.reconstruction(sae, [x[:9], x[9:40], x[40:]], batch_size=20)
    for name, value in brute_force(x, sae(x), [slice(0, 20), slice(20, 53)]).items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-10), name
    assert got.max_encoder_cosine == pytest.approx(other_cosines(sae.W_enc.T))
    assert got.max_decoder_cosine == pytest.approx(other_cosines(sae.W_dec))
    density = (sae.encode(x) > 0).double().mean(0)
    assert got.denser_than(0.1) == (density > 0.1).sum().item() / 20
    edges, counts = got.histogram(bins_per_decade=3)
    assert edges[-1] == 0 and edges[0] <= -math.log10(53) and sum(counts) == (density > 0).sum()
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        inside = (density.log10() >= low - 1e-6) & (density.log10() < (high - 1e-6 if high < 0 else 1))
        assert count == inside.sum()


def test_a_transcoder_is_judged_by_what_it_reconstructs() -> None:
    transcoder = dictionaries.build("topk", d_in=6, d_dict=20, d_out=4, skip=True, k=3, dtype=torch.float64)
    assert transcoder.W_skip is not None
    transcoder.W_skip.data = torch.randn(4, 6, dtype=torch.float64)
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 4, dtype=torch.float64) + 3
    estimate = transcoder.encode(x) @ transcoder.W_dec + transcoder.b_dec + x @ transcoder.W_skip.T
    got = evaluation.reconstruction(transcoder, x.split(11), y.split(11), batch_size=64)
    for name, value in brute_force(y, estimate, [slice(0, 40)]).items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-10), name
    with pytest.raises(BadInput, match="give targets"):
        evaluation.reconstruction(transcoder, x)
    with pytest.raises(BadInput, match="reconstructs 4 components, and the targets have 6"):
        evaluation.reconstruction(transcoder, x, x)


def test_a_crosscoder_is_judged_site_by_site_too(dictionary: dictionaries.Dictionary) -> None:
    blocks = {"layers.0.ssm.gated": 3, "layers.1.ssm.gated": 5}
    crosscoder = dictionaries.build("topk", d_in=8, d_dict=32, k=3, blocks=blocks)
    x = torch.randn(60, 8) * torch.tensor([1.0] * 3 + [5.0] * 5)
    got, estimate = evaluation.reconstruction(crosscoder, x), crosscoder(x)
    for address, part in zip(blocks, [slice(0, 3), slice(3, 8)], strict=True):
        alone = brute_force(x[:, part], estimate[:, part], [slice(0, 60)])
        assert got.fvu_by_site[address] == pytest.approx(alone["fvu"], rel=1e-5)
    with pytest.raises(BadInput, match="targets were given"):
        evaluation.reconstruction(dictionary, x, x)


def test_files_and_saebench_get_the_same_numbers(dictionary: dictionaries.Dictionary) -> None:
    found = evaluation.reconstruction(dictionary, torch.randn(50, 8))
    splice = evaluation.Splice(49, 2.0, 2.5, {"zero": 7.0, "mean": 1.5}, 0.4, {"zero": 1.6, "mean": 0.1})
    told = json.loads(json.dumps(reporting.to_dict(found, splice)))
    assert told["ce_recovered"] == {"zero": 0.9, "mean": None}  # the mean makes the model better: no share
    assert (told["fvu"], told["l2_ratio"], told["n_rows"], told["n_tokens"]) == (found.fvu, found.l2_ratio, 50, 49)
    theirs = reporting.to_saebench(found, splice)
    assert theirs["model_behavior_preservation"] == {
        "kl_div_score": pytest.approx(0.75),
        "kl_div_with_ablation": 1.6,
        "kl_div_with_sae": 0.4,
    }
    assert theirs["model_performance_preservation"]["ce_loss_score"] == pytest.approx(0.9)
    density = found.density
    expected = (density[density > 0.1].sum() / density.sum()).item()
    assert theirs["misc_metrics"]["normalized_freq_over_10_percent"] == pytest.approx(expected)
    assert theirs["misc_metrics"]["frac_alive"] == (density > 0).double().mean().item()


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

    def kl(name: str) -> float:
        before = [token for p in prompts for token in p.tolist()[:-1]]
        p, q = table["clean"].softmax(-1), table[name].softmax(-1)
        return sum((p[a] * (p[a] / q[a]).log()).sum().item() for a in before) / len(before)

    assert got.n_tokens == 5 + 1 + 3
    assert got.kl_ablated["zero"] == pytest.approx(kl("zero"), rel=1e-5)
    assert got.ce_clean == pytest.approx(loss("clean"), rel=1e-5)
    assert got.ce_spliced == pytest.approx(loss("spliced"), rel=1e-5)
    assert got.kl == pytest.approx(kl("spliced"), rel=1e-5)
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
