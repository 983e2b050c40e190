"""Delta rules whose state decays channel by channel ("diagonal plus low rank"): what RWKV-7 and KDA share.

On a state S `(b, h, dk, dv)`, every step is

    z_t = S_{t-1}ᵀ probe_t,    S_t = Diag(decay_t)·S_{t-1} + back_t⊗z_t + k_t⊗x_t,    y_t = S_tᵀ r_t:

the probe asks the old state, and what it answers is put back along another direction. Operands over positions, all in
one dtype: `decay`, `probe`, `back`, `k`, `r` `(b, t, h, dk)`, and the values `x` `(b, t, h, dv)`. A plain delta rule,
which writes k⊗(x − z), has back = −k: leave `back` out, and half of the work goes with it.

* RWKV-7 (with a and b as its kernels name them): probe = a, back = b.
* KDA: k = beta·key, probe = exp(g)·key, no `back`.

The functions take the operands as a dictionary by these names; they are what the verbs of both modules call. Decays may
have any sign and size, and be zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from circuitbench.recurrences._linear import (
    check_edits,
    linear_states,
    memory_cuts,
    scan_with_edits,
    segments,
    states_with_edits,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from circuitbench.recurrences._linear import Edits

CHUNK = 32  # positions solved together, a power of two
MOST_DECAY = 20.0  # up to a product of e^±20 over a block, dividing by products of decays is safe in float32


def dplr_forward(
    steps: dict[str, Tensor], state: Tensor, edits: Edits | None, when: str, cuts: list[int]
) -> tuple[Tensor, Tensor]:
    """Output and final state.

    Args:
        steps: the operands, and what `dplr_with_write` adds to them.
        state: the state before position 0.
        cuts: positions before which a run ends, from `dplr_with_write`.
    """
    return scan_with_edits(_scan, _read, steps, state, check_edits(edits, steps["x"].shape[1], when), when, cuts)


def dplr_states(
    steps: dict[str, Tensor], state: Tensor, edits: Edits | None, when: str, cuts: list[int]
) -> Float[Tensor, "b t h dk dv"]:
    """All states S_t, after edits; arguments as in `dplr_forward`."""
    checked = check_edits(edits, steps["x"].shape[1], when)
    runs = [h for _, h in states_with_edits(_states, steps, state, checked, cuts)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


def dplr_iter_states(
    steps: dict[str, Tensor], state: Tensor, edits: Edits | None, when: str, cuts: list[int], chunk: int | None
) -> Iterator[tuple[int, Float[Tensor, "b c h dk dv"]]]:
    """(first position, states of the next `chunk` positions or fewer); other arguments as in `dplr_forward`."""
    checked = check_edits(edits, steps["x"].shape[1], when)
    return states_with_edits(_states, steps, state, checked, [*cuts, *memory_cuts(chunk, state, steps["x"].shape[1])])


def dplr_write(steps: dict[str, Tensor], state: Tensor) -> Float[Tensor, "b t h dk dv"]:
    """back⊗z + k⊗x: what each step adds to the decayed state."""
    z, _, _ = _chunked(steps, state)
    return _added(steps, z)


def dplr_with_write(
    steps: dict[str, Tensor], write: Float[Tensor, "b t h dk dv"] | None, own: Float[Tensor, "b t h dk dv"] | None
) -> tuple[dict[str, Tensor], list[int]]:
    """The operands with a given write among them, and the cuts around the positions where it differs from `own`.

    Where it is equal, the rule stands. If the write needs a gradient, every position is run by itself: the gradient is
    that of this position's write, later ones following the rule.
    """
    if write is None or own is None:
        return steps, []
    own = own.to(write.dtype)
    dtype = steps["x"].dtype
    forced = (write != own).flatten(3).any(-1)
    steps = {**steps, "write": write.to(dtype), "forced": forced}
    if torch.is_grad_enabled() and write.requires_grad:
        # Zero wherever it is used: it carries the gradient of `write`, and takes out what x would get twice.
        steps["shift"] = (write - own).to(dtype)
        positions = range(write.shape[1])
    else:
        positions = forced.any(2).any(0).nonzero().flatten().tolist()
    return steps, [cut for t in positions for cut in (t, t + 1)]


def dplr_adjoint(
    steps: dict[str, Tensor], grad_y: Float[Tensor, "b t h dv"], grad_final: Float[Tensor, "b h dk dv"]
) -> Float[Tensor, "b t h dk dv"]:
    """∂L/∂S_t at every position: G_t = r_t⊗∂L/∂y_t + (Diag(decay) + probe⊗back)|_{t+1} G_{t+1}.

    That is a rule of the same kind, backwards in time, with probe and back in each other's place.
    """
    back = steps["back"] if "back" in steps else -steps["k"]

    def reversed_later(tensor: Tensor, last: float) -> Tensor:
        return torch.cat((torch.full_like(tensor[:, :1], last), tensor[:, 1:].flip(1)), 1)

    backwards = {
        "decay": reversed_later(steps["decay"], 1.0),
        "probe": reversed_later(back, 0.0),
        "back": reversed_later(steps["probe"], 0.0),
        "k": steps["r"].flip(1),
        "r": torch.zeros_like(steps["r"]),
        "x": grad_y.to(steps["x"]).flip(1),
    }
    return _states(backwards, grad_final).flip(1)


def dplr_mixing(steps: dict[str, Tensor]) -> Float[Tensor, "b h t t"]:
    """The recurrence as one causal matrix per head: y = mixing·x, from a zero state."""
    length = steps["x"].shape[1]
    padded = 2 ** (length - 1).bit_length()
    run = {key: value.transpose(1, 2) for key, value in _padded(steps, padded).items() if key != "x"}
    system, from_x, read_z, read_x, _ = _within(run, _block(run["decay"], padded))
    replies = torch.linalg.solve_triangular(system, from_x, upper=False, unitriangular=True)
    return (read_x + read_z @ replies)[..., :length, :length]


def _scan(run: dict[str, Tensor], S: Tensor) -> tuple[Tensor, Tensor]:
    if _given(run):
        S = _given_step(run, S)
        return _read(run, S), S
    _, y, S = _chunked(run, S)
    return y, S


def _read(run: dict[str, Tensor], S: Tensor) -> Tensor:
    return (run["r"][:, -1, :, None] @ S).transpose(1, 2)


def _given(run: dict[str, Tensor]) -> bool:
    """Whether the given write matters in this run, which is then one position long."""
    return "shift" in run or ("forced" in run and bool(run["forced"].any()))


def _given_step(run: dict[str, Tensor], S: Tensor) -> Tensor:
    """One position where some rows add the given write, and the others what the model's own rule says."""
    _, _, own = _chunked(run, S)
    if "shift" in run:
        own = own + run["shift"][:, 0]
    given = run["decay"][:, 0, ..., None] * S + run["write"][:, 0]
    return torch.where(run["forced"][:, 0, :, None, None], given, own)


def _states(run: dict[str, Tensor], S: Tensor) -> Tensor:
    if _given(run):
        return _given_step(run, S)[:, None]
    z, _, _ = _chunked(run, S)
    return linear_states(run["decay"][..., None], _added(run, z), S)


def _added(run: dict[str, Tensor], z: Tensor) -> Tensor:
    if "back" not in run:
        return run["k"][..., None] * (run["x"] - z)[..., None, :]
    keys, values = torch.stack((run["k"], run["back"]), -1), torch.stack((run["x"], z), -2)
    return keys @ values


def _chunked(run: dict[str, Tensor], S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replies z `(b, t, h, dv)`, outputs and final state: the whole chunks at once, then the rest."""
    names = [name for name in ("decay", "probe", "back", "k", "r", "x") if name in run]
    replies, outputs = [], []
    for start, stop, part in segments({name: run[name] for name in names}, chunk=CHUNK):
        z, y, S = _one_step(part, S) if stop - start == 1 else _equal_chunks(part, S)
        replies.append(z)
        outputs.append(y)
    if len(outputs) == 1:
        return replies[0], outputs[0], S
    return torch.cat(replies, 1), torch.cat(outputs, 1), S


def _one_step(run: dict[str, Tensor], S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    now = {key: value[:, 0] for key, value in run.items()}
    z = (now["probe"][..., None, :] @ S).transpose(1, 2)
    S = now["decay"][..., None] * S + _added(run, z)[:, 0]
    return z, _read(run, S), S


def _equal_chunks(run: dict[str, Tensor], S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The WY form of DeltaNet (Yang et al. 2024, arXiv:2406.06484) with a decay per channel.

    Within a chunk that starts from S, with P_i the product of the decays up to i and K_ij that of j+1 … i,
    z_i = (probe_i·P_{i-1})ᵀS + Σ_{j<i} (probe_i·K_{i-1,j}·back_j) z_j + (probe_i·K_{i-1,j}·k_j) x_j: a triangular system
    for all positions, which is solved before S is known. Only two products run from chunk to chunk.
    """
    length = run["x"].shape[1]
    size = min(CHUNK, 2 ** (length - 1).bit_length())
    run = _padded(run, -(-length // size) * size)
    run = {key: value.unflatten(1, (-1, size)).transpose(2, 3).contiguous() for key, value in run.items()}
    system, from_x, read_z, read_x, (first, last) = _within(run, _block(run["decay"], size))
    x, k, total = run["x"], run["k"], first[..., -1, :, None]
    probe = torch.cat((run["probe"][..., :1, :], run["probe"][..., 1:, :] * first[..., :-1, :]), -2)
    dk = probe.shape[-1]
    solved = torch.linalg.solve_triangular(system, torch.cat((probe, from_x @ x), -1), upper=False, unitriangular=True)
    from_state, from_values = solved.split((dk, x.shape[-1]), -1)
    added = (k * last).mT @ x
    back = ((run["back"] if "back" in run else -k) * last).mT
    replies, starts = [], []
    for probes, values, keep, add, put in zip(
        *(v.unbind(1) for v in (from_state, from_values, total, added, back)), strict=True
    ):
        starts.append(S)
        z = values + probes @ S
        replies.append(z)
        S = keep * S + add + put @ z
    z = torch.stack(replies, 1)
    y = (run["r"] * first) @ torch.stack(starts, 1) + read_x @ x + read_z @ z
    return _joined(z, length), _joined(y, length), S


def _joined(chunks: Float[Tensor, "b n h c d"], length: int) -> Float[Tensor, "b t h d"]:
    return chunks.transpose(2, 3).flatten(1, 2)[:, :length]


def _padded(run: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Positions that leave the state as it is, up to `length` of them."""
    missing = length - run["x"].shape[1]
    if missing == 0:
        return run
    return {
        key: F.pad(value, (0, 0, 0, 0, 0, missing), value=1.0 if key == "decay" else 0.0) for key, value in run.items()
    }


def _within(run: dict[str, Tensor], block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What positions of one chunk do to each other: operands `(..., c, d)`.

    Returns:
        The system of the replies (its lower triangle counts), what x adds to its right side, how y reads the replies,
        how it reads x, each `(..., c, c)`; and the products of decays up to each position and after it.
    """
    following = torch.cat((run["probe"][..., 1:, :], torch.zeros_like(run["probe"][..., :1, :])), -2)
    asks = torch.stack((following, run["r"]), -2)
    tells = torch.stack((run["k"], run["back"]), -2) if "back" in run else run["k"][..., None, :]
    pairs, products = _pairs(asks, tells, run["decay"], block)
    # Row i of the first question is what position i+1 asks of the state that i left.
    before, now = pairs.unbind(-3)
    before = torch.cat((torch.zeros_like(before[..., :1, :, :]), before[..., :-1, :, :]), -3)
    from_x, read_x = before[..., 0], now[..., 0]
    from_z, read_z = (before[..., 1], now[..., 1]) if "back" in run else (-from_x, -read_x)
    return -from_z, from_x, read_z, read_x, products


def _block(decay: Tensor, most: int) -> int:
    """How many positions, a power of two, may share one reference point that all products are divided by."""
    low, high = (float(v) for v in torch.aminmax(decay.detach()))
    if not (low > 0 and high < math.inf):
        return 1
    steepest = max(-math.log(low), math.log(high), MOST_DECAY / most)
    return min(most, 2 ** int(math.log2(max(1.0, MOST_DECAY / steepest))))


def _pairs(
    asks: Float[Tensor, "... c n d"], tells: Float[Tensor, "... c m d"], decay: Float[Tensor, "... c d"], block: int
) -> tuple[Float[Tensor, "... c n c m"], tuple[Float[Tensor, "... c d"], Float[Tensor, "... c d"]]]:
    """[i, :, j, :] = Σ_d asks_i·(decay_{j+1} … decay_i)·tells_j, zero for j > i; and the products of decays.

    Blocks of `block` positions divide by the products since their start. Then two neighbours at a time become one: what
    the later asks of the earlier passes the border between them, from where products run in both directions; nothing is
    divided, so no decay is too small.

    Returns:
        The pairs, and the products up to each position (with its own decay) and after it.
    """
    length, n, m = decay.shape[-2], asks.shape[-2], tells.shape[-2]
    inner = decay.unflatten(-2, (-1, block))
    since_first = torch.cat((torch.ones_like(inner[..., :1, :]), inner[..., 1:, :].cumprod(-2)), -2)
    until, after = since_first * inner[..., :1, :], since_first[..., -1:, :] / since_first
    asks, tells = asks.unflatten(-3, (-1, block)), tells.unflatten(-3, (-1, block))
    pairs = (asks * since_first[..., None, :]).flatten(-3, -2) @ (tells / since_first[..., None, :]).flatten(-3, -2).mT
    position = torch.arange(block, device=decay.device)
    pairs = pairs.masked_fill(position.repeat_interleave(m) > position.repeat_interleave(n)[:, None], 0.0)
    while block < length:
        (pairs, later), (until, until_later), (after, after_later) = (
            v.unflatten(-3, (-1, 2)).unbind(-3) for v in (pairs, until, after)
        )
        later_asks = asks.unflatten(-4, (-1, 2))[..., 1, :, :, :] * until_later[..., None, :]
        earlier_tells = tells.unflatten(-4, (-1, 2))[..., 0, :, :, :] * after[..., None, :]
        across = later_asks.flatten(-3, -2) @ earlier_tells.flatten(-3, -2).mT
        none = pairs.new_zeros(1).expand(pairs.shape)
        pairs = torch.cat((torch.cat((pairs, none), -1), torch.cat((across, later), -1)), -2)
        after = torch.cat((after * until_later[..., -1:, :], after_later), -2)
        until = torch.cat((until, until_later * until[..., -1:, :]), -2)
        asks, tells = (v.unflatten(-4, (-1, 2)).flatten(-4, -3) for v in (asks, tells))
        block *= 2
    pairs = pairs.squeeze(-3).unflatten(-1, (length, m)).unflatten(-3, (length, n))
    return pairs, (until.squeeze(-3), after.squeeze(-3))
