"""A dictionary's features as one self-contained page: a list to search and sort, and what each feature responds to."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from circuitbench.errors import BadInput
from circuitbench.explain import Example, FeatureExamples
from circuitbench.explain.examples import BINS, NO_TOKEN
from circuitbench.viewer.frame import stylesheet
from circuitbench.viewer.text import glyphs, running


def feature_page(
    examples: FeatureExamples,
    path: str | Path = "features.html",
    *,
    features: Sequence[int] | None = None,
    title: str | None = None,
) -> Path:
    """Write a page of features, whole or not at all; one HTML file that asks for nothing outside itself.

    Args:
        examples: From `feature_examples`, or `load_examples`.
        path: The file; its folder is made if need be.
        features: Which features; default: all.
        title: Of the page; default: the dictionary's site.

    Returns:
        Where it is.

    Raises:
        BadInput: No features, one that is not there, or examples without the text of their tokens.
    """
    path = Path(path)
    page = render(examples, features, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def render(examples: FeatureExamples, features: Sequence[int] | None = None, title: str | None = None) -> str:
    """The page as a string."""
    chosen = list(range(examples.d_dict)) if features is None else list(features)
    for feature in chosen:
        examples.check(feature)
    if not chosen:
        raise BadInput("features= names no feature; leave it out for all of them.")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("circuitbench.viewer"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    css, script = (environment.loader.get_source(environment, f"features.{kind}")[0] for kind in ("css", "js"))
    about = examples.about
    return environment.get_template("features.html.j2").render(
        title=title or str(about.get("site", "Features")),
        line=line(examples, len(chosen)),
        css=Markup(stylesheet() + css),
        script=Markup(script),
        data=Markup(as_script(payload(examples, chosen))),
    )


def line(examples: FeatureExamples, n: int) -> str:
    """What dictionary this is, and what text."""
    about = examples.about
    settings = "".join(f", {name} {value}" for name, value in about.get("settings", {}).items())
    of = f"{n:,} of {examples.d_dict:,} features" if n < examples.d_dict else f"{n:,} features"
    parts = [of]
    if "kind" in about:
        parts[0] += f" of a dictionary ({about['kind']}{settings}) at {about['site']} of {about['model']}"
    silent = int((examples.active_tokens == 0).sum())
    text = f", {about['text']}" if about.get("text") else ""
    parts.append(f"on {examples.n_tokens:,} tokens{text}")
    parts.append(f"{silent:,} never active" if silent else "each active at least once")
    return "; ".join(parts) + "."


def payload(examples: FeatureExamples, chosen: list[int]) -> dict[str, Any]:
    """All the page shows, in short: tokens as numbers into one list of words, activations only where they are not 0."""
    place = {token: i for i, token in enumerate(used(examples, chosen))}

    def short(example: Example) -> list[Any]:
        active = [x for i, a in enumerate(example.activations) if a > 0 for x in (i, float(f"{a:.4g}"))]
        tokens = [place[token] for token in example.token_ids]
        return [tokens, active, example.peak, example.sequence, example.position]

    def side(tokens: Any, values: Any, feature: int) -> list[Any]:
        return [[place[token] for token in tokens[feature].tolist()], [rounded(v) for v in values[feature].tolist()]]

    ranges, density = examples.ranges.tolist(), examples.density.tolist()
    rows = []
    for feature in chosen:
        counts = examples.histogram[feature].tolist()
        rows.append(
            {
                "i": feature,
                "d": rounded(density[feature]),
                "n": int(examples.active_tokens[feature]),
                "m": rounded(float(examples.values[feature].max())),
                "e": ranges[feature],
                "h": [x for b, count in enumerate(counts) if count for x in (b, count)],
                "t": [short(example) for example in examples.of(feature)],
                "x": [
                    [low, high, [short(example) for example in found]] for low, high, found in examples.across(feature)
                ],
                "p": side(*examples.promoted, feature),
                "s": side(*examples.suppressed, feature),
            }
        )
    words = [examples.words[token] for token in place]
    shown = [[running(text), glyphs(text)] for text in words]
    return {"bins": BINS, "tokens": examples.n_tokens, "words": shown, "raw": words, "features": rows}


def used(examples: FeatureExamples, chosen: list[int]) -> list[int]:
    """All tokens that occur with these features."""
    tables = (examples.top.tokens, examples.spread.tokens, examples.promoted[0], examples.suppressed[0])
    tokens = torch.cat([table[chosen].flatten() for table in tables]).unique().tolist()
    unknown = next((token for token in tokens if token != NO_TOKEN and token not in examples.words), None)
    if unknown is not None:
        raise BadInput(
            f"These examples do not tell the text of token {unknown}; gather them with circuitbench.feature_examples."
        )
    return [token for token in tokens if token != NO_TOKEN]


def rounded(value: float) -> float | int:
    """Four significant digits, as short as JSON can write them."""
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() else short


def as_script(data: Any) -> str:
    """JSON that can stand in a script element: no text in it ends the element or begins another."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A lone surrogate, which a piece of a character may decode to, cannot be written as UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
