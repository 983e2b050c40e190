"""The page: complete, closed to the outside, and safe whatever the model writes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch

from circuitbench import viewer
from circuitbench.viewer import report as reports
from tests.viewer.pages import Node, parse

HOSTILE = "<img src=https://example.com/x.png onerror=alert(1)>{{ 7 * 7 }}\"'&"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def small_report(token: str = "def") -> viewer.Report:
    """Every part of a report, with `token` wherever a model's text can stand."""
    steps = list(range(1, 21))
    return viewer.Report(
        model=token,
        layers=["ssm", "attention", "hybrid"],
        made=datetime(2026, 3, 4, 5, 6),
        seconds=75.4,
        versions={"circuitbench": "0.1.0", "torch": "2.13.0"},
        summary=["What was found.", token],
        facts={"parameters": "9 million"},
        checks=[
            viewer.SiteCheck("ssm.y", {"resolves": True, "replay": True}),
            viewer.SiteCheck("mlp.out", {"resolves": True, "identity": None}, detail=token),
        ],
        training=viewer.Training(
            token,
            {
                "step": steps,
                "loss": [1 / s for s in steps],
                "fvu": [0.9 / s for s in steps],
                "l0": [32] * 20,
                "dead_share": [0.0] * 20,
            },
        ),
        evaluation=viewer.Evaluation(token, [viewer.Metric("FVU", "0.12", token)], torch.linspace(0, 0.1, 50)),
        prompts=[viewer.PromptPair(token, "yes", 0.812, token, "no", 0.5, 0.254)],
        effects=[viewer.EffectMap("Effects", token, "logits", [token, "\n"], [[0.5, -1.0], None, [0.0, 0.25]])],
        features=[
            viewer.FeatureCard(
                7,
                0.0123,
                [viewer.Example(["a", token, "\n    "], [0.0, 3.0, 1.5], 1)],
                [(token, 1.5)],
                [(" no", -2.0)],
                token,
            )
        ],
        steering=[viewer.Steering(token, token, token, token)],
        snippets=[viewer.Snippet(token, token)],
    )


def text_of(tree: Node, section: str) -> str:
    (node,) = [node for node in tree.all("section") if node.attributes["id"] == section]
    return node.text


def test_the_page_holds_every_number_it_was_given(tmp_path: Path) -> None:
    path = viewer.write_report(tmp_path / "new" / "report.html", small_report())
    tree = parse(path.read_text(encoding="utf-8"))
    assert [path.name for path in path.parent.iterdir()] == ["report.html"]
    assert tree.all("h1")[0].text == "def"
    assert "4 March 2026, 05:06" in tree.text and "Took 1 min 15 s with circuitbench 0.1.0, torch 2.13.0." in tree.text
    assert "All 2 sites passed" in text_of(tree, "checks")
    (pair,) = tree.all("table", class_="prompts")[0].all("tbody")[0].all("tr")
    cells = [" ".join(cell.text.split()) for cell in pair.all("td")]
    assert cells == ["def", "yes 81 %", "def", "no 50 %", "25 %"]
    marks = [cell.text for row in tree.all("table", class_="checks")[0].all("tr") for cell in row.all("td")]
    assert marks == ["✓", "✓", "–", "", "✓", "–", "–", "def"], (
        "tests a site does not have are neither passed nor failed"
    )
    assert "no state: attention layer" in text_of(tree, "effects")
    assert "0.12" in text_of(tree, "evaluation") and "50 features" in text_of(tree, "evaluation")
    features = text_of(tree, "features")
    assert (
        "Feature 7" in features
        and "active on 1.23 % of tokens" in features
        and "adef⏎₄" in features
        and "·no" in features
    )
    assert len(tree.all("figure")) == 6


def test_failed_checks_are_said_first() -> None:
    failed = dataclasses.replace(
        small_report(), checks=[viewer.SiteCheck("ssm.y", {"replay": False}, "differs by 0.2")]
    )
    text = text_of(parse(reports.render(failed)), "checks")
    assert "1 of 1 sites failed" in text and "✗" in text and "differs by 0.2" in text


def test_empty_parts_are_left_out() -> None:
    bare = viewer.Report("m", ["ssm"], datetime(2026, 1, 1), 3.0, {"torch": "2"})
    tree = parse(reports.render(bare))
    assert [node.attributes["id"] for node in tree.all("section")] == ["model"]
    assert [link.text for link in tree.all("a")] == ["The model"]


def test_the_page_names_nothing_outside_itself() -> None:
    page = reports.render(small_report())
    tree = parse(page)
    for node in tree.every():
        for name in ("src", "srcset", "action", "data", "poster", "xlink:href"):
            assert name not in node.attributes, f"<{node.tag} {name}=…>"
        if "href" in node.attributes:
            assert re.match(r"#|data:", node.attributes["href"]), node.attributes["href"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    ids = {node.attributes["id"] for node in tree.every() if "id" in node.attributes}
    assert {link.attributes["href"][1:] for link in tree.all("a")} <= ids, "links inside the page have a target"


def test_every_figure_has_a_title() -> None:
    tree = parse(reports.render(small_report()))
    for figure in tree.all("figure"):
        (title,) = [
            node for node in figure.every() if node.attributes.get("id") == figure.attributes["aria-labelledby"]
        ]
        assert title.text.strip()
    assert len(tree.all("svg")) == 4
    for plot in tree.all("svg"):
        assert len(plot.all("text", class_="cb-axis")) == 2, "both axes are named"


def test_hostile_text_is_shown_and_not_run() -> None:
    plain, hostile = (parse(reports.render(small_report(token))) for token in ("def", HOSTILE))
    assert not hostile.all("img")
    assert [node.tag for node in hostile.every()] == [node.tag for node in plain.every()], "text makes no elements"
    for section in ("features", "steering", "reproduce", "training", "checks"):
        assert HOSTILE in text_of(hostile, section)
    assert all(not name.startswith("on") for node in hostile.every() for name in node.attributes)


def test_values_that_cannot_be_shown_leave_the_old_page_alone(tmp_path: Path) -> None:
    path = viewer.write_report(tmp_path / "report.html", small_report())
    before = path.read_bytes()
    effects = [viewer.EffectMap("t", "d", "u", ["a"], [[float("inf")], None, None])]
    with pytest.raises(ValueError, match="finite"):
        viewer.write_report(path, dataclasses.replace(small_report(), effects=effects))
    assert path.read_bytes() == before


def in_browser(page: str, folder: Path) -> Node:
    """The page after a browser has run it."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --dump-dom"
    flags += " --disable-background-networking --disable-component-update"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return parse(done.stdout.replace("<!DOCTYPE html>", ""))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_asks_for_nothing_and_arrow_keys_read_the_values(tmp_path: Path) -> None:
    script = """<script>addEventListener("load", () => {
      const grid = document.querySelector("[data-grid]");
      grid.focus();
      const read = [];
      for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"]) {
        grid.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        read.push(document.querySelector(".tip").textContent);
      }
      const asked = performance.getEntriesByType("resource").map((entry) => entry.name);
      document.title = JSON.stringify({ asked, read });
    })</script>"""
    # Without its own policy, which would hide a request by forbidding it.
    page = re.sub(r"<meta http-equiv[^>]*>", "", reports.render(small_report()))
    seen = json.loads(in_browser(page.replace("</body>", script + "</body>"), tmp_path).all("title")[0].text)
    assert seen["asked"] == []
    assert seen["read"] == [
        "layer 0, position 0 “def”: 0.5",
        "layer 0, position 1 “⏎”: −1",
        "layer 2, position 1 “⏎”: 0.25",
    ]  # fmt: skip
    outside = page.replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">').replace(
        "</body>", script + "</body>"
    )
    seen = json.loads(in_browser(outside, tmp_path).all("title")[0].text)
    assert seen["asked"] == ["http://127.0.0.1:9/x.png"], "this test can see a request"
