"""One block, the same numbers here, with remote="local", and on a server that has never heard of circuitbench."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import circuitbench as cb
from circuitbench.architectures import ARCHITECTURES
from circuitbench.models.random import random_model
from circuitbench.tracing import Ablate, Add, Scale, capture, generate_text, hold, intervene
from tests.ndif.plugin import NdifServer, save_for_server

FAMILIES = ["mamba", "mamba2", "falcon_h1", "qwen3_next"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[cb.Model]:
    hf = random_model(ARCHITECTURES[request.param], vocab_size=257)
    yield cb.load_model(save_for_server(hf, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(params=["local", "server"])
def remote(request: pytest.FixtureRequest, ndif_server: NdifServer) -> str:
    return "local" if request.param == "local" else ndif_server.url


def in_a_users_own_block(model: cb.Model, remote: str | bool) -> dict[str, torch.Tensor]:
    last = len(model.layers) - 1
    with torch.no_grad():
        with model.trace("how does it compute", remote=remote):
            B = model.layers[0].ssm.B.save()
            model.layers[0].ssm.y[:, 4] = 0
            gated = model.layers[0].ssm.gated.save()
            resid = model.layers[last].resid_post.save()
            logits = model.logits.save()
    return {"B": B, "gated": gated, "resid": resid, "logits": logits}


def test_a_block_gives_the_same_numbers_everywhere(model: cb.Model, remote: str) -> None:
    here = in_a_users_own_block(model, False)
    there = in_a_users_own_block(model, remote)
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_state_edits_are_the_same_everywhere(model: cb.Model, remote: str) -> None:
    def run(where: str | bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            with model.trace("how does it compute", remote=where):
                states = model.layers[0].ssm.edit_state({3: torch.zeros_like}).save()
                logits = model.logits.save()
        return states, logits

    here, there = run(False), run(remote)
    assert (here[0][:, 3] == 0).all()
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


def test_gradients_are_the_same_everywhere(model: cb.Model, remote: str) -> None:
    def run(where: str | bool) -> torch.Tensor:
        with model.trace("how does it compute", remote=where):
            y = model.layers[0].ssm.y
            loss = model.logits[:, -1].square().sum()
            gradient = torch.autograd.grad(loss, y)[0].save()
        return gradient

    here, there = run(False), run(remote)
    largest = here.abs().max().item()
    assert largest > 0
    # The norm of a nearly zero y magnifies float noise (it depends on the number of threads): compare on the
    # gradient's own scale.
    torch.testing.assert_close(there, here, rtol=0, atol=1e-5 * largest)


def test_our_functions_are_the_same_everywhere(model: cb.Model, remote: str) -> None:
    prompts = ["how does it compute", "short"]
    sites = ["layers.*.ssm.gated", "layers.0.ssm.state", "layers.*.resid_post"]
    torch.testing.assert_close(
        dict(capture(model, prompts, sites, remote=remote)),
        dict(capture(model, prompts, sites)),
        rtol=1e-5,
        atol=1e-6,
        equal_nan=True,
    )
    changes = [Ablate("layers.0.ssm.y", positions=[1], mode="mean"), Scale("layers.0.ssm.state", 0.5, positions="last")]
    there, here = (intervene(model, prompts, changes, remote=where) for where in (remote, False))
    assert here.delta_norm > 0
    torch.testing.assert_close(there.logits, here.logits, rtol=1e-5, atol=1e-6, equal_nan=True)
    vector = torch.linspace(-1, 1, model.hf.config.hidden_size)
    plain = generate_text(model, prompts, max_new_tokens=4)
    with hold(model, Add("layers.0.resid_post", vector, strength=3.0)):
        held = [generate_text(model, prompts, max_new_tokens=4, remote=where) for where in (remote, False)]
    assert held[0] == held[1]
    assert generate_text(model, prompts, max_new_tokens=4, remote=remote) == plain
