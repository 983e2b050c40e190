"""Recurrences as somebody would write them down for `Stepwise`: three of the package's, and one that is nobody's."""

from __future__ import annotations

import torch
from torch import Tensor

from circuitbench.recurrences import Stepwise


def s6_step(h, now):
    return now.decay * h + (now.dt * now.x)[..., None] * now.B[:, None]


def s6_read(h, now):
    return (h @ now.C[..., None])[..., 0]


def ssd_step(h, now):
    B = now.B.repeat_interleave(h.shape[1] // now.B.shape[1], 1)
    return now.decay * h + (now.dt[..., None] * now.x)[..., None] * B[:, :, None]


def ssd_read(h, now):
    return torch.einsum("bhpn,bhn->bhp", h, now.C.repeat_interleave(h.shape[1] // now.C.shape[1], 1))


def delta_step(S, now):
    S *= now.decay  # in place: the state it is given is its own
    missing = now.x - torch.einsum("bhkv,bhk->bhv", S, now.B)
    return S + (now.beta[..., None] * now.B)[..., None] * missing[:, :, None]


def delta_read(S, now):
    return torch.einsum("bhkv,bhk->bhv", S, now.C)


STEPWISE = {
    "s6": Stepwise(
        s6_step,
        s6_read,
        {"x": "b t d", "dt": "b t d", "A": "d n", "B": "b t n", "C": "b t n"},
        "b d n",
        decay=lambda now: torch.exp(now.dt[..., None] * now.A),
        decay_axes="b d n",
        linear=True,
    ),
    "ssd": Stepwise(
        ssd_step,
        ssd_read,
        {"x": "b t h p", "dt": "b t h", "A": "h", "B": "b t g n", "C": "b t g n"},
        "b h p n",
        decay=lambda now: torch.exp(now.dt * now.A),
        decay_axes="b h",
        linear=True,
    ),
    "gated_delta": Stepwise(
        delta_step,
        delta_read,
        {"x": "b t h v", "B": "b t h k", "C": "b t h k", "g": "b t h", "beta": "b t h"},
        "b h k v",
        decay=lambda now: torch.exp(now.g),
        decay_axes="b h",
        linear=True,
    ),
}


# A memory of two layers that takes gradient steps on what it got wrong: y is linear in nothing.


def recall(memory, key):
    """What a memory `(2, v, v)` says to one key `(v,)`."""
    return torch.tanh(key @ memory[0]) @ memory[1]


def loss(memory, key, value):
    return (recall(memory, key) - value).square().sum() / 2


def deep_step(state, now):
    slopes = torch.func.vmap(torch.func.grad(loss))(state, now.k, now.x)
    return now.decay * state - now.rate[:, None, None, None] * slopes


def deep_read(state, now):
    return torch.func.vmap(recall)(state, now.q)


DEEP = Stepwise(
    deep_step,
    deep_read,
    {"x": "b t v", "k": "b t v", "q": "b t v", "rate": "b t", "keep": "b t"},
    "b 2 v v",
    decay=lambda now: now.keep,
    decay_axes="b",
)


def deep_case(length: int = 11) -> tuple[dict[str, Tensor], Tensor]:
    operands = {name: torch.randn(2, length, 4, dtype=torch.float64) for name in "xkq"}
    operands |= {"rate": torch.rand(2, length, dtype=torch.float64), "keep": torch.rand(2, length, dtype=torch.float64)}
    return operands, torch.randn(2, 2, 4, 4, dtype=torch.float64)
