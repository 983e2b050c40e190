"""The demo on the shipped model, with little text: what the page says is what is measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import circuitbench as cb
from circuitbench import demo
from circuitbench.dictionaries import load_dictionary
from circuitbench.errors import BadInput
from circuitbench.models.zoo import corpus
from tests.viewer.pages import parse

TINY = demo.Size(train=80_000, held_out=30_000, judged=6_000, steps=60, expansion=2, cards=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FAST", TINY)
        page = demo.run_demo(fast=True, model="zoo:pylm-hybrid", text=None, out=out, progress=False)
    assert page == out / "report.html"
    return out


@pytest.fixture(scope="module")
def findings(folder: Path) -> dict:
    return json.loads((folder / "findings.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("zoo:pylm-hybrid")


def test_the_page_asks_for_nothing_outside_itself(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    tree = parse(page)
    targets = [node.attributes[name] for node in tree.every() for name in ("src", "href") if name in node.attributes]
    assert targets and all(target.startswith(("#", "data:")) for target in targets)
    assert not re.search(r"@import|url\((?!#|\"?data:)", page)


def test_the_page_tells_the_whole_story(folder: Path, findings: dict) -> None:
    tree = parse((folder / "report.html").read_text(encoding="utf-8"))
    sections = {node.attributes["id"]: node.text for node in tree.all("section")}
    assert list(sections) == [
        "model", "checks", "effects", "training", "evaluation", "features", "steering", "reproduce"
    ]  # fmt: skip
    assert len(tree.all("table", class_="cb-heat")) == 7  # two states, mixers and MLPs; states, mixers and MLPs again
    assert f"{findings['evaluation']['fvu']:.3f}" in sections["evaluation"]
    feature = f"eature {findings['steering']['feature']}"
    assert all(feature in text for text in (sections["features"], sections["steering"], tree.all("header")[0].text))
    assert findings["steering"]["texts"][0][3].split("\n")[0] in sections["steering"]


def test_effects_are_those_of_runs_made_by_hand(findings: dict, model: cb.Model) -> None:
    contrast = findings["contrasts"][0]
    ids = [model.tokenizer(contrast[name])["input_ids"][0] for name in ("answer", "wrong")]

    def preference(logits: torch.Tensor) -> float:
        return (logits[0, -1, ids[0]] - logits[0, -1, ids[1]]).item()

    best = findings["effects"][0]["top"][0]
    assert findings["effects"][0]["site"] == "ssm.state"
    scan = model.layers[best["layer"]].ssm
    with torch.no_grad():
        with model.trace(contrast["corrupt"]):
            state = scan.state[:, best["position"]].clone().save()
            corrupt = model.logits.save()
        with model.trace(contrast["clean"]):
            clean = model.logits.save()
        with model.trace(contrast["clean"]):
            scan.edit_state({best["position"]: state})
            patched = model.logits.save()
    assert contrast["base"] == pytest.approx(preference(clean), abs=1e-3) and contrast["base"] > 0
    assert contrast["donor"] == pytest.approx(preference(corrupt), abs=1e-3) and contrast["donor"] < 0
    effect = preference(patched) - preference(clean)
    assert best["value"] == pytest.approx(effect, abs=1e-3)
    whole = preference(corrupt) - preference(clean)
    assert contrast["carried_by_one_state"] == pytest.approx(effect / whole, abs=1e-3)
    assert contrast["carried_by_one_state"] > 0.1  # the open bracket is in the state …
    copied = [one for one in findings["contrasts"] if one["answer"] in ("path", "name", "file")]
    assert copied and all(abs(one["carried_by_one_state"]) < 0.03 for one in copied)  # … a name is not


def test_the_texts_are_what_steering_by_hand_gives(folder: Path, findings: dict, model: cb.Model) -> None:
    steering = findings["steering"]
    sae = load_dictionary(folder / "dictionary")
    assert (sae.site, sae.model_name) == (findings["site"], "zoo:pylm-hybrid")
    _, prompt, plain, steered = steering["texts"][0]
    assert model.generate_text(prompt, max_new_tokens=24) == plain
    strength = -steering["factor"] * steering["largest"]
    with cb.steer(model, sae, steering["feature"], strength=strength):
        assert model.generate_text(prompt, max_new_tokens=24) == steered
    assert steered != plain and 1 <= steering["turned"] <= steering["family"]
    assert steering["cost"] < 1


def test_any_text_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "FAST", TINY)
    text = tmp_path / "text.py"
    whole = "\n".join(document.text for document in corpus.split()[1])
    text.write_text(whole[:60_000], encoding="utf-8")
    train, held_out, what = demo.texts(str(text), TINY)
    assert what.startswith("text.py") and train == [whole[:48_000]] and held_out == [whole[48_000:60_000]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "random:mamba2"}, "random:mamba2 reads words of its own, not text"),
        ({"model": "zoo:mqar-mamba2"}, "zoo:mqar-mamba2 reads words of its own, not text"),
        ({"text": "nowhere.txt"}, "--text nowhere.txt cannot be read"),
        ({"text": "short.txt"}, "has 5 characters"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(
    given: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    given = {"fast": True, "model": "zoo:pylm-hybrid", "text": None, "out": tmp_path, "progress": False} | given
    with pytest.raises(BadInput, match=message):
        demo.run_demo(**given)
    assert not (tmp_path / "report.html").exists()


def test_a_model_without_recurrence_is_refused() -> None:
    with pytest.raises(BadInput, match=r"gpt2 has no recurrent layer \(attention only\)"):
        demo.last_scan(cb.load_model("random:gpt2"), "gpt2")
    assert demo.last_scan(cb.load_model("random:jamba"), "jamba") == 2
