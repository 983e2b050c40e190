"""Many dictionaries from one stream: grids, names and folders, failures, and runs that were killed out of step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries.checkpoints import CHECKPOINT
from circuitbench.errors import BadInput, TrainingFailed
from tests.dictionaries.planted import planted

HOW = {"steps": 16, "batch_size": 64, "progress": False}


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return planted(700, d_in=16, n_features=40, active=3)[0]


def same(a: dictionaries.TrainResult, b: dictionaries.TrainResult) -> bool:
    tensors = zip(a.dictionary.parameters(), b.dictionary.parameters(), strict=True)
    return a.history == b.history and all(torch.equal(x, y) for x, y in tensors)


def test_a_grid_has_every_combination_once() -> None:
    recipes = dictionaries.grid(site=["a", "b"], kind=["topk", "standard"], k=[16, 32], seed=[0, 1], expansion=8)
    topk = [(site, k, seed) for site in "ab" for k in (16, 32) for seed in (0, 1)]
    assert [(r["site"], r["k"], r["seed"]) for r in recipes if r["kind"] == "topk"] == topk
    standard = [(r["site"], r["seed"]) for r in recipes if r["kind"] == "standard"]
    assert sorted(standard) == [(site, seed) for site in "ab" for seed in (0, 1)], "a kind without k is there once"
    assert all(r["expansion"] == 8 for r in recipes)
    assert len({r["name"] for r in recipes}) == len(recipes) == 12
    assert recipes[0]["name"] == "a-topk-k16-seed0"


def test_a_grid_of_one_has_no_name_and_tuples_are_values() -> None:
    assert dictionaries.grid(k=4, d_dict=48) == [{"k": 4, "d_dict": 48}]
    recipes = dictionaries.grid(sites=[("a", "b"), ("b", "c")], d_dict=48)
    assert [r["sites"] for r in recipes] == [("a", "b"), ("b", "c")]
    assert [r["name"] for r in recipes] == ["a+b", "b+c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": []}, "k=\\[\\] was given"),
        ({"kind": "standard", "k": [1, 2]}, "k=\\[1, 2\\] was given; 'standard' has none"),
        ({"kind": ["topk", "nonesuch"]}, "kind='nonesuch' is not a kind"),
    ],
)
def test_wrong_grids_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        dictionaries.grid(**arguments)


def test_each_of_many_is_as_if_it_were_alone(rows: Tensor, tmp_path: Path) -> None:
    sites = {"a": rows, "b": rows[:, :9] ** 2}
    recipes = dictionaries.grid(site=["a", "b"], kind=["topk", "standard"], k=[4], seed=[3], d_dict=48)
    results = dictionaries.train_many(sites, recipes, **HOW, out=tmp_path)
    assert len(results) == 4
    for recipe, result in zip(recipes, results, strict=True):
        alone = {name: value for name, value in recipe.items() if name not in ("name", "seed", "site")}
        # The order of rows is that of the common seed; a tensor alone has another fingerprint, and no more.
        batches = dictionaries.train_many(sites, [{**alone, "seed": recipe["seed"], "site": recipe["site"]}], **HOW)
        assert same(result, batches[0])
        assert result.dictionary.site == recipe["site"]
        loaded = dictionaries.load_dictionary(tmp_path / recipe["name"])
        assert torch.equal(loaded.W_dec, result.dictionary.W_dec) and loaded.site == recipe["site"]


def test_a_failure_has_its_name_and_the_others_are_trained(rows: Tensor, tmp_path: Path) -> None:
    recipes = [{"d_dict": 48, "k": 4, "lr": lr, "name": name} for name, lr in (("good", 0.01), ("bad", 1e30))]
    with pytest.raises(TrainingFailed, match=r"1 of 2 dictionaries failed.*bad: the loss is .* is too high") as caught:
        dictionaries.train_many(rows, recipes, **HOW, out=tmp_path)
    assert list(caught.value.failures) == ["bad"]
    good, bad = caught.value.results
    assert bad is None and same(good, dictionaries.train(rows, d_dict=48, k=4, lr=0.01, **HOW))
    assert same(dictionaries.train_many(rows, recipes[:1], **HOW, out=[tmp_path / "good"], resume=True)[0], good)


def test_runs_that_were_killed_out_of_step_catch_up(rows: Tensor, tmp_path: Path) -> None:
    """A kill between two checkpoints of many leaves some older than others, some finished, and some not begun."""
    recipes = dictionaries.grid(kind=["topk", "standard", "batchtopk"], k=4, d_dict=48)
    whole = dictionaries.train_many(rows, recipes, **HOW)
    names = [recipe["name"] for recipe in recipes]
    dictionaries.train_many(rows, recipes, **HOW, out=tmp_path, stop_after=6)
    shutil.copy(tmp_path / names[0] / CHECKPOINT, tmp_path / "older")
    dictionaries.train_many(rows, recipes, **HOW, out=tmp_path, stop_after=13, resume=True)
    (tmp_path / "older").rename(tmp_path / names[0] / CHECKPOINT)
    (tmp_path / names[2] / CHECKPOINT).unlink()
    resumed = dictionaries.train_many(rows, recipes, **HOW, out=tmp_path, resume=True)
    assert all(same(a, b) for a, b in zip(resumed, whole, strict=True))
    dictionaries.train_many(rows, recipes, **HOW, out=tmp_path, stop_after=6)  # begun anew, and one finished alone
    dictionaries.train_many(rows, recipes[:1], **HOW, out=[tmp_path / names[0]], resume=True)
    resumed = dictionaries.train_many(rows, recipes, **HOW, out=tmp_path, resume=True)
    assert all(same(a, b) for a, b in zip(resumed, whole, strict=True))


def test_names_and_folders_are_one_each(rows: Tensor, tmp_path: Path) -> None:
    two = [{"d_dict": 48, "k": 4}, {"d_dict": 48, "k": 5}]
    with pytest.raises(BadInput, match="give each its own name"):
        dictionaries.train_many(rows, [{**one, "name": "same"} for one in two], **HOW)
    with pytest.raises(BadInput, match="2 recipes were given and out="):
        dictionaries.train_many(rows, two, **HOW, out=[tmp_path])
    with pytest.raises(BadInput, match="1-topk: k=99 was given"):
        dictionaries.train_many(rows, [two[0], {"d_dict": 48, "k": 99}], **HOW)


@pytest.mark.parametrize("kind", sorted(set(dictionaries.KINDS) - {"topk"}))  # that one is resumed in test_training
def test_every_kind_resumes_to_the_last_bit(rows: Tensor, tmp_path: Path, kind: str) -> None:
    cls = dictionaries.KINDS[kind]
    settings = {"kind": kind, "d_dict": 48, "dead_after": 100, "resample_every": 6, "max_grad_norm": 1.0}
    settings |= ({"k": 4, "k_start": 9} if "k" in cls.settings_names else {}) | (
        {"shape": (4, 4)} if "shape" in cls.settings_names else {}
    )
    unbroken = dictionaries.train(rows, **settings, **HOW)
    for stop in (1, 11):
        dictionaries.train(rows, **settings, **HOW, out=tmp_path, stop_after=stop, resume=stop > 1)
    resumed = dictionaries.train(rows, **settings, **HOW, out=tmp_path, resume=True)
    assert same(resumed, unbroken)
    buffers = zip(resumed.dictionary.buffers(), unbroken.dictionary.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in buffers)
