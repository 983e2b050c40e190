"""Figures as self-contained HTML, readable without colour and without a mouse.

Whatever is passed as text is escaped. Every figure has a title, and every value it shows can be read as text: by
pointing at its mark, and by a screen reader.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup
from torch import Tensor

from circuitbench.errors import BadInput
from circuitbench.viewer.charts import histogram, line_chart
from circuitbench.viewer.frame import Figure, Numbers, as_list, figure, stylesheet
from circuitbench.viewer.text import Real, glyphs, number, running

__all__ = ["Figure", "Numbers", "heatmap", "histogram", "layer_strip", "line_chart", "stylesheet", "token_highlight"]

KINDS = {"ssm": "S", "conv": "C", "attention": "A", "hybrid": "H", "mlp": "M"}
Grid = Sequence[Sequence[Real | None] | Tensor | None] | Tensor


def heatmap(
    values: Grid,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    unit: str,
    caption: str = "",
    row_label: str = "layer",
    column_label: str = "position",
    absent: str | Sequence[str] = "no state",
    largest: Real | None = None,
) -> Figure:
    """Signed values over rows × columns, on a scale centred at 0.

    Args:
        values: numbers row by row; a row that is None, or all NaN, has no such values at all and is shown so; a
            single None or NaN is a gap.
        rows: names of the rows, such as "0" or "layer 0".
        columns: names of the columns, such as the tokens of a prompt; whitespace is made visible.
        title: what the figure shows.
        unit: of the values.
        caption: a sentence after the title.
        row_label: what a row is.
        column_label: what a column is.
        absent: the words shown in a row without values; one for all, or one a row.
        largest: the absolute value of full colour, where maps share a scale; that of the largest value if not given.

    Raises:
        BadInput: the numbers of rows and columns do not fit the values, none of them is finite, or one is beyond
            `largest`.
    """
    grid = [None if row is None else [_gap(v) for v in as_list(row)] for row in as_list(values)]
    grid = [None if row is None or all(v is None for v in row) else row for row in grid]
    if len(grid) != len(rows) or any(row is not None and len(row) != len(columns) for row in grid):
        raise BadInput(
            f"heatmap {title!r} was given {len(grid)} rows of values for {len(rows)} names, with columns "
            f"{sorted({len(row) for row in grid if row})} for {len(columns)} names."
        )
    shown = [abs(v) for row in grid if row for v in row if v is not None]
    if not shown or not all(map(math.isfinite, shown)):
        raise BadInput(f"heatmap {title!r} needs at least one value, and all of them finite.")
    if largest is not None and not max(shown) <= largest * (1 + 1e-6):
        raise BadInput(f"heatmap {title!r} has {max(shown):g}, beyond largest={largest:g}, the value of full colour.")
    largest = max(shown) if largest is None else largest
    head = Markup("").join(Markup('<th scope="col"><span>{}</span></th>').format(glyphs(column)) for column in columns)
    words = [absent] * len(grid) if isinstance(absent, str) else list(absent)
    body = Markup("").join(
        _heatmap_row(f"{row_label} {name}", column_label, name, row, columns, largest, word)
        for name, row, word in zip(rows, grid, words, strict=True)
    )
    table = Markup(
        '<div class="cb-scroll"><table class="cb-heat" style="--n:{}" data-grid><thead><tr>'
        '<th scope="col" class="cb-corner">{}</th>{}'
        "</tr></thead><tbody>{}</tbody></table></div>{}"
    ).format(len(columns), row_label, head, body, _legend(largest, unit))
    return figure("heatmap", table, title, caption)


def _gap(value: Real | None) -> Real | None:
    return None if value is None or math.isnan(value) else float(value)


def _heatmap_row(
    row_name: str,
    column_label: str,
    name: str,
    row: list[Real | None] | None,
    columns: Sequence[str],
    largest: Real,
    absent: str,
) -> Markup:
    head = Markup('<th scope="row">{}</th>').format(name)
    if row is None:
        return Markup('<tr>{}<td class="cb-absent" colspan="{}"><span>{}</span></td></tr>').format(
            head, len(columns), absent
        )
    cells = []
    for column, (token, value) in enumerate(zip(columns, row, strict=True)):
        where = f"{row_name}, {column_label} {column} “{glyphs(token)}”"
        if value is None:
            cells.append(Markup('<td class="cb-gap" title="{}"></td>').format(f"{where}: no value"))
            continue
        strength = abs(value) / largest if largest else 0.0
        cells.append(
            Markup('<td class="{}" style="--v:{:.3f}" title="{}"><span class="cb-hidden">{}</span></td>').format(
                "cb-pos" if value >= 0 else "cb-neg", strength, f"{where}: {number(value)}", number(value)
            )
        )
    return Markup("<tr>{}{}</tr>").format(head, Markup("").join(cells))


def _legend(largest: Real, unit: str) -> Markup:
    return Markup(
        '<div class="cb-legend"><span>{}</span><span class="cb-ramp" aria-hidden="true"></span><span>{}</span>'
        '<span class="cb-unit">{}</span></div>'
    ).format(number(-largest), number(largest), unit)


def token_highlight(
    tokens: Sequence[str],
    values: Numbers,
    *,
    largest: Real | None = None,
    peak: int | None = None,
    title: str = "",
    caption: str = "",
) -> Figure:
    """A text whose tokens are shaded by a value that is 0 or greater.

    Args:
        tokens: as strings; escaped, and with whitespace made visible where it would be lost.
        values: one for each.
        largest: the value of full shade; that of the strongest token if not given.
        peak: index of a token to underline.
        title: what the figure shows; without one only the bare text is returned, for use inside another figure.
        caption: a sentence after the title.

    Raises:
        BadInput: not one value a token, or a negative one.
    """
    values = as_list(values)
    if len(tokens) != len(values) or any(not value >= 0 for value in values):
        raise BadInput(
            f"token_highlight was given {len(tokens)} tokens and {len(values)} values; "
            "there must be one value a token, all ≥ 0."
        )
    top = max(values, default=0) if largest is None else largest
    spans = Markup("").join(
        _token(token, value, min(1.0, value / top) if top else 0.0, i == peak)
        for i, (token, value) in enumerate(zip(tokens, values, strict=True))
    )
    text = Markup('<span class="cb-text" data-keys>{}</span>').format(spans)
    return figure("tokens", text, title, caption) if title else Figure(text)


def _token(token: str, value: Real, share: Real, peak: bool) -> Markup:
    classes = " ".join(["cb-peak"] * peak + ["cb-on"] * (value > 0))
    return Markup('<span{}{} title="{}">{}</span>').format(
        Markup(' class="{}"').format(classes) if classes else "",
        Markup(' style="--v:{:.3f}"').format(share) if value > 0 else "",
        f"{glyphs(token)}: {number(value)}",
        running(token),
    )


def layer_strip(kinds: Iterable[str], *, title: str, caption: str = "") -> Figure:
    """The layers of a model in order, each with its kind: ssm, conv, attention, hybrid or mlp."""
    kinds = list(kinds)
    if not kinds or not set(kinds) <= set(KINDS):
        raise BadInput(f"layer_strip was given the kinds {sorted(set(kinds))}; there are: {', '.join(KINDS)}.")
    cells = Markup("").join(
        Markup('<li class="cb-kind-{}" title="{}"><b>{}</b><span>{}</span></li>').format(
            kind, f"layer {i}: {kind}", KINDS[kind], i
        )
        for i, kind in enumerate(kinds)
    )
    legend = Markup("").join(
        Markup('<li><i class="cb-kind-{}">{}</i> {} <span>× {}</span></li>').format(
            kind, letter, kind, kinds.count(kind)
        )
        for kind, letter in KINDS.items()
        if kind in kinds
    )
    body = Markup('<ol class="cb-strip" start="0" data-keys>{}</ol><ul class="cb-kinds">{}</ul>').format(cells, legend)
    return figure("layers", body, title, caption)
