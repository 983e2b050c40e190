"""Pages and figures people look at."""

from __future__ import annotations

from circuitbench.viewer.figures import Figure, heatmap, histogram, layer_strip, line_chart, token_highlight
from circuitbench.viewer.report import (
    EffectMap,
    Evaluation,
    Example,
    FeatureCard,
    Metric,
    PromptPair,
    Report,
    SiteCheck,
    Snippet,
    Steering,
    Training,
    write_report,
)

__all__ = [
    "EffectMap",
    "Evaluation",
    "Example",
    "FeatureCard",
    "Figure",
    "Metric",
    "PromptPair",
    "Report",
    "SiteCheck",
    "Snippet",
    "Steering",
    "Training",
    "heatmap",
    "histogram",
    "layer_strip",
    "line_chart",
    "token_highlight",
    "write_report",
]
