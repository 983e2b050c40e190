"""Scans as pure functions on tensors; the same verbs in every module."""

from __future__ import annotations

from circuitbench.recurrences import gated_delta, kda, s6, ssd

RECURRENCES = {"s6": s6, "ssd": ssd, "gated_delta": gated_delta, "kda": kda}

__all__ = ["RECURRENCES", "gated_delta", "kda", "s6", "ssd"]
