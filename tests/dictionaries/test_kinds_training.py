"""What training makes of the kinds: the L0 that was asked for, on rows that were not seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from circuitbench import dictionaries
from circuitbench.dictionaries import evaluation
from circuitbench.errors import BadInput
from tests.dictionaries.planted import mean_max_cosine, planted

RUN: dict[str, Any] = {"d_dict": 64, "steps": 300, "batch_size": 256, "progress": False}


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor, Tensor]:
    x, truth = planted(24_000, d_in=32, n_features=64, active=3)
    return x[:-4000], x[-4000:], truth


@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu", "batchtopk", "matryoshka"])
def test_a_target_l0_is_reached(data: tuple[Tensor, Tensor, Tensor], kind: str) -> None:
    train, held_out, truth = data
    wanted: dict[str, Any] = {"k": 4} if kind in ("batchtopk", "matryoshka") else {"l0": 4.0}
    run = RUN | ({"steps": 500} if kind == "jumprelu" else {})  # thresholds move slowly
    dictionary = dictionaries.train(100 * train, kind=kind, **wanted, **run).dictionary
    quality = evaluation.reconstruction(dictionary, 100 * held_out)
    assert quality.l0 == pytest.approx(4, rel=0.05)
    assert quality.fvu < 0.4
    assert mean_max_cosine(truth, dictionary.W_dec) > 0.75


@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu"])
def test_more_weight_on_sparsity_leaves_fewer_features(data: tuple[Tensor, Tensor, Tensor], kind: str) -> None:
    train, held_out, _ = data
    l0 = [
        evaluation.reconstruction(
            dictionaries.train(train, kind=kind, sparsity=weight, **RUN | {"steps": 150}).dictionary, held_out
        ).l0
        for weight in (0.3, 3.0)
    ]
    assert l0[1] < 0.6 * l0[0]


def test_the_weight_resumes_with_the_run(data: tuple[Tensor, Tensor, Tensor], tmp_path: Any) -> None:
    train = data[0][:2000]
    run = RUN | {"steps": 30, "kind": "jumprelu", "l0": 4.0}
    unbroken = dictionaries.train(train, **run)
    dictionaries.train(train, **run, out=tmp_path, stop_after=13)
    resumed = dictionaries.train(train, **run, out=tmp_path, resume=True)
    assert resumed.history == unbroken.history
    assert torch.equal(resumed.dictionary.threshold, unbroken.dictionary.threshold)


def test_one_way_to_say_how_sparse() -> None:
    x = torch.randn(100, 8)
    with pytest.raises(BadInput, match=r"l0=4.0 and sparsity=1.0 were given"):
        dictionaries.train(x, kind="jumprelu", l0=4.0, sparsity=1.0, **RUN)
    with pytest.raises(BadInput, match="has no k"):
        dictionaries.train(x, kind="gated", k=4, **RUN)
    with pytest.raises(BadInput, match="bandwidth=0 was given"):
        dictionaries.train(x, kind="jumprelu", bandwidth=0, **RUN)
