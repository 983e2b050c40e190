"""The S6 scan, fast on a CPU: what has both a position and a state axis never leaves the cache, forward or backward.

Written out, exp(dt·A), dt·B·x and h take 4·b·t·d·n bytes each (200 MB for one layer of mamba-130m on 4 × 512 tokens),
and memory traffic, not arithmetic, sets the time. So the scan goes tile by tile (rows of the batch × channels), and in
a tile by chunks of positions. Forward keeps the state at the start of each chunk only; backward computes a chunk's
states again and runs its adjoint over them while they are at hand. Channels are innermost in the buffers, as n (16)
makes too short a row for vector instructions, and decays are powers of two, as torch's `exp2` is three times as fast as
its `exp`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from circuitbench.recurrences._linear import linear_states

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# Measured on a Zen 4 core (1 MB second-level cache): half or twice of either number is slower, backward most.
CHUNK = 16  # positions between kept states
TILE = 24_576  # state numbers of a tile


def selective_scan(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    initial_state: Float[Tensor, "b d n"],
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Outputs without the skip, and final state. All operands have the same floating dtype."""
    return _SelectiveScan.apply(x, dt, A, B, C, initial_state)


def plain_scan(
    decay: Float[Tensor, "b t *h d n"],
    write: Float[Tensor, "b t *h d n"],
    C: Float[Tensor, "b t *h n"],
    initial_state: Float[Tensor, "b *h d n"],
) -> tuple[Float[Tensor, "b t *h d"], Float[Tensor, "b *h d n"]]:
    """The same from written-out decays and writes, differentiable to any order."""
    states = linear_states(decay, write, initial_state)
    return torch.einsum("...dn,...n->...d", states, C), states[:, -1].clone()


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, initial_state):
        x, dt, B, C = x.contiguous(), dt.contiguous(), B.contiguous(), C.contiguous()
        batch, length, channels = x.shape
        log2_decay = (A * math.log2(math.e)).t().contiguous()
        y, final = torch.empty_like(x), torch.empty_like(initial_state)
        needs_x, needs_dt, needs_A, needs_B, needs_C, _ = ctx.needs_input_grad
        ctx.needs_states = needs_dt or needs_A or needs_C
        kept = x.new_empty(-(-length // CHUNK) if ctx.needs_states else 0, batch, A.shape[1], channels)
        for rows, columns in _tiles(batch, channels, A.shape[1], x.device):
            tile = _Tile(rows, columns, x, dt, B, C, log2_decay)
            h = initial_state[rows, columns].transpose(1, 2).contiguous()
            outputs = y[rows, :, columns].transpose(0, 1)
            for i, start in enumerate(range(0, length, CHUNK)):
                if ctx.needs_states:
                    kept[i, rows, :, columns] = h
                span = slice(start, start + CHUNK)
                decays, states = tile.states(span, h)
                outputs[span] = (tile.C[span].mT @ states).squeeze(2)
                h = states[-1].clone()
            final[rows, columns] = h.transpose(1, 2)
        ctx.save_for_backward(x, dt, A, B, C, initial_state)
        ctx.kept, ctx.log2_decay = kept, log2_decay
        return y, final

    @staticmethod
    def backward(ctx, *grads):
        grad_y, grad_final = grads
        x, dt, A, B, C, initial_state = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: what follows is differentiable only through the plain scan
            inputs = (x, dt, A, B, C, initial_state)
            wanted = [v for v, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
            decay, write = torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None]
            outputs = zip(plain_scan(decay, write, C, initial_state), (grad_y, grad_final), strict=True)
            reached, grads_in = zip(*(pair for pair in outputs if pair[0].requires_grad), strict=True)
            found = iter(torch.autograd.grad(reached, wanted, grads_in, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)

        batch, length, channels = x.shape
        grad_y = grad_y.contiguous()
        grad_x, grad_dt, grad_A = torch.empty_like(x), torch.zeros_like(dt), torch.zeros_like(A)
        grad_B, grad_C, grad_start = torch.zeros_like(B), torch.zeros_like(C), torch.empty_like(initial_state)
        for rows, columns in _tiles(batch, channels, A.shape[1], x.device):
            tile = _Tile(rows, columns, x, dt, B, C, ctx.log2_decay)
            rate = A[columns].t().contiguous()
            tile_grad_A = torch.zeros_like(rate)
            from_y = grad_y[rows, :, columns].transpose(0, 1)[:, :, None]
            to_x, to_dt = (g[rows, :, columns].transpose(0, 1) for g in (grad_x, grad_dt))
            to_B, to_C = (g[rows].transpose(0, 1) for g in (grad_B, grad_C))
            later = grad_final[rows, columns].transpose(1, 2)
            for start in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
                span = slice(start, start + CHUNK)
                before = ctx.kept[start // CHUNK, rows, :, columns] if ctx.needs_states else None
                decays, states = (tile.decays(span), None) if before is None else tile.states(span, before)
                # g_t = ∂L/∂h_t: what y_t reads, and what h_{t+1} keeps
                adjoint = torch.mul(from_y[span], tile.C[span], out=tile.adjoint[: len(decays)])
                g, a = adjoint.unbind(0), decays.unbind(0)
                g[-1].add_(later)
                for t in range(len(g) - 2, -1, -1):
                    g[t].addcmul_(a[t + 1], g[t + 1])
                steps = tile.dt[span]
                grad_write = (tile.B[span].mT @ adjoint).squeeze(2)
                to_B[span] += (adjoint @ (steps * tile.x[span]).mT).squeeze(3)
                to_x[span] = grad_write * steps.squeeze(2)
                decays.mul_(adjoint)  # a_t·g_t, the gradient at h_{t-1}; times h_{t-1}, that at log a_t
                later = decays[0].clone()
                if before is not None and states is not None:
                    to_C[span] += (states @ from_y[span].mT).squeeze(3)
                    decays[0].mul_(before)
                    decays[1:].mul_(states[:-1])
                    to_dt[span] = (
                        torch.mul(decays, rate, out=adjoint).sum(2).addcmul_(grad_write, tile.x[span].squeeze(2))
                    )
                    tile_grad_A += decays.mul_(steps).sum((0, 1))
            grad_A[columns] += tile_grad_A.t()
            grad_start[rows, columns] = later.transpose(1, 2)
        found = (grad_x, grad_dt, grad_A, grad_B, grad_C, grad_start)
        return tuple(grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad, strict=True))


class _Tile:
    """One tile's operands, positions first and ready to broadcast to (position, row, n, channel), and its buffers."""

    def __init__(self, rows, columns, x, dt, B, C, log2_decay):
        self.x, self.dt = (v[rows, :, columns].transpose(0, 1)[:, :, None] for v in (x, dt))
        self.B, self.C = (v[rows].transpose(0, 1)[..., None] for v in (B, C))
        self.log2_decay = log2_decay[:, columns]
        size = (min(CHUNK, len(self.x)), self.x.shape[1], *self.log2_decay.shape)
        self._decays, self._states, self.adjoint = (x.new_empty(size) for _ in range(3))

    def decays(self, span: slice) -> Tensor:
        steps = self.dt[span]
        return torch.mul(steps, self.log2_decay, out=self._decays[: len(steps)]).exp2_()

    def states(self, span: slice, h: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and states of a chunk that starts from h. They live in buffers that the next call overwrites."""
        decays = self.decays(span)
        states = torch.mul(self.dt[span] * self.x[span], self.B[span], out=self._states[: len(decays)])
        for a, state in zip(decays.unbind(0), states.unbind(0), strict=True):
            h = state.addcmul_(a, h)
        return decays, states


def _tiles(batch: int, channels: int, n: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Rows × channels of at most TILE state numbers, channels as even as possible. On a GPU one tile has it all."""
    limit = TILE if device.type == "cpu" else batch * channels * n
    parts = -(-channels * n // limit)
    wide = -(-channels // parts)
    high = max(1, limit // (wide * n))
    for row in range(0, batch, high):
        for column in range(0, channels, wide):
            yield slice(row, min(batch, row + high)), slice(column, min(channels, column + wide))
