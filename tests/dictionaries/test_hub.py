"""Dictionaries on the Hub: what is pushed comes back, with a card; over the Hub's client, to a server on this host."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

import circuitbench as cb
from circuitbench import dictionaries
from circuitbench.dictionaries import hub
from circuitbench.errors import BadInput
from tests.dictionaries.examples import example
from tests.dictionaries.hub_server import Hub


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of its own; the client's cache is a new folder."""
    served = Hub()
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, value in {
        "ENDPOINT": served.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": served.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield served
    huggingface_hub.close_session()
    served.shutdown()
    served.server_close()
    thread.join()


def test_what_is_pushed_comes_back(server: Hub) -> None:
    first, second = example("topk", seed=1), example("batchtopk", seed=2)
    url = first.push_to_hub("someone/dictionaries", token="hf_x")
    assert url.startswith(f"{server.url}/someone/dictionaries/commit/")
    second.push_to_hub("someone/dictionaries", subfolder="layers.3/batchtopk", evaluation={"fvu": 0.5}, token="hf_x")
    assert server.commits["someone/dictionaries"][-1].keys() == {
        f"{below}{name}"
        for below in ("", "layers.3/batchtopk/")
        for name in ("cfg.json", "sae_weights.safetensors", "README.md")
    }
    found = dictionaries.from_hub("someone/dictionaries")
    assert found.kind == "topk" and torch.equal(found.W_enc, first.W_enc)
    assert found.metadata == first.metadata
    for other in (
        dictionaries.from_hub("someone/dictionaries", subfolder="layers.3/batchtopk"),
        cb.load_dictionary("someone/dictionaries/layers.3/batchtopk"),
    ):
        assert other.kind == "batchtopk" and torch.equal(other.W_enc, second.W_enc)
        assert other.metadata["evaluation"] == {"fvu": 0.5}


def test_a_revision_is_the_state_of_then(server: Hub) -> None:
    for seed in (1, 2):
        example("topk", seed=seed).push_to_hub("someone/one", token="hf_x")
    then = server.sha("someone/one", 1)
    for found in (
        cb.load_dictionary(f"someone/one@{then}"),
        cb.load_dictionary("someone/one", revision=then),
        dictionaries.from_hub("someone/one", revision=then),
    ):
        assert torch.equal(found.W_enc, example("topk", seed=1).W_enc)
    assert torch.equal(cb.load_dictionary("someone/one").W_enc, example("topk", seed=2).W_enc)
    with pytest.raises(BadInput, match="names a revision, and revision='main' another"):
        cb.load_dictionary(f"someone/one@{then}", revision="main")


def test_what_was_loaded_once_needs_no_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = example("topk")
    expected.push_to_hub("someone/one", token="hf_x")
    cb.load_dictionary("someone/one")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert torch.equal(cb.load_dictionary("someone/one").W_enc, expected.W_enc)
    with pytest.raises(BadInput, match="no folder 'someone/other' here, and it cannot be had from the Hub"):
        cb.load_dictionary("someone/other")


def test_errors_name_what_is_not_there(server: Hub) -> None:
    example("topk").push_to_hub("someone/one", token="hf_x")
    with pytest.raises(BadInput, match="no folder 'someone/two' here, and it cannot be had .*RepositoryNotFoundError"):
        cb.load_dictionary("someone/two")
    with pytest.raises(BadInput, match="'someone/one@yesterday' .*RevisionNotFoundError"):
        cb.load_dictionary("someone/one@yesterday")
    with pytest.raises(BadInput, match="someone/one/deeper holds no dictionary: there is no cfg.json"):
        cb.load_dictionary("someone/one/deeper")
    with pytest.raises(BadInput, match="The Hub refused 'others/one'"):
        example("topk").push_to_hub("others/one", token="hf_x")
    with pytest.raises(BadInput, match="'a b' is no Hub id"):
        dictionaries.from_hub("a b")
    with pytest.raises(BadInput, match="'a b' is no Hub id"):
        example("topk").push_to_hub("a b", token="hf_x")


def test_what_has_the_form_of_an_id(tmp_path: Path) -> None:
    assert all(map(hub.is_id, ["a/b", "a/b/c/d", "a-1/b.c_d", "a/b@v1", "a/b/c@refs/pr/1", "a/b/"]))
    assert not any(map(hub.is_id, ["a", "./a/b", "/a/b", "../a/b", "~/a/b", "a b/c", ""]))
    with pytest.raises(BadInput, match="is not a folder"):
        cb.load_dictionary(Path("someone/one"))  # a path is never looked for on the Hub
    example("topk").save(tmp_path)
    with pytest.raises(BadInput, match="is not on the Hub, and has none"):
        cb.load_dictionary(tmp_path, revision="main")


# ---- the card


def table(text: str) -> dict[str, str]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) > 1}


def test_the_card_says_what_it_is_and_how_good() -> None:
    dictionary = example("topk")
    dictionary.model_name = "state-spaces/mamba2-130m-hf"
    dictionary.metadata = {"text": "a | b", "evaluation": {"fvu": 0.123456, "ce_clean": 1.0, "ce_spliced": 1.5}}
    dictionary.metadata["evaluation"]["ce_ablated"] = {"zero": 3.0, "mean": 0.9}
    text = dictionaries.card(dictionary, "someone/one", subfolder="layers.3")
    header, body = text.split("---\n")[1:3]
    assert "base_model: state-spaces/mamba2-130m-hf\n" in header and "# someone/one/layers.3\n" in body
    assert "of `state-spaces/mamba2-130m-hf`. It reads `layers.3.ssm.gated`." in body
    found = table(body)
    assert found["kind"] == "topk, autoencoder" and found["k"] == "3" and found["d_dict"] == "20"
    assert found["fvu"] == "0.1235" and found["ce_ablated.zero"] == "3" and found["text"] == r"a \| b"
    assert found["ce_recovered.zero"] == "0.75"
    assert "ce_recovered.mean" not in found, "an ablation that does not hurt has nothing to recover"
    assert 'cb.load_dictionary("someone/one/layers.3")' in body
    assert 'SAE.load_from_disk(snapshot_download("someone/one") + "/layers.3")' in body


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"d_out": 4, "skip": True}, "`layers.3.ssm.gated` and reconstructs `layers.3.ssm.out` from it"),
        ({"blocks": {"layers.0.mlp.out": 2, "layers.1.mlp.out": 4}}, "`layers.0.mlp.out`, `layers.1.mlp.out`, one"),
    ],
)
def test_the_card_of_other_forms(arguments: dict, said: str) -> None:
    text = dictionaries.card(example("topk", **arguments), "someone/one")
    assert said in text
    assert ("SAELens has no architecture that does the same" in text) == ("d_out" in arguments)
