"""Figures show the numbers they were given, where they belong, and say so in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from circuitbench import viewer
from circuitbench.errors import BadInput
from circuitbench.viewer import Figure
from tests.viewer.pages import Node, parse

HOSTILE = "</span><script>alert('\"&')</script>"


def points(line: Node) -> list[tuple[float, float]]:
    (polyline,) = line.all("polyline")
    return [tuple(map(float, pair.split(","))) for pair in polyline.attributes["points"].split()]


def example_figures() -> dict[str, Figure]:
    return {
        "line_chart": viewer.line_chart([1, 2], {HOSTILE: [1.0, 2.0]}, title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE),
        "histogram": viewer.histogram([0.5, 0.0], log=True, title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE),
        "heatmap": viewer.heatmap(
            [[1.0], None],
            rows=[HOSTILE, "1"],
            columns=[HOSTILE],
            title=HOSTILE,
            unit=HOSTILE,
            caption=HOSTILE,
            absent=HOSTILE,
        ),
        "token_highlight": viewer.token_highlight([HOSTILE], [1.0], title=HOSTILE),
        "layer_strip": viewer.layer_strip(["ssm", "attention"], title=HOSTILE),
    }


@pytest.mark.parametrize("name", example_figures())
def test_every_figure_has_a_title_is_well_formed_and_escapes_its_text(name: str) -> None:
    figure = example_figures()[name]
    tree = parse(figure)
    assert not tree.all("script")
    (outer,) = tree.all("figure")
    (title,) = [node for node in outer.every() if node.attributes.get("id") == outer.attributes["aria-labelledby"]]
    assert title.text == HOSTILE
    assert "<script" not in str(figure)


def test_a_notebook_gets_the_style_with_the_figure() -> None:
    figure = viewer.token_highlight(["a"], [1.0], title="t")
    shown = figure._repr_html_()
    assert shown.startswith("<style>") and str(figure) in shown
    assert "http" not in shown and "@import" not in shown


def test_figures_on_one_page_have_different_ids() -> None:
    ids = [
        node.attributes["id"]
        for figure in example_figures().values()
        for node in parse(figure).every()
        if "id" in node.attributes
    ]
    assert len(set(ids)) == len(ids) == 5


def test_a_line_is_drawn_to_scale_and_its_values_can_be_read() -> None:
    x, y = [0, 10, 40], [2.0, 1.0, 0.5]
    tree = parse(
        viewer.line_chart(torch.tensor(x), {"loss": y, "FVU": [1.0, 1.0, 1.0]}, title="t", x_label="step", y_label="u")
    )
    (loss, fvu) = tree.all("g", class_="cb-line")
    (x0, y0), (x1, y1), (x2, y2) = points(loss)
    assert (x1 - x0) / (x2 - x0) == pytest.approx(10 / 40, abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(1.0 / 1.5, abs=1e-2)
    assert y0 < y1 < y2, "down the page"
    assert points(fvu)[0][1] == y1, "both lines are on one scale"
    assert [mark.text for mark in loss.all("title")] == [
        "loss: 2 at step 0",
        "loss: 1 at step 10",
        "loss: 0.5 at step 40",
    ]
    (summary,) = tree.all("p", class_="cb-hidden")
    assert "loss: 2 at step 0, 0.5 at 40, least 0.5, most 2." in summary.text


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    tree = parse(
        viewer.line_chart([0, 1], {"a": [0, 1.0], "b": [0, 1.0], "c": [0, 1.01]}, title="t", x_label="x", y_label="y")
    )
    heights = sorted(float(node.attributes["y"]) for node in tree.all("text", class_="cb-end"))
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 12


def test_a_histogram_counts_every_value_once() -> None:
    values = torch.cat([torch.rand(500) ** 4, torch.zeros(7), torch.ones(3)])
    tree = parse(viewer.histogram(values, log=True, title="t", x_label="density"))
    titles = [mark.text for mark in tree.all("title")]
    assert sum(int(title.split()[0]) for title in titles) == 510
    assert titles[0] == "7 features: density 0"
    heights = {title: float(mark.attributes["height"]) for title, mark in zip(titles, tree.all("rect"), strict=True)}
    tallest = max(heights, key=lambda title: int(title.split()[0]))
    for title, height in heights.items():
        assert height / heights[tallest] == pytest.approx(int(title.split()[0]) / int(tallest.split()[0]), abs=0.01)
    (summary,) = tree.all("p", class_="cb-hidden")
    assert "510 features" in summary.text and "7 are exactly 0" in summary.text


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-9, 1.0], [0.2] * 5])
@pytest.mark.parametrize("log", [False, True])
def test_a_histogram_of_few_or_equal_values_still_counts_them(values: list[float], log: bool) -> None:
    titles = [mark.text for mark in parse(viewer.histogram(values, log=log, title="t", x_label="x")).all("title")]
    assert sum(int(title.split()[0]) for title in titles) == len(values)


def test_a_heat_map_is_centred_at_zero_and_tells_absent_from_zero() -> None:
    values = [[0.0, -2.0, 1.0], None, [math.nan, 0.5, -1.0], [math.nan] * 3]
    figure = viewer.heatmap(
        values, rows=["0", "1", "2", "3"], columns=["def", " f", "\n    "], title="t", unit="logits"
    )
    rows = parse(figure).all("tbody")[0].all("tr")
    first = rows[0].all("td")
    assert [cell.attributes["class"] for cell in first] == ["cb-pos", "cb-neg", "cb-pos"]
    assert [cell.attributes["style"] for cell in first] == ["--v:0.000", "--v:1.000", "--v:0.500"]
    assert [cell.text for cell in first] == ["0", "−2", "1"]
    assert first[1].attributes["title"] == "layer 0, position 1 “·f”: −2"
    for row in (rows[1], rows[3]):
        (cell,) = row.all("td")
        assert cell.attributes["class"] == "cb-absent" and cell.attributes["colspan"] == "3" and cell.text == "no state"
    assert rows[2].all("td")[0].attributes["class"] == "cb-gap"
    assert [head.text for head in parse(figure).all("thead")[0].all("th")] == ["layer", "def", "·f", "⏎₄"]
    (legend,) = parse(figure).all("div", class_="cb-legend")
    assert [part.text for part in legend.all("span")] == ["−2", "", "2", "logits"]


def test_a_heat_map_of_a_tensor_is_that_of_its_list() -> None:
    values = torch.tensor([[1.0, -0.5], [math.nan, math.nan]])
    options = {"rows": ["0", "1"], "columns": ["a", "b"], "title": "t", "unit": "u"}
    cells = [
        [(td.attributes["class"], td.text) for td in parse(viewer.heatmap(v, **options)).all("td")]
        for v in (values, values.tolist())
    ]
    assert cells[0] == cells[1] == [("cb-pos", "1"), ("cb-neg", "−0.5"), ("cb-absent", "no state")]


def test_tokens_are_shaded_in_proportion_and_keep_the_text() -> None:
    tree = parse(viewer.token_highlight(["def", " f", "(", "\n    "], [0, 1.0, 4.0, 2.0], largest=8.0, peak=2))
    (text,) = tree.all("span", class_="cb-text")
    spans = text.all("span")
    assert text.text == "def f(⏎₄"
    assert [span.attributes.get("style") for span in spans] == [None, "--v:0.125", "--v:0.500", "--v:0.250"]
    assert [span.attributes.get("class", "") for span in spans] == ["", "cb-on", "cb-peak cb-on", "cb-on"]
    assert spans[1].attributes["title"] == "·f: 1"


def test_the_strip_shows_every_layer_and_counts_its_kinds() -> None:
    tree = parse(viewer.layer_strip(["ssm", "attention", "ssm", "hybrid"], title="t"))
    cells = tree.all("ol")[0].all("li")
    assert [cell.text for cell in cells] == ["S0", "A1", "S2", "H3"], "letters, not only colours"
    assert [item.text for item in tree.all("ul")[0].all("li")] == ["S ssm × 2", "A attention × 1", "H hybrid × 1"]


NAMES = {"title": "t", "x_label": "x"}
AXES = NAMES | {"y_label": "y"}
MAP = {"title": "t", "unit": "u"}


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: viewer.line_chart([1, 2], {"a": [1.0]}, **AXES), r"2 points on x and lines of length \[1\]"),
        (lambda: viewer.line_chart([], {"a": []}, **AXES), "at least one point"),
        (lambda: viewer.line_chart([1], {"a": [math.nan]}, **AXES), "not finite"),
        (lambda: viewer.histogram([], **NAMES), "at least one value"),
        (lambda: viewer.histogram([-1.0], **NAMES, log=True), "none negative if log=True"),
        (lambda: viewer.heatmap([[1.0]], rows=["0", "1"], columns=["a"], **MAP), "1 rows of values for 2 names"),
        (lambda: viewer.heatmap([[1.0, 2.0]], rows=["0"], columns=["a"], **MAP), r"columns \[2\] for 1 names"),
        (lambda: viewer.heatmap([None], rows=["0"], columns=["a"], **MAP), "at least one value"),
        (lambda: viewer.heatmap([[math.inf]], rows=["0"], columns=["a"], **MAP), "all of them finite"),
        (lambda: viewer.token_highlight(["a"], [1.0, 2.0]), "1 tokens and 2 values"),
        (lambda: viewer.token_highlight(["a"], [-1.0]), "all ≥ 0"),
        (lambda: viewer.layer_strip(["lstm"], title="t"), r"\['lstm'\]; there are: ssm, conv, attention, hybrid, mlp"),
    ],
)
def test_what_cannot_be_shown_is_refused(draw: Callable[[], Figure], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        draw()
