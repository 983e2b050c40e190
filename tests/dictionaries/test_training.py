"""Training finds planted features, does not depend on the scale of the activations, and resumes to the last bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries import evaluation
from circuitbench.dictionaries.checkpoints import CHECKPOINT
from circuitbench.errors import BadInput
from tests.dictionaries.planted import mean_max_cosine, planted

SHORT = {"d_dict": 48, "k": 4, "steps": 30, "batch_size": 64, "progress": False}


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return planted(700, d_in=16, n_features=40, active=3)[0]


def same(a: dictionaries.TrainResult, b: dictionaries.TrainResult) -> bool:
    tensors = zip(a.dictionary.parameters(), b.dictionary.parameters(), strict=True)
    return a.history == b.history and all(torch.equal(x, y) for x, y in tensors)


def test_planted_features_are_recovered() -> None:
    x, truth = planted(30_000, d_in=64, n_features=96, active=3)
    train, held_out = x[:-4000], x[-4000:]
    result = dictionaries.train(train, d_dict=144, k=6, steps=500, batch_size=256, progress=False)
    quality = evaluation.reconstruction(result.dictionary, held_out)
    assert quality.fvu < 0.06
    assert mean_max_cosine(truth, result.dictionary.W_dec) > 0.99
    assert quality.l0 <= 6
    assert result.history["fvu"][-1] == pytest.approx(quality.fvu, abs=0.02), "the history speaks of the same quantity"
    assert result.history["fvu"][0] > 4 * result.history["fvu"][-1]


def test_the_result_does_not_depend_on_the_scale_of_the_activations() -> None:
    x, _ = planted(3000, d_in=16, n_features=40, active=3)
    small, large = (dictionaries.train(s * x, **SHORT | {"steps": 60}) for s in (0.01, 100.0))
    torch.testing.assert_close(small.dictionary.W_dec, large.dictionary.W_dec, rtol=0, atol=5e-3)
    torch.testing.assert_close(1e4 * small.dictionary.b_dec, large.dictionary.b_dec, rtol=1e-2, atol=1.0)
    assert small.history["fvu"][-1] == pytest.approx(large.history["fvu"][-1], rel=1e-2)


def test_a_step_is_adam_on_the_dense_loss() -> None:
    """Three steps of training, dead features included, equal the same steps written densely."""
    n = 8  # so few that they cannot keep 48 features busy
    x = planted(n, d_in=16, n_features=40, active=3)[0].double()
    options = SHORT | {"steps": 3, "batch_size": n, "lr": 0.01, "log_every": 1, "dead_after": 12}
    result = dictionaries.train(x, **options, dtype=torch.float64)

    start = dictionaries.build("topk", d_in=16, d_dict=48, k=4, dtype=torch.float64)
    W_enc, W_dec = (
        getattr(start, name).detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        for name in ("W_enc", "W_dec")
    )
    unit = (x - x.mean(0)).pow(2).mean().sqrt().item()
    x = x / unit
    b_enc, b_dec = torch.zeros(48, dtype=torch.float64, requires_grad=True), x.mean(0).requires_grad_()
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], betas=(0.9, 0.999))
    unused = torch.zeros(48)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (3 - step) / 2.4)
        pre = (x - b_dec) @ W_enc + b_enc
        code = torch.zeros_like(pre).scatter(1, pre.topk(4).indices, 1.0) * pre.relu()
        error = x - code @ W_dec - b_dec
        fvu = error.pow(2).mean()
        loss, dead = fvu, unused > 12
        if dead.any():
            masked = torch.where(dead, pre, -torch.inf).topk(min(8, int(dead.sum())))
            kept = torch.zeros_like(pre).scatter(1, masked.indices, 1.0) * pre.relu()
            target = error.detach()
            loss = fvu + (target - kept @ W_dec).pow(2).sum() / (target - target.mean(0)).pow(2).sum() / 32
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
        unused = torch.where((code > 0).any(0), 0.0, unused + n)
        assert result.history["loss"][step] == pytest.approx(loss.item(), rel=1e-9)
        assert result.history["l0"][step] == pytest.approx((code > 0).sum().item() / n)
        assert result.history["dead_share"][step] == pytest.approx(dead.double().mean().item())
    assert result.history["dead_share"][2] > 0, "the third step has dead features, or AuxK was not compared"
    for name, reference in {"W_enc": W_enc, "W_dec": W_dec, "b_enc": unit * b_enc, "b_dec": unit * b_dec}.items():
        torch.testing.assert_close(getattr(result.dictionary, name), reference.detach(), rtol=1e-7, atol=1e-9, msg=name)


def test_decoder_rows_have_length_one(rows: Tensor) -> None:
    W_dec = dictionaries.train(rows, **SHORT).dictionary.W_dec
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(48))


def test_a_resumed_run_equals_an_unbroken_one_to_the_last_bit(rows: Tensor, tmp_path: Path) -> None:
    unbroken = dictionaries.train(rows, **SHORT, dead_after=100)
    assert max(unbroken.history["dead_share"]) > 0, (
        "the state of dead features must matter, or its loss would go unseen"
    )
    for stop in (7, 13, 29):
        part = dictionaries.train(rows, **SHORT, dead_after=100, out=tmp_path, stop_after=stop, resume=stop > 7)
        assert (part.step, part.finished) == (stop, False)
    resumed = dictionaries.train(rows, **SHORT, dead_after=100, out=tmp_path, resume=True)
    assert resumed.finished and same(resumed, unbroken)
    again = dictionaries.train(rows, **SHORT, dead_after=100, out=tmp_path, resume=True)
    assert again.rows_per_second == 0 and same(again, unbroken), "a finished run is read, not repeated"
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_checkpoint_of_step_zero_resumes_too(rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("circuitbench.dictionaries.run.Run.train_on", killed)
        with pytest.raises(KeyboardInterrupt):
            dictionaries.train(rows, **SHORT, out=tmp_path)
    assert same(dictionaries.train(rows, **SHORT, out=tmp_path, resume=True), dictionaries.train(rows, **SHORT))


def test_batches_of_a_stream_lose_and_double_no_row(rows: Tensor, tmp_path: Path) -> None:
    """However the rows are cut, a stream trains alike; also when resumed, and when read through a second time."""
    pieces = [list(rows.split(size)) for size in (64, 90, 701)]
    results = [dictionaries.train(piece, **SHORT) for piece in pieces]
    # b_dec starts from the beginning of the stream, all of which is seen here.
    assert all(same(result, results[0]) for result in results)
    dictionaries.train(pieces[1], **SHORT, out=tmp_path, stop_after=17)
    assert same(dictionaries.train(pieces[1], **SHORT, out=tmp_path, resume=True), results[0])


def test_shuffled_batches_cover_every_row_once_a_pass(rows: Tensor) -> None:
    from circuitbench.dictionaries.batches import batches_of

    numbered = torch.arange(70.0).unsqueeze(1)
    stream = batches_of(numbered, None, 16, seed=3).from_step(0)
    seen = torch.cat([next(stream)["x"] for _ in range(35)]).flatten()  # eight passes
    for epoch in seen.view(8, 70):
        assert sorted(epoch.tolist()) == list(range(70))
    assert not torch.equal(seen[:70], seen[70:140])
    later = batches_of(numbered, None, 16, seed=3).from_step(20)
    assert torch.equal(torch.cat([next(later)["x"] for _ in range(15)]).flatten(), seen[20 * 16 :])


def test_training_is_determined_by_the_seed(rows: Tensor) -> None:
    torch.manual_seed(1)
    first = dictionaries.train(rows, **SHORT, seed=5)
    torch.manual_seed(2)
    assert same(first, dictionaries.train(rows, **SHORT, seed=5))
    assert not same(first, dictionaries.train(rows, **SHORT, seed=6))


def test_the_activations_are_not_changed(rows: Tensor) -> None:
    before = copy.deepcopy(rows)
    dictionaries.train(rows, **SHORT)
    assert torch.equal(rows, before)


def test_a_finished_run_leaves_the_dictionary_and_its_record(rows: Tensor, tmp_path: Path) -> None:
    result = dictionaries.train(rows, **SHORT, out=tmp_path)
    loaded = dictionaries.load_dictionary(tmp_path)
    assert torch.equal(loaded.encode(rows), result.dictionary.encode(rows))
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["history"] == result.history
    assert record["settings"]["k"] == 4 and record["settings"]["d_dict"] == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors", "training.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "nonesuch"}, "kind='nonesuch' is not a kind of dictionary; there are: 'abstopk', 'batchtopk'"),
        ({"d_dict": None}, "give one of them, such as expansion=8"),
        ({"expansion": 2}, "give one of them"),
        ({"k": 49}, "k=49 was given; it must lie between 1 and d_dict = 48"),
        ({"k": 0}, "k=0 was given"),
        ({"steps": 0}, "steps=0 was given; it must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 was given; it must be at least 1"),
        ({"resume": True}, "resume=True needs `out`"),
        ({"stop_after": 3}, "stop_after=3 needs `out`"),
        ({"dtype": torch.bfloat16}, "train in torch.float32 or torch.float64"),
        ({"lr": 1e30}, "lr=1e\\+30 is too high"),
    ],
)
def test_wrong_options_are_refused(rows: Tensor, options: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        dictionaries.train(rows, **SHORT | options)


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        (torch.zeros(5, 4, 3), r"`.flatten\(0, -2\)` makes them so\); given: torch.float32 \(5, 4, 3\)"),
        (torch.zeros(5, 4, dtype=torch.int64), "given: torch.int64"),
        (torch.zeros(0, 4), "have no rows"),
        (torch.ones(5, 4), "all the same row"),
        (torch.full((5, 4), float("nan")), "not finite"),
        ([], "no rows"),
        ([torch.randn(5, 4), torch.randn(5, 3)], r"has d_in = 3, the first one had 4"),
        (iter([torch.randn(50, 4)]), "ended before training did"),
    ],
)
def test_wrong_activations_are_refused(activations: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        dictionaries.train(activations, **SHORT | {"k": 2})


def test_a_batch_that_is_not_finite_is_named(rows: Tensor) -> None:
    batches = [rows[:64].repeat(16, 1)] * 20
    batches[18] = rows[:64].repeat(16, 1) * float("inf")  # beyond what is read for the mean
    with pytest.raises(BadInput, match="is nan at step 19: the activations of this batch are not finite"):
        dictionaries.train(batches, **SHORT | {"batch_size": 1024, "log_every": 1})


def test_checkpoints_of_another_run_are_refused(rows: Tensor, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no checkpoint to resume from"):
        dictionaries.train(rows, **SHORT, out=tmp_path, resume=True)
    dictionaries.train(rows, **SHORT, out=tmp_path, stop_after=5)
    with pytest.raises(BadInput, match="continue it with resume=True"):
        dictionaries.train(rows, **SHORT, out=tmp_path)
    with pytest.raises(BadInput, match="was begun with k = 4, now 5"):
        dictionaries.train(rows, **SHORT | {"k": 5}, out=tmp_path, resume=True)
    with pytest.raises(BadInput, match="was begun with activations"):
        dictionaries.train(rows + 1, **SHORT, out=tmp_path, resume=True)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="is damaged"):
        dictionaries.train(rows, **SHORT, out=tmp_path, resume=True)
