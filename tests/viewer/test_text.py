"""Tokens and numbers as people read them."""

from __future__ import annotations

import pytest

from circuitbench.viewer import text
from circuitbench.viewer.axes import ticks


@pytest.mark.parametrize(
    ("token", "label", "inline"),
    [
        (" the", "·the", " the"),
        ("\n", "⏎", "⏎"),
        ("\n        ", "⏎₈", "⏎₈"),
        ("            ", "·₁₂", "·₁₂"),
        (" ", "·", " "),
        ("\n\n    x\t", "⏎⏎₄x⇥", "⏎⏎₄x⇥"),
        ("", "∅", ""),
        ("naïve 日本", "naïve·日本", "naïve 日本"),
        ("\x1b[0m\x00", "\\x1b[0m\\x00", "\\x1b[0m\\x00"),
        ("a\u202eb\u200b", "a\\u202eb\\u200b", "a\\u202eb\\u200b"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(token: str, label: str, inline: str) -> None:
    assert text.glyphs(token) == label
    assert text.running(token) == inline


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (1.0, "1"), (-0.51234, "−0.512"), (12345.6, "12,346"), (1000, "1,000"), (999.5, "1,000"),
        (0.00001234, "1.23·10⁻⁵"), (float("nan"), "not a number"), (float("-inf"), "−∞"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert text.number(value) == shown


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.113), (-3.2, 5), (10, 2000), (0, 31.7), (5, 5), (0, 1e-7)])
def test_ticks_are_few_evenly_spaced_and_cover_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    assert 2 <= len(found) <= 9
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert max(gaps) == pytest.approx(min(gaps))
