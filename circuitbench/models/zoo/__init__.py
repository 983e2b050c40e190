"""Small models that ship with the package: synthetic tasks, compiled and trained, and two models of Python text.

`docs/zoo.md` tells where each comes from and what it scores; `scripts/train_zoo.py` makes each again.
"""

from __future__ import annotations

from circuitbench.models.zoo.shelf import names, path, record, truth

__all__ = ["names", "path", "record", "truth"]
