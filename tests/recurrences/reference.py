"""Each recurrence as its paper writes it: one step at a time, in float64, sharing nothing with the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.recurrences.cases import FIXED

Change = Callable[[Tensor], Tensor]


def s6_step(now: dict[str, Tensor], h: Tensor, decay: Tensor | None, write: Change) -> Tensor:
    """Mamba, equations 2a and 4: every channel's diagonal A discretised by its own dt."""
    dt = now["dt"][..., None]
    kept = torch.exp(dt * now["A"]) if decay is None else decay
    return kept * h + write(dt * now["B"][..., None, :] * now["x"][..., None])


def s6_read(now: dict[str, Tensor], h: Tensor) -> Tensor:
    return (h * now["C"][..., None, :]).sum(-1)


def ssd_step(now: dict[str, Tensor], h: Tensor, decay: Tensor | None, write: Change) -> Tensor:
    """Mamba-2, equation 16, head by head; head i reads group i // (heads per group)."""
    kept = torch.exp(now["dt"] * now["A"]) if decay is None else decay
    heads, groups = now["x"].shape[1], now["B"].shape[1]
    added = torch.stack(
        [
            now["dt"][:, i, None, None] * now["x"][:, i, :, None] * now["B"][:, i // (heads // groups), None, :]
            for i in range(heads)
        ],
        1,
    )
    return kept[:, :, None, None] * h + write(added)


def ssd_read(now: dict[str, Tensor], h: Tensor) -> Tensor:
    heads, groups = h.shape[1], now["C"].shape[1]
    return torch.stack([(h[:, i] * now["C"][:, i // (heads // groups), None, :]).sum(-1) for i in range(heads)], 1)


def delta_step(now: dict[str, Tensor], S: Tensor, decay: Tensor | None, write: Change) -> Tensor:
    """Gated DeltaNet, equation 10, with its S transposed: S = a·(I − beta·k·kᵀ)·S + beta·k·vᵀ."""
    a = (now["g"].exp() if decay is None else decay)[:, :, None, None]
    k, v, beta = now["B"][..., None], now["x"][:, :, None, :], now["beta"][:, :, None, None]
    erased = torch.eye(k.shape[2], dtype=S.dtype) - beta * k * k.transpose(2, 3)
    full = erased @ (a * S) + beta * k * v
    return a * S + write(full - a * S)


def delta_read(now: dict[str, Tensor], S: Tensor) -> Tensor:
    return (S * now["C"][..., None]).sum(2)


def kda_step(now: dict[str, Tensor], S: Tensor, decay: Tensor | None, write: Change) -> Tensor:
    """Kimi Linear, equation 1: S = (I − beta·k·kᵀ)·Diag(a)·S + beta·k·vᵀ."""
    a = (now["g"].exp() if decay is None else decay)[..., None]
    k, v, beta = now["B"][..., None], now["x"][:, :, None, :], now["beta"][:, :, None, None]
    erased = torch.eye(k.shape[2], dtype=S.dtype) - beta * k * k.transpose(2, 3)
    full = erased @ (a * S) + beta * k * v
    return a * S + write(full - a * S)


def rwkv7_step(now: dict[str, Tensor], S: Tensor, decay: Tensor | None, write: Change) -> Tensor:
    """RWKV-7, equation 16, with its S transposed: S = (diag(w) + b·aᵀ)·S + k·vᵀ, where a = −κ̂ and b = κ̂ ⊙ a_paper."""
    kept = torch.diag_embed(now["w"].exp() if decay is None else decay)
    full = (kept + now["b"][..., None] * now["a"][:, :, None, :]) @ S + now["k"][..., None] * now["x"][:, :, None, :]
    return kept @ S + write(full - kept @ S)


def rwkv7_read(now: dict[str, Tensor], S: Tensor) -> Tensor:
    return (S * now["r"][..., None]).sum(2)


def rg_lru_step(now: dict[str, Tensor], h: Tensor, decay: Tensor | None, write: Change) -> Tensor:
    """Griffin, equation 4, its input as the recurrence gets it."""
    return (now["a"] if decay is None else decay) * h + write(now["x"])


def rg_lru_read(now: dict[str, Tensor], h: Tensor) -> Tensor:
    return h


def wkv4_units(now: dict[str, Tensor]) -> Tensor:
    """RWKV-4: the largest exponent so far."""
    return torch.maximum(now["m before"] + now["w"], now["k"])


def wkv4_step(now: dict[str, Tensor], h: Tensor, decay: Tensor | None, write: Change) -> Tensor:
    """RWKV-4: weights exp(k), which decay by exp(w) a step; in units of exp(m)."""
    kept = torch.exp(now["m before"] - now["m"] + now["w"]) if decay is None else decay
    weight = torch.exp(now["k"] - now["m"])
    return kept[..., None] * h + write(torch.stack((weight * now["x"], weight), -1))


def wkv4_read(now: dict[str, Tensor], h: Tensor) -> Tensor:
    """Of the state one position earlier: the present value counts exp(u) times."""
    bonus = torch.exp(now["k"] + now["u"] - now["m before"])
    return (h[..., 0] + bonus * now["x"]) / (h[..., 1] + bonus)


def mlstm_units(now: dict[str, Tensor]) -> Tensor:
    """xLSTM, equation 15: the stabiliser state."""
    return torch.maximum(now["m before"] + logsigmoid(now["forget_gate"]), now["input_gate"])


def mlstm_step(now: dict[str, Tensor], S: Tensor, decay: Tensor | None, write: Change) -> Tensor:
    """xLSTM, equations 19 and 20: C and, as one more column, n."""
    kept = torch.exp(logsigmoid(now["forget_gate"]) + now["m before"] - now["m"]) if decay is None else decay
    weight = torch.exp(now["input_gate"] - now["m"])[..., None]
    columns = torch.cat((now["x"], torch.ones_like(now["x"][..., :1])), -1)
    return kept[..., None, None] * S + write((weight * now["B"])[..., None] * columns[:, :, None, :])


def mlstm_read(now: dict[str, Tensor], S: Tensor) -> Tensor:
    """xLSTM, equation 21, as the released code has it: the bound on the denominator is 1 in natural units."""
    sums = (S * now["C"][..., None]).sum(2)
    return sums[..., :-1] / (torch.maximum(sums[..., -1:].abs(), torch.exp(-now["m"])[..., None]) + now["eps"])


UNITS = {"wkv4": wkv4_units, "mlstm": mlstm_units}  # recurrences whose state is held in units of exp(m)
STEPS = {
    "s6": (s6_step, s6_read),
    "ssd": (ssd_step, ssd_read),
    "gated_delta": (delta_step, delta_read),
    "kda": (kda_step, delta_read),
    "rwkv7": (rwkv7_step, rwkv7_read),
    "rg_lru": (rg_lru_step, rg_lru_read),
    "wkv4": (wkv4_step, wkv4_read),
    "mlstm": (mlstm_step, mlstm_read),
}


def run(
    name: str,
    operands: Mapping[str, Tensor],
    initial_state: Tensor,
    D: Tensor | None = None,
    edits: Mapping[int, Change] | None = None,
    when: str = "before_read",
    write: Mapping[int, Change] | None = None,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs `(b, t, ...)` and states `(b, t, *state)`.

    Args:
        edits: position -> function of h_t, written into the loop.
        write: position -> what is added to the state instead of what the model would add.
        decay: replaces the model's own, in the shape of `decay_of`.
    """
    step, read = STEPS[name]
    operands = {key: value.double() for key, value in operands.items()}
    fixed, m = FIXED.get(name, set()), operands.get("initial_scale", torch.zeros(()))
    h, outputs, states = initial_state.double(), [], []
    for t in range(operands["x"].shape[1]):
        now = {key: value if key in fixed else value[:, t] for key, value in operands.items()}
        if name in UNITS:
            now["m before"] = m
            m = now["m"] = UNITS[name](now)
        before = h
        h = step(now, h, None if decay is None else decay[:, t].double(), (write or {}).get(t, lambda own: own))
        edited = (edits or {}).get(t, lambda own: own)(h)
        outputs.append(read(now, before if name == "wkv4" else edited if when == "before_read" else h))
        states.append(edited)
        h = edited
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + (D.double()[:, None] if D.ndim < y.ndim - 2 else D.double()) * operands["x"]
    return y, torch.stack(states, 1)
