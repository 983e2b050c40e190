"""What features mean: where they are active, and what they say about the next token."""

from __future__ import annotations

from .examples import Example, FeatureExamples
from .gather import feature_examples, gather
from .logits import logit_effects
from .stored import load_examples

__all__ = ["Example", "FeatureExamples", "feature_examples", "gather", "load_examples", "logit_effects"]
