"""Line charts and histograms, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping

from markupsafe import Markup

from circuitbench.errors import BadInput
from circuitbench.viewer.axes import Frame, ticks
from circuitbench.viewer.frame import Figure, Numbers, as_list, figure
from circuitbench.viewer.text import Real, number, power_of_ten


def line_chart(
    x: Numbers,
    lines: Mapping[str, Numbers],
    *,
    title: str,
    x_label: str,
    y_label: str,
    caption: str = "",
    percent: bool = False,
) -> Figure:
    """One or a few quantities of the same unit over x, each line named at its end.

    Args:
        x: common to all lines, ascending.
        lines: name -> values; the vertical axis starts at 0 unless one is negative.
        title: what the figure shows.
        x_label: quantity and unit.
        y_label: quantity and unit.
        caption: a sentence after the title.
        percent: print values as percentages.

    Raises:
        BadInput: no points, lines of unequal length, or values that are not finite.
    """
    x, drawn = as_list(x), {name: as_list(values) for name, values in lines.items()}
    if not x or not drawn or any(len(values) != len(x) for values in drawn.values()):
        raise BadInput(
            f"line_chart was given {len(x)} points on x and lines of length {[len(v) for v in drawn.values()]}; "
            "there must be at least one point and one line, and all lines must have the length of x."
        )
    flat = [value for values in drawn.values() for value in values]
    if not all(map(math.isfinite, flat)):
        raise BadInput(f"line_chart {title!r} was given values that are not finite; leave those points out.")

    def show(value: Real) -> str:
        return f"{number(100 * value)} %" if percent else number(value)

    y_ticks = ticks(min(0.0, min(flat)), max(flat), 4)
    x_ticks = [t for t in ticks(x[0], x[-1], 4) if x[0] <= t <= x[-1]]
    longest = max(map(len, drawn))
    frame = Frame(x[0], x[-1], y_ticks[0], y_ticks[-1], right=16 + 6.2 * longest if len(drawn) > 1 else 16)
    parts = []
    ends = _spread([frame.y(values[-1]) for values in drawn.values()], 13)
    for i, (name, values) in enumerate(drawn.items()):
        points = " ".join(f"{frame.x(a)},{frame.y(b)}" for a, b in zip(x, values, strict=True))
        marks = Markup("").join(
            Markup('<circle cx="{}" cy="{}" r="3.2"><title>{}</title></circle>').format(
                frame.x(a), frame.y(b), f"{name}: {show(b)} at {x_label} {number(a, 6)}"
            )
            for a, b in zip(x, values, strict=True)
        )
        label = ""
        if len(drawn) > 1:
            label = Markup('<text class="cb-end" x="{}" y="{}">{}</text>').format(
                frame.width - frame.right + 6, ends[i] + 3.5, name
            )
        parts.append(
            Markup('<g class="cb-line cb-line-{}" data-keys><polyline points="{}"/>{}{}</g>').format(
                i % 4, points, label, marks
            )
        )
    summary = " ".join(
        f"{name}: {show(v[0])} at {x_label} {number(x[0], 6)}, {show(v[-1])} at {number(x[-1], 6)}, "
        f"least {show(min(v))}, most {show(max(v))}."
        for name, v in drawn.items()
    )
    plot = frame.draw(
        Markup("").join(parts),
        x_ticks=[(t, number(t, 6)) for t in x_ticks],
        y_ticks=y_ticks,
        x_label=x_label,
        y_label=y_label,
        y_format=show,
    )
    return figure("chart", plot, title, caption, summary)


def _spread(positions: list[Real], gap: Real) -> list[Real]:
    """The positions, moved apart until neighbours are `gap` from each other."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for below, above in zip(order, order[1:], strict=False):
        moved[above] = max(moved[above], moved[below] + gap)
    return moved


def histogram(
    values: Numbers,
    *,
    title: str,
    x_label: str,
    y_label: str = "features",
    caption: str = "",
    bins: int = 24,
    log: bool = False,
) -> Figure:
    """How often values occur.

    Args:
        values: any number of them.
        log: bins of equal width in log10; zeros are counted in a bar of their own, marked 0.
        bins: how many, zeros not counted.

    Raises:
        BadInput: no values, values that are not finite, or negative ones on a logarithmic axis.
    """
    values = as_list(values)
    if not values or not all(map(math.isfinite, values)) or (log and min(values) < 0):
        raise BadInput(f"histogram {title!r} needs at least one value, all finite, and none negative if log=True.")
    zeros = sum(1 for value in values if value == 0) if log else 0
    placed = [math.log10(value) for value in values if value > 0] if log else values
    low, high = (math.floor(min(placed)), math.ceil(max(placed))) if log and placed else (min(values), max(values))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    if log:
        low, high = min(low, high - 1), high
    width = (high - low) / bins
    counts = [0] * bins
    for value in placed:
        counts[min(bins - 1, int((value - low) / width))] += 1

    y_ticks = [t for t in ticks(0, max([*counts, zeros, 1]), 4) if t == int(t)]
    gap = 2.5 * width if zeros else 0.0  # room for the bar of zeros, left of the axis
    frame = Frame(low - gap, high, 0, y_ticks[-1], width=480, height=230)

    def bar(left: Real, right: Real, n: int, what: str, kind: str = "cb-bar") -> Markup:
        x0, x1, y = frame.x(left), frame.x(right), frame.y(n)
        return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            kind, x0 + 0.5, y, round(max(0.5, x1 - x0 - 1), 2), round(frame.y(0) - y, 2), f"{n} {y_label}: {what}"
        )

    def edge(value: Real) -> str:
        return number(10**value) if log else number(value)

    bars = [bar(low - gap, low - gap + 1.5 * width, zeros, f"{x_label} 0", "cb-bar cb-bar-zero")] if zeros else []
    bars += [
        bar(
            low + i * width,
            low + (i + 1) * width,
            n,
            f"{x_label} from {edge(low + i * width)} to {edge(low + (i + 1) * width)}",
        )
        for i, n in enumerate(counts)
        if n
    ]
    if log:
        step = max(1, round((high - low) / 6))
        x_ticks = [(t, _decade(t)) for t in range(math.ceil(low), math.floor(high) + 1, step)]
    else:
        x_ticks = [(t, number(t)) for t in ticks(low, high, 5) if low <= t <= high]
    if zeros:
        x_ticks = [(low - gap + 0.75 * width, "0"), *x_ticks]
    plot = frame.draw(
        Markup("<g data-keys>{}</g>").format(Markup("").join(bars)),
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        x_label=x_label,
        y_label=y_label,
    )
    middle = sorted(values)[len(values) // 2]
    summary = (
        f"{len(values)} {y_label}; median {number(middle)}, least {number(min(values))}, most {number(max(values))}."
    )
    return figure("chart", plot, title, caption, summary + (f" {zeros} are exactly 0." if zeros else ""))


def _decade(power: int) -> str:
    return number(10.0**power) if -2 <= power <= 3 else power_of_ten(power)
