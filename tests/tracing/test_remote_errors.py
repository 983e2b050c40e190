"""What goes wrong with a server is said in one sentence, and nothing that was returned is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from nnsight.schema.config import CONFIG

import circuitbench as cb
from circuitbench.architectures import ARCHITECTURES
from circuitbench.models import remote as remote_module
from circuitbench.models.random import random_model
from tests.ndif.plugin import NdifServer, save_for_server

PROMPTS = ["how does it compute", "short", "a third one"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> cb.Model:
    hf = random_model(ARCHITECTURES["mamba2"], vocab_size=257)
    return cb.load_model(save_for_server(hf, tmp_path_factory.mktemp("mamba2")))


@pytest.fixture(autouse=True)
def every_server_is_new(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote_module, "_CHECKED", set())
    yield


def test_a_server_that_is_not_there(model: cb.Model) -> None:
    with pytest.raises(cb.RemoteError, match=r"http://127\.0\.0\.1:9 cannot be reached .* remote=False"):
        cb.capture(model, PROMPTS, "embed", remote="http://127.0.0.1:9")
    with pytest.raises(cb.RemoteError, match="cannot be reached"):
        with model.trace(PROMPTS[0], remote="http://127.0.0.1:9"):
            model.logits.save()


@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_lost_connection_names_the_job_and_the_job_can_be_fetched(
    model: cb.Model, ndif_server: NdifServer, how: str
) -> None:
    with torch.no_grad():
        with model.trace(PROMPTS[0]):
            here = model.layers[1].ssm.y.save()
    lost_connection = pytest.raises(cb.RemoteError, match="was lost while job")
    with ndif_server.misbehaving(drop=how, delay=0.2), lost_connection as lost:
        with torch.no_grad():
            with model.trace(PROMPTS[0], remote=ndif_server.url):
                y = model.layers[1].ssm.y.save()  # noqa: F841 (comes back by name)
    assert lost.value.job_id is not None
    values = cb.resume(model, lost.value.job_id, remote=ndif_server.url, timeout=30.0)
    torch.testing.assert_close(values["y"], here)


def test_batches_that_came_back_are_kept_when_a_later_one_fails(model: cb.Model, ndif_server: NdifServer) -> None:
    cb.capture(model, PROMPTS[:1], "embed", remote=ndif_server.url)
    whole = cb.capture(model, PROMPTS, "layers.0.ssm.gated")
    calls = 0
    original = remote_module.JobBackend.__call__

    def failing_from_the_third_on(self: remote_module.JobBackend, tracer: object = None) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise cb.RemoteError("the server has had enough")
        return original(self, tracer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_module.JobBackend, "__call__", failing_from_the_third_on)
        with pytest.raises(cb.RemoteError, match="had enough") as failed:
            cb.capture(model, PROMPTS, "layers.0.ssm.gated", batch_size=1, remote=ndif_server.url)
    kept = failed.value.partial
    assert kept.lengths.tolist() == whole.lengths[:2].tolist()
    torch.testing.assert_close(
        kept["layers.0.ssm.gated"], whole["layers.0.ssm.gated"][:2], rtol=1e-5, atol=1e-6, equal_nan=True
    )


def test_an_error_on_the_server_arrives_with_its_reason(model: cb.Model, ndif_server: NdifServer) -> None:
    with ndif_server.misbehaving(error="the GPU is on fire"):
        with pytest.raises(cb.RemoteError, match=r"Job \S+ failed on http\S+: .*the GPU is on fire\n"):
            cb.generate_text(model, PROMPTS[0], remote=ndif_server.url)
    with pytest.raises(cb.RemoteError, match=r"failed on .*layers\.0 \(ssm\) has no site 'attn'; it has"):
        with model.trace(PROMPTS[0], remote=ndif_server.url):
            model.layers[0].attn.q.save()


def test_a_key_that_is_refused(model: cb.Model, ndif_server: NdifServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONFIG.API, "APIKEY", "revoked")
    with pytest.raises(cb.RemoteError, match="did not take the job: .*API key"):
        cb.capture(model, PROMPTS, "embed", remote=ndif_server.url)


def test_a_server_with_another_transformers_is_refused_until_accepted(model: cb.Model, ndif_server: NdifServer) -> None:
    with ndif_server.misbehaving(packages={"transformers": "5.22.2"}):
        with pytest.raises(cb.VersionMismatch, match=r"runs transformers 5\.22\.2, here it is .* accept it with"):
            cb.capture(model, PROMPTS, "embed", remote=ndif_server.url)
        remote_module.accept(ndif_server.url)
        assert cb.capture(model, PROMPTS, "embed", remote=ndif_server.url)["embed"].shape[0] == 3


def test_an_unknown_job(model: cb.Model, ndif_server: NdifServer) -> None:
    with pytest.raises(cb.RemoteError, match="knows no job 'nonsense'"):
        cb.resume(model, "nonsense", remote=ndif_server.url)


def test_a_model_built_in_memory_has_no_name_on_a_server(ndif_server: NdifServer) -> None:
    with pytest.raises(cb.BadInput, match="built in memory"):
        cb.capture(cb.load_model("random:mamba2"), "5 6 7", "embed", remote=ndif_server.url)


def test_not_waiting_gives_the_same_in_the_end(model: cb.Model, ndif_server: NdifServer) -> None:
    url = ndif_server.url
    change = cb.Scale("layers.0.ssm.y", 0.5)
    captured = cb.capture(model, PROMPTS, "layers.*.ssm.y", batch_size=2, remote=url, blocking=False)
    changed = cb.intervene(model, PROMPTS, change, remote=url, blocking=False)
    written = cb.generate_text(model, PROMPTS, max_new_tokens=3, temperature=1.0, seed=5, remote=url, blocking=False)
    assert len(captured.job_ids) == 2
    close = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(
        dict(captured.result(30.0)), dict(cb.capture(model, PROMPTS, "layers.*.ssm.y", batch_size=2)), **close
    )
    torch.testing.assert_close(changed.result(30.0).logits, cb.intervene(model, PROMPTS, change).logits, **close)
    assert written.result(30.0) == cb.generate_text(model, PROMPTS, max_new_tokens=3, temperature=1.0, seed=5)
    assert captured.done()
    with pytest.raises(cb.BadInput, match="blocking=False needs a server"):
        cb.capture(model, PROMPTS, "embed", blocking=False)
