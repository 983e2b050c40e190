"""Scans as pure functions on tensors; the same verbs in every module."""

from __future__ import annotations

from circuitbench.recurrences import gated_delta, kda, mlstm, rg_lru, rwkv7, s6, ssd, wkv4

RECURRENCES = {
    "s6": s6,
    "ssd": ssd,
    "gated_delta": gated_delta,
    "kda": kda,
    "rwkv7": rwkv7,
    "rg_lru": rg_lru,
    "wkv4": wkv4,
    "mlstm": mlstm,
}

__all__ = ["RECURRENCES", "gated_delta", "kda", "mlstm", "rg_lru", "rwkv7", "s6", "ssd", "wkv4"]
