"""Scales, ticks and the frame that line charts and histograms share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from circuitbench.viewer.text import Real, number


def ticks(low: Real, high: Real, about: int = 5) -> list[Real]:
    """Round numbers that cover [low, high], about that many."""
    if high <= low:
        high = low + 1.0
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
    """A plot area, in the units of its SVG, with linear scales."""

    x_low: Real
    x_high: Real
    y_low: Real
    y_high: Real
    width: Real = 320
    height: Real = 214
    left: Real = 40
    right: Real = 14
    top: Real = 30
    bottom: Real = 38

    def x(self, value: Real) -> Real:
        """Where a value of the horizontal axis lies."""
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1)
        return round(self.left + share * (self.width - self.left - self.right), 2)

    def y(self, value: Real) -> Real:
        """Where a value of the vertical axis lies."""
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1)
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 2)

    def draw(
        self,
        body: Markup,
        *,
        x_ticks: Sequence[tuple[Real, str]],
        y_ticks: Sequence[Real],
        x_label: str,
        y_label: str,
        y_format: Callable[[Real], str] = number,
    ) -> Markup:
        """The SVG: grid and labels around `body`."""
        end, floor = self.width - self.right, self.height - self.bottom
        parts = []
        for value in y_ticks:
            y = self.y(value)
            kind = "cb-base" if value == self.y_low else "cb-grid"
            parts.append(
                Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, self.left, end, y, y)
            )
            parts.append(
                Markup('<text class="cb-tick" text-anchor="end" x="{}" y="{}">{}</text>').format(
                    self.left - 7, y + 3.5, y_format(value)
                )
            )
        for value, text in x_ticks:
            parts.append(
                Markup('<text class="cb-tick" text-anchor="middle" x="{}" y="{}">{}</text>').format(
                    self.x(value), floor + 15, text
                )
            )
        parts.append(
            Markup('<text class="cb-axis" text-anchor="middle" x="{}" y="{}">{}</text>').format(
                (self.left + end) / 2, self.height - 7, x_label
            )
        )
        parts.append(Markup('<text class="cb-axis" x="0" y="12">{}</text>').format(y_label))
        return Markup(
            '<svg class="cb-plot" style="max-width: {}px" viewBox="0 0 {} {}" role="group">{}{}</svg>'
        ).format(round(1.15 * self.width), self.width, self.height, Markup("").join(parts), body)
