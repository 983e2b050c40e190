"""One self-contained page about one model: checked, decomposed, taken apart, steered."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from circuitbench.viewer import figures
from circuitbench.viewer.figures import Figure, Grid, Numbers
from circuitbench.viewer.text import Real, glyphs, number, running


@dataclass(frozen=True)
class SiteCheck:
    """What was verified about a site. Results: name of a test -> passed, failed, or None where it does not apply."""

    site: str
    results: Mapping[str, bool | None]
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether no test failed."""
        return all(result is not False for result in self.results.values())


@dataclass(frozen=True)
class Training:
    """How a dictionary was trained. History: `step`, `loss`, `fvu`, `l0`, `dead_share`, as `train` returns it."""

    description: str
    history: Mapping[str, Numbers]


@dataclass(frozen=True)
class Metric:
    """One number, ready to print, and what it means in one line."""

    name: str
    value: str
    definition: str


@dataclass(frozen=True)
class Evaluation:
    """How good the dictionary is. Density: for every feature the share of tokens on which it is active."""

    description: str
    metrics: Sequence[Metric]
    density: Numbers = ()


@dataclass(frozen=True)
class PromptPair:
    """Two prompts and what each makes likely; carried: the share of the difference that one state makes.

    Probabilities are of `answer` after `clean`, and of `other_answer` after `corrupt`.
    """

    clean: str
    answer: str
    probability: Real
    corrupt: str
    other_answer: str
    other_probability: Real
    carried: Real


@dataclass(frozen=True)
class EffectMap:
    """Effects on a metric over layers × positions; a layer that has no such site is None, not zeros.

    `lacks` is what such a layer lacks, as "state"; `largest` the value of full colour, where maps share a scale.
    """

    title: str
    description: str
    unit: str
    tokens: Sequence[str]
    values: Grid
    lacks: str = "state"
    largest: Real | None = None


@dataclass(frozen=True)
class Example:
    """A stretch of text and a feature's activation on each of its tokens; `peak` is the index of the strongest."""

    tokens: Sequence[str]
    activations: Sequence[Real]
    peak: int


@dataclass(frozen=True)
class FeatureCard:
    """A feature. Promoted and suppressed: (token, change of its logit), strongest first."""

    index: int
    density: Real
    examples: Sequence[Example]
    promoted: Sequence[tuple[str, Real]] = ()
    suppressed: Sequence[tuple[str, Real]] = ()
    note: str = ""

    @property
    def largest(self) -> Real:
        """The strongest activation among the examples."""
        return max((max(example.activations) for example in self.examples), default=0)


@dataclass(frozen=True)
class Steering:
    """The same prompt continued twice."""

    description: str
    prompt: str
    plain: str
    steered: str


@dataclass(frozen=True)
class Snippet:
    """Code that reproduces something on the page."""

    title: str
    code: str


@dataclass(frozen=True)
class Report:
    """Everything the page shows; a part that is empty is left out.

    Attributes:
        model: its name.
        summary: a sentence or two, or a few paragraphs, on what was found.
        layers: the kind of every layer: "ssm", "conv", "attention", "hybrid" or "mlp".
        facts: name -> value, shown under the title, such as {"parameters": "9.4 million"}.
        versions: package -> version.
        made: when.
        seconds: how long it took.
    """

    model: str
    layers: Sequence[str]
    made: datetime
    seconds: Real
    versions: Mapping[str, str]
    summary: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    checks: Sequence[SiteCheck] = ()
    training: Training | None = None
    evaluation: Evaluation | None = None
    prompts: Sequence[PromptPair] = ()
    effects: Sequence[EffectMap] = ()
    features: Sequence[FeatureCard] = ()
    steering: Sequence[Steering] = ()
    snippets: Sequence[Snippet] = ()


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page, whole or not at all, making the folder if need be; it asks for nothing outside itself.

    Raises:
        BadInput: a part holds what its figure cannot show, such as values that are not finite.
    """
    path = Path(path)
    page = render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def render(report: Report) -> str:
    """The page as a string."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("circuitbench.viewer"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "glyphs": glyphs, "running": running, "duration": _duration}
    return environment.get_template("report.html.j2").render(
        report=report,
        css=Markup(figures.stylesheet() + _source(environment, "report.css")),
        script=Markup(_source(environment, "report.js")),
        strip=figures.layer_strip(report.layers, title="Layers", caption="from the embedding to the logits"),
        tests=list(dict.fromkeys(name for check in report.checks for name in check.results)),
        training_figures=_training_figures(report.training) if report.training else [],
        density_figure=_density_figure(report.evaluation) if report.evaluation else None,
        effect_figures=[_effect_figure(effect, report.layers) for effect in report.effects],
        highlight=figures.token_highlight,
    )


def _source(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _training_figures(training: Training) -> list[Figure]:
    h = training.history
    step = h["step"]
    return [
        figures.line_chart(
            step,
            {"loss": h["loss"], "FVU": h["fvu"]},
            title="Loss",
            caption="and the part of it that is FVU",
            x_label="step",
            y_label="share of the variance",
        ),
        figures.line_chart(
            step, {"L0": h["l0"]}, title="L0", caption="features active on a token", x_label="step", y_label="features"
        ),
        figures.line_chart(
            step,
            {"dead": h["dead_share"]},
            title="Dead features",
            caption="silent of late",
            x_label="step",
            y_label="share of features",
            percent=True,
        ),
    ]


def _density_figure(evaluation: Evaluation) -> Figure | None:
    if not len(evaluation.density):
        return None
    return figures.histogram(
        evaluation.density,
        log=True,
        title="Density of the features",
        x_label="share of tokens on which a feature is active",
        caption="the grey bar counts those that were never active",
    )


def _effect_figure(effect: EffectMap, layers: Sequence[str]) -> Figure:
    return figures.heatmap(
        effect.values,
        rows=[str(i) for i in range(len(layers))],
        columns=effect.tokens,
        title=effect.title,
        caption=effect.description,
        unit=effect.unit,
        absent=[f"no {effect.lacks}: {kind} layer" for kind in layers],
        largest=effect.largest,
    )


def _duration(seconds: Real) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
