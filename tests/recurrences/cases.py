"""Random operands for every recurrence, in the ranges real layers have."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from circuitbench.recurrences import RECURRENCES

NAMES = list(RECURRENCES)
each_recurrence = pytest.mark.parametrize("name", NAMES)


@dataclass
class Case:
    """Operands by keyword, and what else a layer may have."""

    name: str
    operands: dict[str, Tensor]
    D: Tensor
    initial_state: Tensor

    @property
    def module(self):
        return RECURRENCES[self.name]

    def to(self, dtype: torch.dtype) -> Case:
        operands = {key: value.to(dtype) for key, value in self.operands.items()}
        return Case(self.name, operands, self.D.to(dtype), self.initial_state.to(dtype))


def s6_case(batch: int, length: int, channels: int = 5, n: int = 3, heads: int = 0) -> Case:
    h = (heads,) if heads else ()
    x, dt = torch.randn(batch, length, *h, channels), F.softplus(torch.randn(batch, length, *h, channels) - 2)
    B, C = torch.randn(batch, length, *h, n), torch.randn(batch, length, *h, n)
    A = -torch.arange(1.0, n + 1) * (0.5 + torch.rand(*h, channels, n))
    operands = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    return Case("s6", operands, torch.randn(*h, channels), torch.randn(batch, *h, channels, n))


def ssd_case(batch: int, length: int, heads: int = 4, p: int = 3, groups: int = 2, n: int = 5) -> Case:
    x, dt = torch.randn(batch, length, heads, p), F.softplus(torch.randn(batch, length, heads) - 2)
    B, C = torch.randn(batch, length, groups, n), torch.randn(batch, length, groups, n)
    operands = {"x": x, "dt": dt, "A": -(1 + 15 * torch.rand(heads)), "B": B, "C": C}
    return Case("ssd", operands, torch.randn(heads), torch.randn(batch, heads, p, n))


def delta_case(batch: int, length: int, heads: int = 3, dk: int = 4, dv: int = 5) -> Case:
    x, k = torch.randn(batch, length, heads, dv), F.normalize(torch.randn(batch, length, heads, dk), dim=-1)
    q = F.normalize(torch.randn(batch, length, heads, dk), dim=-1) * dk**-0.5
    g, beta = -F.softplus(torch.randn(batch, length, heads) - 2), torch.rand(batch, length, heads)
    operands = {"x": x, "B": k, "C": q, "g": g, "beta": beta}
    return Case("gated_delta", operands, torch.randn(heads), torch.randn(batch, heads, dk, dv))


def kda_case(batch: int, length: int, heads: int = 3, dk: int = 4, dv: int = 5) -> Case:
    layer = delta_case(batch, length, heads, dk, dv)
    layer.operands["g"] = -F.softplus(torch.randn(batch, length, heads, dk) - 2)
    return Case("kda", layer.operands, layer.D, layer.initial_state)


def case(name: str, batch: int = 2, length: int = 37, **sizes: int) -> Case:
    return {"s6": s6_case, "ssd": ssd_case, "gated_delta": delta_case, "kda": kda_case}[name](batch, length, **sizes)


SHAPES = [
    ("s6", {"batch": 2, "length": 37}),
    ("s6", {"batch": 1, "length": 1, "n": 1}),
    ("s6", {"batch": 3, "length": 16, "channels": 7, "n": 2}),
    ("s6", {"batch": 2, "length": 40, "channels": 1000, "n": 16}),  # two tiles of channels a row
    ("s6", {"batch": 2, "length": 21, "heads": 3}),
    ("ssd", {"batch": 2, "length": 37}),
    ("ssd", {"batch": 1, "length": 1, "groups": 1}),
    ("ssd", {"batch": 2, "length": 150, "heads": 6, "groups": 3}),  # chunks and a rest
    ("ssd", {"batch": 1, "length": 128, "heads": 3, "groups": 1, "p": 8}),
    ("ssd", {"batch": 1, "length": 65, "heads": 4, "groups": 4, "n": 1}),
    ("gated_delta", {"batch": 2, "length": 37}),
    ("gated_delta", {"batch": 1, "length": 1}),
    ("gated_delta", {"batch": 2, "length": 96, "dk": 8, "dv": 2}),
    ("gated_delta", {"batch": 1, "length": 75, "heads": 1, "dk": 1, "dv": 7}),
    ("kda", {"batch": 2, "length": 37}),
    ("kda", {"batch": 1, "length": 1}),
    ("kda", {"batch": 2, "length": 96, "dk": 8, "dv": 2}),
    ("kda", {"batch": 1, "length": 75, "heads": 1, "dk": 1, "dv": 7}),
]
each_shape = pytest.mark.parametrize(("name", "sizes"), SHAPES, ids=lambda v: v if isinstance(v, str) else str(v))


def close(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Within `relative` of the largest expected number."""
    error = (actual.double() - expected.double()).abs().max().item()
    scale = expected.abs().max().item()
    assert error <= relative * max(scale, 1e-12), f"off by {error:.2e} where the largest number is {scale:.2e}"
