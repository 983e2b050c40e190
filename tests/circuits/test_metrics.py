"""Metrics against the model's own loss, and against sums written out."""

from __future__ import annotations

import pytest
import torch

import circuitbench as cb
from circuitbench.circuits import logit_diff, loss, patch_effects, prob
from circuitbench.circuits.metrics import bound
from circuitbench.errors import BadInput
from circuitbench.models.prompts import encode
from circuitbench.tracing.forward import forward


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("zoo:mqar-compiled")


PROMPTS = ["k3 v7 k9 v2 k9", "k3 v7 k3"]


def test_the_loss_is_the_models_own_whatever_the_padding(model: cb.Model) -> None:
    batch = encode(model, PROMPTS)
    found = loss(forward(model, batch)["logits"], batch)
    for prompt, value in zip(PROMPTS, found, strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
        torch.testing.assert_close(value, model.hf(ids, labels=ids).loss, rtol=1e-5, atol=1e-5)


def test_metrics_are_of_the_last_token_of_each_prompt(model: cb.Model) -> None:
    batch = encode(model, PROMPTS)
    logits = forward(model, batch)["logits"]
    ids = [model.tokenizer.convert_tokens_to_ids(word) for word in ("v2", "v7")]
    difference = bound(logit_diff("v2", "v7"), model)(logits, batch)
    probability = bound(prob("v7"), model)(logits, batch)
    for row, prompt in enumerate(PROMPTS):
        alone = model.hf(model.tokenizer(prompt, return_tensors="pt")["input_ids"]).logits[0, -1]
        torch.testing.assert_close(difference[row], alone[ids[0]] - alone[ids[1]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(probability[row], alone.exp()[ids[1]] / alone.exp().sum(), rtol=1e-4, atol=1e-5)
    assert difference[0] > 5 > -5 > difference[1]  # the model solves the task


def test_token_ids_are_as_good_as_texts(model: cb.Model) -> None:
    index = model.tokenizer.convert_tokens_to_ids("v2")
    assert bound(prob("v2"), model) == bound(prob(index), model)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (prob("v2 v7"), "'v2 v7' is 2 tokens of this model"),
        (prob(5_000), "Token id 5000 is outside the vocabulary"),
        ("v2", "metric is a str"),
        (lambda logits, batch: logits[:, -1], "one number a row"),
        (lambda logits, batch: 0.0, "The metric returned float"),
    ],
)
def test_a_metric_that_does_not_fit_says_so(model: cb.Model, metric, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        patch_effects(model, PROMPTS[0], PROMPTS[0], metric=metric)


def test_the_loss_of_a_single_token_is_refused(model: cb.Model) -> None:
    batch = encode(model, ["k3", "k3 v7"])
    with pytest.raises(BadInput, match="at least two tokens"):
        loss(forward(model, batch)["logits"], batch)
