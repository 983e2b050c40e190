"""Dead features begin anew where the error is large, without moments, and are active afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from circuitbench import dictionaries
from circuitbench.dictionaries.recipe import recipe
from circuitbench.dictionaries.resampling import badly_reconstructed
from circuitbench.dictionaries.run import Run
from tests.dictionaries.planted import planted

KINDS = ["standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"]
DEAD = [3, 17, 40]


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return planted(700, d_in=16, n_features=40, active=3)[0]


def settings(kind: str) -> dict:
    return {"kind": kind, "d_dict": 48} | ({"k": 4} if "k" in dictionaries.KINDS[kind].settings_names else {})


def with_dead_features(kind: str, rows: Tensor, **more: object) -> Run:
    """A run of 20 steps whose features `DEAD` cannot be active: their encoders are 0, their biases far below."""
    one = recipe({"x": 16}, **settings(kind), steps=60, batch_size=64, dead_after=64 * 8, log_every=1, **more)
    run = Run(one, {"x": rows})
    for step in range(19):
        with torch.no_grad():
            for name, parameter in run.dictionary.named_parameters():
                if name == "W_enc":
                    parameter[:, DEAD] = 0
                elif name.startswith("b_") and name != "b_dec":
                    parameter[DEAD] = -100
        run.train_on({"x": rows[step * 30 : step * 30 + 64]})
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_resampled_features_come_alive(rows: Tensor, kind: str) -> None:
    run, batch = with_dead_features(kind, rows, resample_every=20), rows[600:664]
    assert (run.rows_since_active[DEAD] > run.recipe.dead_after).all()
    run.train_on({"x": batch})
    assert (run.rows_since_active[DEAD] == 0).all()
    W_enc, W_dec = run.dictionary.W_enc.detach(), run.dictionary.W_dec.detach()
    alive = torch.ones(48, dtype=torch.bool)
    alive[DEAD] = False
    lengths = W_enc.norm(dim=0)
    if kind in ("standard", "gated", "jumprelu"):  # others may have dead features of their own
        torch.testing.assert_close(lengths[DEAD], 0.2 * lengths[alive].mean().expand(3), rtol=1e-4, atol=0)
    torch.testing.assert_close(F.normalize(W_enc, dim=0)[:, DEAD].T, W_dec[DEAD], rtol=0, atol=1e-5)
    for name, parameter in run.dictionary.named_parameters():
        moments = [run.optimizer.state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq") if name != "b_dec"]
        for moment in moments:
            by_feature = moment.T if name == "W_enc" else moment
            assert not by_feature[DEAD].any(), name
            assert by_feature[alive].any(), name
    for step in range(15):
        run.train_on({"x": rows[step * 30 : step * 30 + 64]})
    assert (run.rows_since_active[DEAD] < 64 * 15).all(), "each was active again"


def test_each_points_at_what_one_row_leaves_over(rows: Tensor) -> None:
    run, batch = with_dead_features("standard", rows, resample_every=20), rows[600:664]
    run.train_on({"x": batch})
    live = [feature for feature in range(48) if feature not in DEAD]
    with torch.no_grad():  # the same step without those features: they did not take part
        x = run.scaled({"x": batch})[0]
        before = run.dictionary.encode(x)
        before[:, DEAD] = 0
        error = x - run.dictionary.decode(before)
    cosine = F.normalize(error, dim=1) @ run.dictionary.W_dec.detach()[DEAD].T
    assert (cosine.amax(0) > 0.9999).all() and len(set(cosine.argmax(0).tolist())) == 3
    assert len(live) == 45


def test_rows_are_drawn_by_the_square_of_their_loss() -> None:
    error = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])  # squared: 0, 1, 2, 4
    draws = torch.cat([badly_reconstructed(error, 1, 0, step) for step in range(4000)])
    shares = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0, 1, 4, 16]) / 21, rtol=0, atol=0.025)
    assert sorted(badly_reconstructed(error, 9, 0, 5).tolist()) == [1, 2, 3], (
        "each at most once, and none without error"
    )
    assert torch.equal(badly_reconstructed(error, 2, 1, 5), badly_reconstructed(error, 2, 1, 5))
    assert len(badly_reconstructed(torch.zeros(4, 2), 2, 1, 5)) == 0


def test_there_is_time_left_to_learn() -> None:
    one = recipe({"x": 16}, d_dict=48, k=4, steps=100, batch_size=64, resample_every=30)
    assert [step for step in range(1, 101) if one.resamples_after(step)] == [30, 60]


def test_a_resumed_run_resamples_alike(rows: Tensor, tmp_path: Path) -> None:
    how = {**settings("topk"), "steps": 30, "batch_size": 64, "progress": False, "dead_after": 100, "auxk_weight": 0.0}
    unbroken = dictionaries.train(rows, **how, resample_every=7)
    without = dictionaries.train(rows, **how)
    assert unbroken.history != without.history, "features were dead, and began anew"
    for stop in (7, 13, 22):
        dictionaries.train(rows, **how, resample_every=7, out=tmp_path, stop_after=stop, resume=stop > 7)
    resumed = dictionaries.train(rows, **how, resample_every=7, out=tmp_path, resume=True)
    assert resumed.history == unbroken.history
    tensors = zip(resumed.dictionary.parameters(), unbroken.dictionary.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in tensors)


def test_a_transcoders_features_read_the_row_and_write_what_is_left(rows: Tensor) -> None:
    batch = {"x": rows[:64], "target": rows[:64, :5] @ torch.ones(5, 7) + rows[:64, 3:10]}
    one = recipe({"x": 16, "target": 7}, d_dict=48, k=4, steps=9, batch_size=64, dead_after=1, resample_every=2)
    run = Run(one, batch)
    for _ in range(2):
        with torch.no_grad():
            run.dictionary.W_enc[:, DEAD] = 0
            run.dictionary.b_enc[DEAD] = -100
        run.train_on(batch)
    x, _ = run.scaled(batch)
    centred = x - x.mean(0)
    W_enc = F.normalize(run.dictionary.W_enc.detach()[:, DEAD], dim=0)
    rows_read = (F.normalize(centred, dim=1) @ W_enc).max(0)
    assert (rows_read.values > 0.9999).all()
    with torch.no_grad():
        scores = run.dictionary.preactivations(x, torch.tensor(DEAD))
    torch.testing.assert_close(scores.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
