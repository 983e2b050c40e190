"""The running maximum that keeps exponential gates in range (Milakov & Gimelshein 2018, arXiv:1805.02867; RWKV, xLSTM).

Where a state is a sum of exp(key)·value, its numbers grow without bound, so the models hold it in units of exp(m_t),
with m_t = max(m_{t-1} + log decay_t, key_t): the largest term is then 1. m depends on keys and decays, never on the
state, so in these units the state is still a linear recurrence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def running_max(
    log_decay: Float[Tensor, "b t ..."], key: Float[Tensor, "b t ..."], start: Float[Tensor, "b ..."]
) -> Float[Tensor, "b t ..."]:
    """All m_t = max(m_{t-1} + log_decay_t, key_t), from m_{-1} = start; differentiable at O(L) cost."""
    with torch.no_grad():
        m = torch.empty_like(key)
        last = start
        for step, now, out in zip(log_decay.unbind(1), key.unbind(1), m.unbind(1), strict=True):
            last = torch.maximum(torch.add(last, step, out=out), now, out=out)
    if not (torch.is_grad_enabled() and any(value.requires_grad for value in (log_decay, key, start))):
        return m
    # The derivative is that of the path to the last position whose key was the largest; the numbers stay the loop's.
    position = torch.arange(key.shape[1], device=key.device).reshape(-1, *[1] * (key.ndim - 2))
    source = torch.where(m == key, position, -1).cummax(1).values
    total = log_decay.cumsum(1)
    since = torch.where(source >= 0, total.gather(1, source.clamp(min=0)), 0.0)
    path = torch.where(source >= 0, key.gather(1, source.clamp(min=0)), start[:, None]) + total - since
    return m + (path - path.detach())


def before(values: Float[Tensor, "b t ..."], start: Float[Tensor, "b ..."]) -> Float[Tensor, "b t ..."]:
    """What came one position earlier, `start` at the first."""
    return torch.cat((start[:, None], values[:, :-1]), 1)
