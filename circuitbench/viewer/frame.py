"""What every figure is: a piece of HTML with a title, that a notebook shows as it is and a page embeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import count
from typing import Any

from markupsafe import Markup
from torch import Tensor

from circuitbench.viewer.text import Real

Numbers = Sequence[Real] | Tensor

_serial = count(1)


@cache
def stylesheet() -> str:
    """The CSS of all figures, light and dark."""
    return (resources.files("circuitbench.viewer") / "templates" / "figures.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Figure:
    """A piece of HTML: `str(figure)` is bare, for a page that has `stylesheet()`; a notebook shows it styled."""

    html: Markup

    def __str__(self) -> str:
        return str(self.html)

    def __html__(self) -> str:
        return str(self.html)

    def _repr_html_(self) -> str:
        return str(Markup('<style>{}</style><div class="cb">{}</div>').format(Markup(stylesheet()), self.html))


def figure(kind: str, body: Markup, title: str, caption: str = "", summary: str = "") -> Figure:
    """The frame of a figure: its title and caption above it, and a summary in words for those who do not see it."""
    name = f"cb-figure-{next(_serial)}"
    return Figure(
        Markup(
            '<figure class="cb-figure cb-{}" role="group" aria-labelledby="{}">'
            '<figcaption><span class="cb-title" id="{}">{}</span>'
            "{}</figcaption>{}{}</figure>"
        ).format(
            kind,
            name,
            name,
            title,
            Markup(' <span class="cb-caption">{}</span>').format(caption) if caption else "",
            Markup('<p class="cb-hidden">{}</p>').format(summary) if summary else "",
            body,
        )
    )


def as_list(values: Any) -> list[Any]:
    """A list, of a list, a tuple, a tensor or an array."""
    return values.tolist() if hasattr(values, "tolist") else list(values)
