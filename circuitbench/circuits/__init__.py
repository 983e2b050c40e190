"""What a behaviour depends on: metrics, and effects measured by intervening."""

from __future__ import annotations

from .effect_map import Effect, EffectMap
from .effects import ablation_effects, patch_effects
from .metrics import logit_diff, loss, prob

__all__ = ["Effect", "EffectMap", "ablation_effects", "logit_diff", "loss", "patch_effects", "prob"]
