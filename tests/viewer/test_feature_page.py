"""The page of features: complete, closed to the outside, and safe whatever a token says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitbench.errors import BadInput
from circuitbench.explain import FeatureExamples
from circuitbench.viewer import feature_page as pages
from tests.viewer.pages import parse
from tests.viewer.test_report import CHROMIUM, HOSTILE, in_browser

END = "</script><script>document.title = 'run'</script><!--<script>"


def examples(n_features: int = 6, words: dict[int, str] | None = None) -> FeatureExamples:
    """Examples of features of which the last is never active; feature f promotes token f."""
    out = FeatureExamples(n_features, n=3, before=3, after=2)
    activations = torch.rand(4, 12, n_features) * torch.arange(1, n_features + 1)
    activations *= torch.rand_like(activations) > 0.6
    activations[..., -1] = 0
    out.add(activations, torch.randint(10, (4, 12)))
    ids = torch.stack([torch.arange(n_features) % 10, (torch.arange(n_features) + 1) % 10], 1).int()
    out.promoted, out.suppressed = (ids, torch.tensor([[2.0, 1.0]] * n_features)), (ids.flip(1), -ids.float() - 1)
    out.words = {i: f" word{i}" for i in range(10)} | (words or {})
    out.about = {"model": "m", "site": "layers.1.ssm.gated", "kind": "topk", "settings": {"k": 3}, "text": "a text"}
    return out


def data_of(page: str) -> dict[str, Any]:
    (node,) = [node for node in parse(page).all("script") if node.attributes.get("id") == "data"]
    return json.loads(node.text)


def test_the_page_holds_what_the_examples_do(tmp_path: Path) -> None:
    given = examples()
    path = pages.feature_page(given, tmp_path / "new" / "features.html")
    assert [one.name for one in path.parent.iterdir()] == ["features.html"]
    page = path.read_text(encoding="utf-8")
    assert parse(page).all("h1")[0].text == "layers.1.ssm.gated"
    assert "6 features of a dictionary (topk, k 3) at layers.1.ssm.gated of m; on 48 tokens, a text" in page
    data = data_of(page)
    for row in data["features"]:
        f = row["i"]
        assert row["n"] == given.active_tokens[f]
        assert row["d"] == pytest.approx(given.density[f].item(), rel=1e-3)
        counts = dict(zip(row["h"][::2], row["h"][1::2], strict=True))
        assert [counts.get(b, 0) for b in range(data["bins"])] == given.histogram[f].tolist()
        for short, example in zip(row["t"], given.of(f), strict=True):
            ids, active, peak, sequence, position = short
            assert [data["raw"][i] for i in ids] == [given.words[i] for i in example.token_ids]
            values = [0.0] * len(ids)
            for place, value in zip(active[::2], active[1::2], strict=True):
                values[place] = value
            assert values == pytest.approx(example.activations, rel=1e-3)
            assert (peak, sequence, position) == (example.peak, example.sequence, example.position)
        assert [low for low, _, _ in row["x"]] == [low for low, _, _ in given.across(f)]
        assert data["raw"][row["p"][0][0]] == f" word{f}" and row["p"][1] == [2, 1]
    assert data["words"][0][1].startswith("·word")


def test_some_features_alone() -> None:
    assert [row["i"] for row in data_of(pages.render(examples(), [4, 1]))["features"]] == [4, 1]
    assert "2 of 6 features" in pages.render(examples(), [4, 1])
    with pytest.raises(BadInput, match="feature 6 was asked for; there are 0 to 5"):
        pages.render(examples(), [6])
    with pytest.raises(BadInput, match="names no feature"):
        pages.render(examples(), [])
    nameless = examples()
    nameless.words = {}
    with pytest.raises(BadInput, match="do not tell the text of token"):
        pages.render(nameless)


@pytest.mark.parametrize("token", [END, HOSTILE, "\u2028\ud800\x00", "\n        "])
def test_no_token_ends_the_data_or_makes_an_element(token: str) -> None:
    page = pages.render(examples(words=dict.fromkeys(range(10), token)), title=token.replace("\ud800", ""))
    page.encode("utf-8")
    plain = pages.render(examples())
    assert [node.tag for node in parse(page).every()] == [node.tag for node in parse(plain).every()]
    if "\ud800" not in token:
        assert data_of(page)["raw"] == [token] * len(data_of(page)["raw"])


def test_the_page_names_nothing_outside_itself() -> None:
    page = pages.render(examples())
    for node in parse(page).every():
        assert not {"src", "srcset", "action", "data", "poster"} & set(node.attributes)
        assert re.match(r"#|data:", node.attributes.get("href", "#"))
    without = page.replace("http://www.w3.org/2000/svg", "")  # a name, which nothing is asked from
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|import\(", without)


DRIVER = """<script>addEventListener("load", () => setTimeout(() => {
  const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const type = (text) => { find.value = text; find.dispatchEvent(new Event("input")); };
  const seen = { first: document.querySelector("h2").textContent, rows: document.querySelectorAll(".item").length };
  press(list, "ArrowDown");
  seen.second = document.querySelector("h2").textContent;
  type("4");
  seen.index = document.querySelector("h2").textContent;
  scope.value = "up"; scope.dispatchEvent(new Event("change"));
  type("word3");
  seen.promoted = [...document.querySelectorAll(".item b")].map((node) => node.textContent).sort();
  type(""); sort.value = "index"; sort.dispatchEvent(new Event("change"));
  seen.sorted = [...document.querySelectorAll(".item b")].map((node) => node.textContent).slice(0, 4);
  list.querySelector(".item").click();
  const text = document.querySelector(".cb-text");
  press(text, "ArrowRight");
  seen.tip = document.querySelector(".tip").textContent;
  seen.bars = document.querySelectorAll("rect").length;
  seen.marks = document.querySelectorAll("img, script:not([id])").length;
  seen.asked = performance.getEntriesByType("resource").map((entry) => entry.name);
  const started = performance.now();
  for (let i = 0; i < 20; i++) { press(list, "ArrowDown"); type(i % 2 ? "word" : ""); }
  seen.each = (performance.now() - started) / 20;
  document.title = JSON.stringify(seen);
}, 0))</script>"""


def driven(given: FeatureExamples, folder: Path) -> dict[str, Any]:
    """What a browser shows when the page is used by keyboard."""
    page = re.sub(r"<meta http-equiv[^>]*>", "", pages.render(given)).replace("</body>", DRIVER + "</body>")
    return json.loads(in_browser(page, folder).all("title")[0].text)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_lists_finds_and_reads(tmp_path: Path) -> None:
    given = examples(words={0: END})
    seen = driven(given, tmp_path)
    order = given.values[:, 0].argsort(descending=True).tolist()
    assert seen["first"] == f"Feature {order[0]}" and seen["second"] == f"Feature {order[1]}"
    assert seen["rows"] == 6 and seen["index"] == "Feature 4"
    assert seen["promoted"] == ["2", "3"]
    assert seen["sorted"] == ["0", "1", "2", "3"]
    best = given.of(0)[0]
    assert re.search(r"sequence \d+, position \d+", seen["tip"])
    assert seen["tip"].split(": ")[1].split("\n")[0] == f"{best.value:.3g}"
    assert seen["bars"] == int((given.histogram[0] > 0).sum())
    assert seen["asked"] == [] and seen["marks"] == 2  # the page's own script and the driver


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_thousands_of_features_stay_quick(tmp_path: Path) -> None:
    seen = driven(examples(3000), tmp_path)
    assert 5 < seen["rows"] < 80  # those in view
    assert seen["each"] < 600  # milliseconds for a step and a search over all, on a busy machine
