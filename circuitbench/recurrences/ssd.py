"""SSD, the scan of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060).

h_t = exp(dt_t·A)·h_{t-1} + dt_t·x_t⊗B_t and y_t = h_t·C_t + D·x_t: every head has a state of p × n numbers and one
decay for all of them, so that a run of positions is a few matrix products.

Shapes: x `(b, t, h, p)`; dt `(b, t, h)` after softplus and clamp; A `(h,)`; B, C `(b, t, g, n)`, where head i uses
group i // (h // g); D `(h,)`, `(h, p)` or None; state `(b, h, p, n)`. Everything is computed in float32 (float64 if an
operand is, or with `accumulate=torch.float64`); y comes back in x's dtype, states in the dtype they were computed in. A
shape that does not fit raises BadInput.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from circuitbench.errors import BadInput
from circuitbench.recurrences._linear import (
    check_edits,
    knockout_masks,
    linear_states,
    match_shapes,
    memory_cuts,
    reverse_states,
    scan_with_edits,
    segments,
    start_state,
    states_with_edits,
    survival,
    survival_from_log,
    working_dtype,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from circuitbench.recurrences._linear import Edits


CHUNK = 64  # positions per matrix product; 32 is as fast on a CPU core, 16 and 128 are slower


def forward(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, "h p"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h p n"] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Output, D skip included, and final state; differentiable at O(L) cost.

    Args:
        edits: position -> new state, or function from h_t to it.
        when: "before_read": y_t and all later positions follow the edit; "after_read": y_t keeps the unedited read.
        write: replaces dt·x⊗B, what each position adds to the state.
        decay: replaces exp(dt·A).
        accumulate: torch.float64 runs the recurrence in double precision.

    Returns:
        (y, final state).
    """
    steps, A, state = _prepare(x, dt, A, B, C, initial_state, write, decay, accumulate, D)
    checked = check_edits(edits, x.shape[1], when)

    def scan(run: dict[str, Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
        if write is None:
            return _chunked(run, A, h)
        states = _states(run, A, h)
        return torch.einsum("bthpn,bthn->bthp", states, _per_head(run["C"], x.shape[2])), states[:, -1]

    def read(run: dict[str, Tensor], h: Tensor) -> Tensor:
        return torch.einsum("bhpn,bthn->bthp", h, _per_head(run["C"][:, -1:], x.shape[2]))

    cuts = () if write is None else memory_cuts(None, state, x.shape[1])
    y, final = scan_with_edits(scan, read, steps, state, checked, when, cuts)
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D).to(y) * steps["x"]
    return y.to(x.dtype), final


def states(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    initial_state: Float[Tensor, "b h p n"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h p n"] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h p n"]:
    """All states h_t, after edits; arguments as in `forward`."""
    steps, A, state = _prepare(x, dt, A, B, C, initial_state, write, decay, accumulate)
    checked = check_edits(edits, x.shape[1], when)
    runs = [h for _, h in states_with_edits(lambda run, h: _states(run, A, h), steps, state, checked)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


def iter_states(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    initial_state: Float[Tensor, "b h p n"] | None = None,
    *,
    chunk: int | None = None,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h p n"] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Iterator[tuple[int, Float[Tensor, "b c h p n"]]]:
    """All states in bounded memory: yields (first position, states of the next `chunk` positions or fewer).

    Without `chunk`, as many positions at once as make 64 MiB of states. An edited position ends its chunk.
    """
    steps, A, state = _prepare(x, dt, A, B, C, initial_state, write, decay, accumulate)
    checked = check_edits(edits, x.shape[1], when)
    cuts = memory_cuts(chunk, state, x.shape[1])
    return states_with_edits(lambda run, h: _states(run, A, h), steps, state, checked, cuts)


def decay_of(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h"]:
    """exp(dt·A): the share of the state that survives each step."""
    steps, A, _ = _prepare(x, dt, A, B, C, None, None, None, accumulate)
    return _decay(steps, A)


def write_of(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    initial_state: Float[Tensor, "b h p n"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h p n"]:
    """dt·x⊗B: what each step adds to the state (whatever the state is)."""
    steps, A, _ = _prepare(x, dt, A, B, C, initial_state, None, None, accumulate)
    return _write(steps)


def adjoint(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    grad_y: Float[Tensor, "b t h p"],
    grad_final_state: Float[Tensor, "b h p n"] | None = None,
    *,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h p n"]:
    """∂L/∂h_t at every position, later steps included, from ∂L/∂y: g_t = ∂L/∂y_t⊗C_t + exp(dt_{t+1}·A)·g_{t+1}."""
    steps, A, state = _prepare(x, dt, A, B, C, grad_final_state, None, decay, accumulate, name="grad_final_state")
    match_shapes(x=(x, "b t h p"), grad_y=(grad_y, "b t h p"))
    direct = grad_y.to(state)[..., None] * _per_head(steps["C"], x.shape[2])[..., None, :]
    return reverse_states(_decay(steps, A)[..., None, None], direct, state)


def mixing(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b h t t"]:
    """The scan as one causal matrix per head: y = mixing·x + D·x, from a zero initial state."""
    steps, A, _ = _prepare(x, dt, A, B, C, None, None, None, accumulate)
    dt = steps["dt"].transpose(1, 2)
    kept = survival_from_log(dt * A[:, None])
    scores = torch.einsum("btgn,bsgn->bgts", steps["C"], steps["B"])
    return scores.repeat_interleave(x.shape[2] // scores.shape[1], 1) * kept * dt[:, :, None]


def knockout(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    sources: Bool[Tensor, "*b t"],
    destinations: Bool[Tensor, "*b t"],
    D: Float[Tensor, "h p"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    *,
    heads: Sequence[int] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """`forward` with what `sources` contribute to the scan's output at `destinations` taken out; the D skip stays.

    Exact, because the scan is linear in x: the outputs of a scan over x masked to the sources are subtracted. The state
    goes on as it was, so the final state and all other positions are unchanged.

    Args:
        sources, destinations: boolean masks over positions, `(t,)` or `(b, t)`.
        heads: only in these heads (default: all).
    """
    y, final = forward(x, dt, A, B, C, D, initial_state, decay=decay, accumulate=accumulate)
    source, destination = knockout_masks(sources, destinations, heads, "heads", x)
    removed, _ = forward(x * source, dt, A, B, C, decay=decay, accumulate=accumulate)
    return y - removed * destination, final


def frozen(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, "h p"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """`forward` with all but x detached: linear in x, so gradient × input sums to y (from a zero initial state)."""
    dt, A, B, C = dt.detach(), A.detach(), B.detach(), C.detach()
    D = None if D is None else D.detach()
    initial_state = None if initial_state is None else initial_state.detach()
    return forward(x, dt, A, B, C, D, initial_state, accumulate=accumulate)


def _prepare(x, dt, A, B, C, initial_state, write, decay, accumulate, D=None, name="initial_state"):
    """Checked operands over positions in the working dtype, A, and the starting state."""
    size = match_shapes(
        x=(x, "b t h p"),
        dt=(dt, "b t h"),
        A=(A, "h"),
        B=(B, "b t g n"),
        C=(C, "b t g n"),
        D=(D, "h" if D is None or D.ndim == 1 else "h p"),
        write=(write, "b t h p n"),
        decay=(decay, "b t h"),
        **{name: (initial_state, "b h p n")},
    )
    if size["h"] % size["g"]:
        raise BadInput(f"x has {size['h']} heads and B {size['g']} groups; the groups must divide the heads evenly.")
    dtype = working_dtype(accumulate, x, dt, A, B, C)
    steps = {"x": x, "dt": dt, "B": B, "C": C, "write": write, "decay": decay}
    steps = {key: value.to(dtype) for key, value in steps.items() if value is not None}
    state = start_state(initial_state, [size[axis] for axis in "bhpn"], steps["x"])
    return steps, A.to(dtype), state


def _decay(run: dict[str, Tensor], A: Tensor) -> Tensor:
    return run["decay"] if "decay" in run else torch.exp(run["dt"] * A)


def _write(run: dict[str, Tensor]) -> Tensor:
    if "write" in run:
        return run["write"]
    return (run["dt"][..., None] * run["x"])[..., None] * _per_head(run["B"], run["x"].shape[2])[..., None, :]


def _per_head(groups: Tensor, heads: int) -> Tensor:
    """B or C `(b, t, g, n)` as `(b, t, h, n)`."""
    return groups.repeat_interleave(heads // groups.shape[2], 2)


def _states(run: dict[str, Tensor], A: Tensor, state: Tensor) -> Tensor:
    return linear_states(_decay(run, A)[..., None, None], _write(run), state)


def _chunked(run: dict[str, Tensor], A: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs without the skip, and final state, by chunks: the whole ones at once, then the rest."""
    outputs = []
    for _, _, part in segments(run, chunk=CHUNK):
        y, S = _equal_chunks(part, A, S)
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), S


def _equal_chunks(run: dict[str, Tensor], A: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Section 6 of the paper: within a chunk a masked matrix product, from chunk to chunk the state.

    Axes: batch, chunk, group, position, head of the group, head_dim. The products with B and C run over all heads of a
    group at once, and a chunk is done with while it is in the cache.
    """
    x, dt, B, C = run["x"], run["dt"], run["B"], run["C"]
    (groups, n), (heads, p) = B.shape[2:], x.shape[2:]
    cut = (-1, min(CHUNK, x.shape[1]))
    group = (groups, heads // groups)

    def by_chunk(v: Tensor) -> Tensor:  # (b, t, h) -> (b, c, g, r, l)
        return v.unflatten(2, group).unflatten(1, cut).permute(0, 1, 3, 4, 2)

    if "decay" in run:
        first = by_chunk(run["decay"])
        kept = survival(first)
    else:
        log = by_chunk(dt * A)
        first, kept = log.exp(), survival_from_log(log)
    since_start = (kept[..., 0] * first[..., :1]).mT[..., None]
    to_end = kept[..., -1, :].mT[..., None]
    B, C = (v.unflatten(1, cut).transpose(2, 3) for v in (B, C))
    scores = kept * (C @ B.mT)[:, :, :, None]
    inputs = (x * dt[..., None]).unflatten(2, group).unflatten(1, cut).transpose(2, 3)
    S = S.reshape(-1, groups, heads // groups * p, n)
    outputs = []
    for u, b, c, score, since, until in zip(
        *(v.unbind(1) for v in (inputs, B, C, scores, since_start, to_end)), strict=True
    ):
        from_before = (c @ S.mT).unflatten(-1, (-1, p)) * since
        outputs.append(from_before + (score @ u.transpose(2, 3)).transpose(2, 3))
        survived = (S.unflatten(2, (-1, p)) * since[:, :, -1, :, :, None]).flatten(2, 3)
        S = survived + (u * until).flatten(3).mT @ b
    y = torch.stack(outputs, 1).transpose(2, 3)
    return y.reshape(x.shape), S.reshape(-1, heads, p, n)
