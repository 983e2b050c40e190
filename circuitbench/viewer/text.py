"""Tokens and numbers as people read them."""

from __future__ import annotations

import math
import re
import unicodedata

Real = int | float

_GLYPHS = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·", "\u00a0": "⍽"}
# Controls, formats (some of which turn the direction of a line), surrogates, private use, unassigned, separators.
_UNSHOWABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def glyphs(token: str) -> str:
    """The token with all that cannot be seen made visible: · for a space, ⏎ for a newline, ⏎₈ for one and eight spaces.

    Other characters without a shape are escaped, as \\x1b; an empty token is ∅.
    """
    return "".join(map(_visible, _pieces(token))) or "∅"


def running(token: str) -> str:
    """The token as part of a text: as `glyphs`, but one space between words stays a space."""
    return "".join(piece if piece == " " else _visible(piece) for piece in _pieces(token))


def _pieces(token: str) -> list[str]:
    """Characters; runs of three spaces or more, and any spaces after a newline, in one piece."""
    return re.findall(r"\n +| {3,}|.", token, re.DOTALL)


def _visible(piece: str) -> str:
    if len(piece) > 1:
        newline = piece[0] == "\n"
        return ("⏎" if newline else "·") + str(len(piece) - newline).translate(_SUBSCRIPT)
    if piece in _GLYPHS:
        return _GLYPHS[piece]
    if unicodedata.category(piece) not in _UNSHOWABLE:
        return piece
    code = ord(piece)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def number(value: Real, digits: int = 3) -> str:
    """Three significant digits, thousands set apart, a real minus sign."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if abs(value) >= 10**digits - 0.5:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
        if "e" in text:
            mantissa, exponent = text.split("e")
            text = f"{mantissa}·{power_of_ten(int(exponent))}"
    return text.replace("-", "−")


def power_of_ten(exponent: int) -> str:
    """10 with a superscript."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)
