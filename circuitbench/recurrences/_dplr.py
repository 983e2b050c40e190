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
TOGETHER = 2**18  # numbers of an operand that are worked on at once: what stays in a core's cache
MOST_DECAY = 20.0  # up to a product of e^±20 over a block, dividing by products of decays is safe in float32
SMALLEST_BLOCK = 8  # where a single decay may be tinier than e^(−20/8), its own gradient would lose digits


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
    carried, _ = _chunked(steps, state, "carried")
    return _added(steps, carried)


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
    steps = _padded(steps, 2 ** (length - 1).bit_length())
    within = _within({key: value.transpose(1, 2) for key, value in steps.items() if key != "x"})
    (probe_k, *probe_back), (r_k, *r_back) = within.pairs
    if probe_back:
        answers = torch.linalg.solve_triangular(-probe_back[0], probe_k, upper=False, unitriangular=True)
        mixing = r_k + r_back[0] @ answers
    else:
        mixing = r_k @ _inverse(probe_k)
    return mixing[..., :length, :length]


def _scan(run: dict[str, Tensor], S: Tensor) -> tuple[Tensor, Tensor]:
    if _given(run):
        S = _given_step(run, S)
        return _read(run, S), S
    return _chunked(run, S, "y")


def _read(run: dict[str, Tensor], S: Tensor) -> Tensor:
    return (run["r"][:, -1, :, None] @ S).transpose(1, 2)


def _given(run: dict[str, Tensor]) -> bool:
    """Whether the given write matters in this run, which is then one position long."""
    return "shift" in run or ("forced" in run and bool(run["forced"].any()))


def _given_step(run: dict[str, Tensor], S: Tensor) -> Tensor:
    """One position where some rows add the given write, and the others what the model's own rule says."""
    _, own = _chunked(run, S, "y")
    if "shift" in run:
        own = own + run["shift"][:, 0]
    given = run["decay"][:, 0, ..., None] * S + run["write"][:, 0]
    return torch.where(run["forced"][:, 0, :, None, None], given, own)


def _states(run: dict[str, Tensor], S: Tensor) -> Tensor:
    if _given(run):
        return _given_step(run, S)[:, None]
    carried, _ = _chunked(run, S, "carried")
    return linear_states(run["decay"][..., None], _added(run, carried), S)


def _added(run: dict[str, Tensor], carried: Tensor) -> Tensor:
    if "back" not in run:
        return run["k"][..., None] * carried[..., None, :]
    return torch.stack((run["k"], run["back"]), -1) @ torch.stack((run["x"], carried), -2)


def _chunked(run: dict[str, Tensor], S: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """`what` is asked for, `(b, t, h, dv)`, and the final state. By chunks: the whole ones at once, then the rest.

    Args:
        what: ``"y"``; or ``"carried"``, what `back` carries into the state: z (without `back`, what k does: x − z).
    """
    run = {name: run[name] for name in ("decay", "probe", "back", "k", "r", "x") if name in run}
    found, length = [], run["x"].shape[1]
    together = CHUNK * max(1, TOGETHER // (run["k"][:, :CHUNK].numel() or 1))
    for start, stop, part in segments(run, cuts=range(together, length, together), chunk=CHUNK):
        values, S = _one_step(part, S, what) if stop - start == 1 else _equal_chunks(part, S, what)
        found += values
    return found[0].contiguous() if len(found) == 1 else torch.cat(found, 1), S


def _one_step(run: dict[str, Tensor], S: Tensor, what: str) -> tuple[list[Tensor], Tensor]:
    carried = (run["probe"].transpose(1, 2) @ S).transpose(1, 2)
    if "back" not in run:
        carried = run["x"] - carried
    S = run["decay"][:, 0, ..., None] * S + _added(run, carried)[:, 0]
    return [carried if what == "carried" else _read(run, S)], S


def _equal_chunks(run: dict[str, Tensor], S: Tensor, what: str) -> tuple[list[Tensor], Tensor]:
    """The WY form of DeltaNet (Yang et al. 2024, arXiv:2406.06484) with a decay per channel.

    Within a chunk that starts from S, with P_i the product of the decays up to i and K_ij that of j+1 … i,
    z_i = (probe_i·P_{i-1})ᵀS + Σ_{j<i} (probe_i·K_{i-1,j}·back_j) z_j + (probe_i·K_{i-1,j}·k_j) x_j: one triangular
    system for all positions, whose inverse does not depend on S. So only a few products run from chunk to chunk.
    """
    batch, length, heads, _ = run["x"].shape
    size = min(CHUNK, 2 ** (length - 1).bit_length())
    run = _padded(run, -(-length // size) * size)
    run = {key: value.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4) for key, value in run.items()}
    x = run["x"].contiguous()
    within = _within(run)
    (probe_k, *probe_back), (r_k, *r_back) = within.pairs
    if probe_back:
        parts = [_inverse(-probe_back[0]), probe_k @ x, within.tells[1], r_back[0]]
        own = [part.flatten(1, 2).unbind(0) for part in (within.tells[0], x, r_k @ x)]
    else:
        parts = [_inverse(probe_k), x, within.tells[0], r_k]
        own = None
    parts += [*within.asks, within.total.mT]
    sign = 1 if probe_back else -1
    S, found = S.flatten(0, 1), []
    for n, (solve, right, tell, read, ask, query, keep) in enumerate(
        zip(*(part.flatten(1, 2).unbind(0) for part in parts), strict=True)
    ):
        z = y = solve @ torch.baddbmm(right, ask, S, alpha=sign)
        if what == "y":
            y = query @ S if own is None else torch.baddbmm(own[2][n], query, S)
            y.baddbmm_(read, z)
        found.append(y.unflatten(0, (batch, heads)).transpose(1, 2))
        S = torch.baddbmm(S if within.from_start else keep * S, tell, z)
        if own is not None:
            S.baddbmm_(own[0][n], own[1][n])
        if within.from_start:
            S = keep * S
    missing = len(found) * size - length
    found[-1] = found[-1][:, : size - missing]
    return found, S.unflatten(0, (batch, heads))


def _inverse(system: Float[Tensor, "... c c"]) -> Float[Tensor, "... c c"]:
    """Of the unit triangular matrix with what is below the diagonal of `system`."""
    eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)


def _padded(run: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Positions that leave the state as it is, up to `length` of them."""
    missing = length - run["x"].shape[1]
    if missing == 0:
        return run
    return {
        key: F.pad(value, (0, 0, 0, 0, 0, missing), value=1.0 if key == "decay" else 0.0) for key, value in run.items()
    }


class Within:
    """What the positions of each chunk do to each other, and to the state before and after it.

    Attributes:
        pairs: [[probe·k, probe·back], [r·k, r·back]], each `(..., c, c)`: the product over channels of what is asked at
            i, what is told at j, and the decays between (for the probe, which asks the state before i, up to i−1). Of
            the last one that the probe has, the system to solve, only what is below the diagonal counts.
        asks: probe and r, times the decays since the chunk's start, `(..., c, d)`.
        tells: k and back, times the decays until the chunk's end, `(..., d, c)`; or, where `from_start`, divided by
            those since its start.
        total: the product of the chunk's decays `(..., 1, d)`.
    """

    def __init__(
        self, pairs: list[list[Tensor]], asks: list[Tensor], tells: list[Tensor], total: Tensor, from_start: bool
    ) -> None:
        self.pairs = [[pair.squeeze(-3) for pair in row] for row in pairs]
        self.asks = [ask.squeeze(-3) for ask in asks]
        self.tells = [told.squeeze(-3) for told in tells]
        self.total = total.squeeze(-3)
        self.from_start = from_start


def _within(run: dict[str, Tensor]) -> Within:
    """By blocks, in which all is divided by the decays since their start, where these are not too small for that.

    Then two neighbours at a time become one: what the later asks of the earlier passes the border between them, from
    where products run in both directions. Nothing is divided, so no decay is too small.

    Args:
        run: operands `(..., c, d)`, c a power of two.
    """
    length = run["decay"].shape[-2]
    block = _safe_block(run["decay"], length)
    run = {key: value.unflatten(-2, (-1, block)) for key, value in run.items() if key != "x"}
    if block == 1:
        run["decay"] = _without_denormals(run["decay"])
    products = run["decay"].mT.contiguous().cumprod(-1)  # channels first: quicker, and needed below
    until = products.mT.contiguous()
    before = torch.cat((torch.ones_like(until[..., :1, :]), until[..., :-1, :]), -2)
    asks, total = [before * run["probe"], until * run["r"]], until[..., -1:, :]
    tells = [run[name].mT for name in ("k", "back") if name in run]
    if block == 1:
        pairs = [
            [torch.zeros_like(until[..., :1]) for _ in tells],
            [(run["r"] * told.mT).sum(-1, keepdim=True) for told in tells],
        ]
    else:
        since_start = products.reciprocal()
        tells = [since_start * told for told in tells]
        pairs = [[ask @ told for told in tells] for ask in asks]
        position = torch.arange(block, device=until.device)
        for pair in pairs[0][:-1]:
            pair.masked_fill_(position >= position[:, None], 0.0)
        for pair in pairs[1]:
            pair.masked_fill_(position > position[:, None], 0.0)
        if block == length:
            return Within(pairs, asks, tells, total, from_start=True)
        tells = [total.mT * told for told in tells]
    while block < length:
        block *= 2
        earlier_total, later_total = _halves(total)
        halves_asked, halves_told = [_halves(ask) for ask in asks], [_halves(told) for told in tells]
        pairs = [
            [
                _joined(_halves(pair), later_ask @ earlier_told)
                for pair, (earlier_told, _) in zip(row, halves_told, strict=True)
            ]
            for row, (_, later_ask) in zip(pairs, halves_asked, strict=True)
        ]
        asks = [torch.cat((earlier, later * earlier_total), -2) for earlier, later in halves_asked]
        tells = [torch.cat((earlier * later_total.mT, later), -1) for earlier, later in halves_told]
        total = _without_denormals(earlier_total * later_total)
    return Within(pairs, asks, tells, total, from_start=False)


def _safe_block(decay: Float[Tensor, "... c d"], length: int) -> int:
    """How many positions, a power of two, may be divided by the product of their decays."""
    low, high = (float(v) for v in torch.aminmax(decay.detach()))
    if not (low > 0 and high < math.inf):
        return 1
    steepest = max(-math.log(low), math.log(high), MOST_DECAY / length)
    block = 2 ** int(math.log2(max(1.0, MOST_DECAY / steepest)))
    return block if block >= SMALLEST_BLOCK else 1


def _without_denormals(product: Tensor) -> Tensor:
    """Zero where the next product might leave the normal numbers, on which a CPU takes many times longer.

    The gradient stays: a decay of zero has one too.
    """
    small = product.detach()
    return product - small.masked_fill(small.abs() >= torch.finfo(small.dtype).tiny ** 0.5, 0.0)


def _halves(blocks: Float[Tensor, "... n r c"]) -> tuple[Tensor, Tensor]:
    """Every other block: the earlier of each two neighbours, and the later."""
    earlier, later = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    return earlier, later


def _joined(halves: tuple[Tensor, Tensor], across: Tensor) -> Tensor:
    """The causal matrix of two neighbours, from theirs and what the later asks of the earlier."""
    earlier, later = halves
    return torch.cat((torch.cat((earlier, torch.zeros_like(earlier)), -1), torch.cat((across, later), -1)), -2)
