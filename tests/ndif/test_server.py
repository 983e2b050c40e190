"""The test server does what NDIF does, as plain nnsight sees it, and fails in the ways it is told to."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from json import dumps
from pathlib import Path

import httpx
import nnsight
import pydantic
import pytest
import torch
import websocket
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.schema.config import CONFIG
from nnsight.schema.response import ResponseModel
from transformers import GPT2Config, GPT2LMHeadModel, Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

from tests.ndif import helpers
from tests.ndif.helpers import View, imports_functools
from tests.ndif.plugin import SERVER, NdifServer, save_for_server

nnsight.register("tests.ndif.helpers")
PROMPTS = ["the state", "a longer prompt"]
BYTES = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory) -> TransformersModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2}
    return wrapped(Mamba2ForCausalLM(Mamba2Config(**sizes, **BYTES)), tmp_path_factory.mktemp("mamba2"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> TransformersModel:
    torch.manual_seed(0)
    return wrapped(
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, **BYTES)), tmp_path_factory.mktemp("gpt2")
    )


@pytest.fixture(params=["mamba2", "gpt2"])
def model(request: pytest.FixtureRequest) -> TransformersModel:
    return request.getfixturevalue(request.param)


def wrapped(module: PreTrainedModel, folder: Path) -> TransformersModel:
    return TransformersModel(save_for_server(module, folder), task="text-generation", dispatch=True)


def same(here: torch.Tensor, there: torch.Tensor) -> None:
    """Equal up to the float32 noise of another number of threads."""
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


def wait(backend: RemoteBackend) -> dict:
    deadline = time.monotonic() + 20
    while (values := backend()) is None:
        assert time.monotonic() < deadline, f"still {backend.status}"
        time.sleep(0.02)
    return values


def first_block(model: TransformersModel) -> nnsight.Envoy:
    return model.backbone.layers[0] if hasattr(model, "backbone") else model.transformer.h[0]


def test_reading_gives_the_local_numbers(model: TransformersModel, ndif_server: NdifServer) -> None:
    block = first_block(model)
    with model.trace(PROMPTS):
        here, logits_here = block.output.save(), model.output.logits.save()
    with model.trace(PROMPTS, remote=ndif_server.url):
        there, logits_there = block.output.save(), model.output.logits.save()
    same(here, there)
    same(logits_here, logits_there)


def test_writing_changes_the_logits_as_it_does_locally(model: TransformersModel, ndif_server: NdifServer) -> None:
    block = first_block(model)
    with model.trace(PROMPTS[0]):
        plain = model.output.logits.save()
    with model.trace(PROMPTS[0]):
        block.output[:, 2] = 0
        here = model.output.logits.save()
    with model.trace(PROMPTS[0], remote=ndif_server.url):
        block.output[:, 2] = 0
        there = model.output.logits.save()
    same(here, there)
    assert not torch.equal(plain[:, 2:], here[:, 2:])
    assert torch.equal(plain[:, :2], here[:, :2])


def test_gradients_are_the_local_ones(model: TransformersModel, ndif_server: NdifServer) -> None:
    gradients = []
    for remote in (False, ndif_server.url):
        with model.trace(PROMPTS[0], remote=remote):
            hidden = first_block(model).output
            gradient = torch.autograd.grad(model.output.logits[0, -1, 7], hidden)[0].save()
        gradients.append(gradient)
    assert gradients[0].abs().max() > 0
    same(*gradients)


def test_a_nested_backward_block_works_twice_from_one_file(model: TransformersModel, ndif_server: NdifServer) -> None:
    for _ in range(2):
        with model.trace(PROMPTS[0], remote=ndif_server.url):
            hidden = first_block(model).output
            with model.output.logits[0, -1, 7].backward():
                gradient = hidden.grad.save()
        assert gradient.abs().max() > 0


def test_generation_gives_the_local_tokens(model: TransformersModel, ndif_server: NdifServer) -> None:
    runs = []
    for remote in (False, ndif_server.url):
        with model.generate(PROMPTS[0], max_new_tokens=4, min_new_tokens=4, do_sample=False, remote=remote) as tracer:
            for _ in tracer.iter[:4]:
                first_block(model).output[:, -1] *= 2
            tokens = tracer.result.save()
        runs.append(tokens)
    assert runs[0].shape[1] == len(PROMPTS[0]) + 4
    assert torch.equal(*runs)


def test_invokes_of_different_lengths_keep_their_rows(model: TransformersModel, ndif_server: NdifServer) -> None:
    rows = []
    for remote in (False, ndif_server.url):
        with model.trace(remote=remote) as tracer:
            with tracer.invoke(PROMPTS):
                two = first_block(model).output.save()
            with tracer.invoke(PROMPTS[0]):
                one = first_block(model).output.save()
        rows.append(torch.cat([two, one]))
    assert rows[0].shape[0] == 3
    same(*rows)


def test_a_registered_helper_travels_with_what_it_calls(mamba2: TransformersModel, ndif_server: NdifServer) -> None:
    with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
        view = View(first_block(mamba2))
        normed = view.normed.save()
        view.normed = torch.zeros_like(normed)
        logits = mamba2.output.logits.save()
    assert torch.allclose(normed.norm(dim=-1), torch.ones(()), atol=1e-5)
    assert torch.equal(logits[0, 0], logits[0, -1])


def test_large_results_come_by_address_and_small_ones_on_the_socket(
    mamba2: TransformersModel, ndif_server: NdifServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = []
    download = RemoteBackend.download_result
    monkeypatch.setattr(
        RemoteBackend, "download_result", lambda self, data: forms.append(type(data)) or download(self, data)
    )
    for size in (10, 10**6):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            noise = torch.rand(size).save()
        assert noise.shape == (size,)
    assert forms == [bytes, str]


def test_what_the_block_prints_is_sent_back(mamba2: TransformersModel, ndif_server: NdifServer) -> None:
    class Listening(RemoteBackend):
        def note(self, response: ResponseModel) -> bool:
            lines.append((response.status.value, response.description))
            return super().note(response)

    lines: list[tuple[str, str]] = []
    with mamba2.trace(PROMPTS[0], backend=Listening(mamba2.to_model_key(), host=ndif_server.url)):
        print("seen from afar")
    assert ("LOG", "seen from afar") in lines


def test_an_import_outside_the_whitelist_is_refused(mamba2: TransformersModel, ndif_server: NdifServer) -> None:
    with pytest.raises(RemoteError, match="imports 'textwrap', which is not allowed"):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            import textwrap

            textwrap.dedent("")
    with pytest.raises(RemoteError, match="imports 'transformers.models', which is not allowed"):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            from transformers.models import mamba2
    with pytest.raises(RemoteError, match="imports 'os', which is not allowed"):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            __import__("os")


def test_an_import_inside_a_helper_is_refused_too(mamba2: TransformersModel, ndif_server: NdifServer) -> None:
    with pytest.raises(RemoteError, match="imports 'functools', which is not allowed"):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            imports_functools()


def test_a_reference_to_a_module_outside_the_whitelist_is_refused(
    mamba2: TransformersModel, ndif_server: NdifServer
) -> None:
    with pytest.raises(RemoteError, match="refers to module 'json', which is not allowed"):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            json.dumps(1)
    with pytest.raises(RemoteError, match="refers to 'dumps' of module 'json', which is not allowed"):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            dumps(1)


def test_a_module_that_would_travel_whole_is_refused(mamba2: TransformersModel, ndif_server: NdifServer) -> None:
    # Its loader and its spec would travel too: functions and classes are to be named, not their module.
    with pytest.raises(RemoteError, match="refers to 'SourceFileLoader' of module"):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            helpers.unit(first_block(mamba2).output).save()


def test_whitelisted_imports_and_those_of_libraries_pass(mamba2: TransformersModel, ndif_server: NdifServer) -> None:
    with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
        import math
        from collections import OrderedDict

        import einops
        import torch.nn.functional as F

        rows = einops.rearrange(first_block(mamba2).output, "b t d -> (b t) d")
        saved = OrderedDict(rows=F.relu(rows) * math.pi, image=mamba2.config.to_json_string()).save()
        import sympy.stats  # loads a hundred modules of its own, json among them

        sympy.stats.Die("D", 6)
    assert saved["rows"].shape == (len(PROMPTS[0]), 32)


def test_the_server_refuses_to_run_where_the_package_can_be_imported(tmp_path) -> None:
    (tmp_path / "circuitbench").mkdir()
    (tmp_path / "circuitbench" / "__init__.py").touch()
    run = subprocess.run(
        [sys.executable, "-s", SERVER], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True
    )
    assert run.returncode == 1
    assert b"would prove nothing" in run.stderr


def test_a_job_can_be_submitted_polled_and_resumed_by_id(mamba2: TransformersModel, ndif_server: NdifServer) -> None:
    with mamba2.trace(PROMPTS[0]):
        here = mamba2.output.logits.save()
    with ndif_server.misbehaving(delay=0.3):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url, blocking=False) as tracer:
            there = mamba2.output.logits.save()  # noqa: F841 (comes back in the dictionary)
    assert tracer.backend() is None
    same(wait(tracer.backend)["there"], here)
    another = RemoteBackend(mamba2.to_model_key(), host=ndif_server.url, blocking=False, job_id=tracer.backend.job_id)
    same(another()["there"], here)


@pytest.mark.parametrize(
    ("how", "error"), [("close", pydantic.ValidationError), ("abort", websocket.WebSocketConnectionClosedException)]
)
def test_a_job_outlives_its_websocket(
    mamba2: TransformersModel, ndif_server: NdifServer, how: str, error: type[Exception]
) -> None:
    class Remembering(RemoteBackend):
        def note(self, response: ResponseModel) -> bool:
            self.job_id = response.id
            return super().note(response)

    backend = Remembering(mamba2.to_model_key(), host=ndif_server.url)
    with ndif_server.misbehaving(drop=how, delay=0.3), pytest.raises(error):
        with mamba2.trace(PROMPTS[0], backend=backend):
            logits = mamba2.output.logits.save()  # noqa: F841 (comes back in the dictionary)
    backend.blocking = False
    assert wait(backend)["logits"].shape == (1, len(PROMPTS[0]), 257)


def test_a_server_that_died_is_replaced(mamba2: TransformersModel, ndif_server: NdifServer) -> None:
    with ndif_server.misbehaving(die=True), pytest.raises(websocket.WebSocketConnectionClosedException):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            mamba2.output.logits.save()
    with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
        logits = mamba2.output.logits.save()
    assert logits.shape == (1, len(PROMPTS[0]), 257)


def test_a_refused_subscription_is_a_403(mamba2: TransformersModel, ndif_server: NdifServer) -> None:
    with ndif_server.misbehaving(refuse_subscription=True):
        with pytest.raises(websocket.WebSocketBadStatusException, match="403"):
            with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
                mamba2.output.logits.save()


def test_an_error_arrives_with_its_description(mamba2: TransformersModel, ndif_server: NdifServer) -> None:
    with ndif_server.misbehaving(error="the GPU is on fire"), pytest.raises(RemoteError, match="the GPU is on fire"):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            mamba2.output.logits.save()
    with pytest.raises(RemoteError, match=r"test_server.py(?s:.*)IndexError: index 1000 is out of bounds"):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            mamba2.output.logits[:, 1000].save()


def test_a_revoked_key_is_refused(
    mamba2: TransformersModel, ndif_server: NdifServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONFIG.API, "APIKEY", "revoked")
    with pytest.raises(RemoteError, match="Missing or invalid API key"):
        with mamba2.trace(PROMPTS[0], remote=ndif_server.url):
            mamba2.output.logits.save()


def test_the_environment_is_the_one_reported_or_the_one_asked_for(
    ndif_server: NdifServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONFIG.API, "HOST", ndif_server.url)
    nnsight.ndif.get_remote_env(force_refresh=True)
    assert nnsight.compare().critical_mismatches == {}
    with ndif_server.misbehaving(packages={"transformers": "5.0.0"}):
        nnsight.ndif.get_remote_env(force_refresh=True)
        assert nnsight.compare().critical_mismatches["transformers"]["remote"] == "5.0.0"


def test_an_unknown_job_has_no_response(ndif_server: NdifServer) -> None:
    assert httpx.get(f"{ndif_server.url}/response/nonsense").status_code == 404
