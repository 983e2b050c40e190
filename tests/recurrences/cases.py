"""Random operands for every recurrence, in the ranges real layers have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from circuitbench.recurrences import RECURRENCES

NAMES = list(RECURRENCES)
each_recurrence = pytest.mark.parametrize("name", NAMES)
# y of RWKV-4 reads the state before its position's write, so an edit there cannot come before the read.
MOMENTS = [(name, when) for name in NAMES for when in ("before_read", "after_read") if (name, when[0]) != ("wkv4", "b")]
each_moment = pytest.mark.parametrize(("name", "when"), MOMENTS)
BY_CHANNEL = {"s6", "rg_lru", "wkv4"}  # a mixing matrix for every channel, not for every head
RATIOS = {"wkv4", "mlstm"}  # y is a ratio whose denominator comes out of the state, and the state has a scale
FIXED = {"s6": {"A"}, "ssd": {"A"}, "wkv4": {"w", "u", "initial_scale"}, "mlstm": {"initial_scale", "eps"}}


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

    def part(self, positions: slice) -> dict[str, Tensor]:
        """The operands at some positions."""
        fixed = FIXED.get(self.name, set())
        return {key: value if key in fixed else value[:, positions] for key, value in self.operands.items()}

    @property
    def start(self) -> dict[str, Tensor]:
        """The initial state, for verbs that need it where y is a ratio and not where y is linear in the state."""
        return {"initial_state": self.initial_state} if self.name in RATIOS else {}

    def some_state(self) -> Tensor:
        """Another state that may be: the denominator of RWKV-4 is a sum of weights."""
        state = torch.randn_like(self.initial_state)
        return torch.stack((state[..., 0], state[..., 1].abs() + 0.5), -1) if self.name == "wkv4" else state


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


def rwkv7_case(batch: int, length: int, heads: int = 3, dk: int = 4, dv: int = 5) -> Case:
    keys = (batch, length, heads, dk)
    w, removed = -math.exp(-0.5) * torch.rand(keys), F.normalize(torch.randn(keys), dim=-1)
    operands = {"x": torch.randn(batch, length, heads, dv), "r": torch.randn(keys), "w": w, "k": torch.randn(keys)}
    operands |= {"a": -removed, "b": removed * torch.rand(keys)}
    return Case("rwkv7", operands, torch.randn(heads), torch.randn(batch, heads, dk, dv))


def rg_lru_case(batch: int, length: int, channels: int = 5) -> Case:
    a = torch.sigmoid(torch.randn(batch, length, channels) + 2)
    a[:, length // 2 : length // 2 + 1, 0] = 0.0  # a document begins
    operands = {"x": torch.randn(batch, length, channels), "a": a}
    return Case("rg_lru", operands, torch.randn(channels), torch.randn(batch, channels))


def wkv4_case(batch: int, length: int, channels: int = 5) -> Case:
    x, k = torch.randn(batch, length, channels), 2 * torch.randn(batch, length, channels)
    w, u = -torch.linspace(-5, 1, channels).exp(), torch.randn(channels)
    operands = {"x": x, "k": k, "w": w, "u": u, "initial_scale": torch.randn(batch, channels)}
    state = torch.stack((torch.randn(batch, channels), 0.5 + torch.rand(batch, channels)), -1)
    return Case("wkv4", operands, torch.randn(channels), state)


def mlstm_case(batch: int, length: int, heads: int = 3, dk: int = 4, dv: int = 5) -> Case:
    x, keys = torch.randn(batch, length, heads, dv), (batch, length, heads, dk)
    gates = 2 * torch.randn(2, batch, length, heads)
    operands = {"x": x, "B": torch.randn(keys), "C": torch.randn(keys) * dk**-0.5, "input_gate": gates[0]}
    operands |= {"forget_gate": gates[1] + 2, "initial_scale": torch.randn(batch, heads), "eps": torch.tensor(1e-3)}
    return Case("mlstm", operands, torch.randn(heads), torch.randn(batch, heads, dk, dv + 1))


CASES = {"s6": s6_case, "ssd": ssd_case, "gated_delta": delta_case, "kda": kda_case, "rwkv7": rwkv7_case}
CASES |= {"rg_lru": rg_lru_case, "wkv4": wkv4_case, "mlstm": mlstm_case}


def case(name: str, batch: int = 2, length: int = 37, **sizes: int) -> Case:
    return CASES[name](batch, length, **sizes)


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
    ("rwkv7", {"batch": 2, "length": 37}),
    ("rwkv7", {"batch": 1, "length": 1}),
    ("rwkv7", {"batch": 2, "length": 96, "dk": 8, "dv": 2}),
    ("rwkv7", {"batch": 1, "length": 75, "heads": 1, "dk": 1, "dv": 7}),
    ("rg_lru", {"batch": 2, "length": 37}),
    ("rg_lru", {"batch": 1, "length": 1}),
    ("wkv4", {"batch": 2, "length": 37}),
    ("wkv4", {"batch": 1, "length": 1}),
    ("wkv4", {"batch": 3, "length": 200, "channels": 2}),
    ("mlstm", {"batch": 2, "length": 37}),
    ("mlstm", {"batch": 1, "length": 1}),
    ("mlstm", {"batch": 2, "length": 96, "dk": 8, "dv": 2}),  # whole chunks
    ("mlstm", {"batch": 1, "length": 75, "heads": 1, "dk": 1, "dv": 7}),
]
each_shape = pytest.mark.parametrize(("name", "sizes"), SHAPES, ids=lambda v: v if isinstance(v, str) else str(v))


def close(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Within `relative` of the largest expected number."""
    error = (actual.double() - expected.double()).abs().max().item()
    scale = expected.abs().max().item()
    assert error <= relative * max(scale, 1e-12), f"off by {error:.2e} where the largest number is {scale:.2e}"
