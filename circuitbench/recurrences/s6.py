"""S6, the selective scan of Mamba (Gu & Dao 2023, arXiv:2312.00752).

h_t = exp(dt_t·A)·h_{t-1} + dt_t·B_t·x_t and y_t = C_t·h_t + D·x_t: every channel has its own state of n numbers and its
own decay for each of them.

Shapes: x, dt `(b, t, d)` with dt after softplus; A `(d, n)`; B, C `(b, t, n)`; D `(d,)` or None; state `(b, d, n)`.
Zamba has several such scans in a layer: all operands then have one more axis, h, before d (before n in B and C).
Everything is computed in float32 (float64 if an operand is, or with `accumulate=torch.float64`); y comes back in x's
dtype, states in the dtype they were computed in. A shape that does not fit raises BadInput.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from circuitbench.errors import BadInput
from circuitbench.recurrences._linear import (
    check_edits,
    index_list,
    knockout_masks,
    linear_states,
    match_shapes,
    memory_cuts,
    reverse_states,
    scan_with_edits,
    start_state,
    states_with_edits,
    survival_from_log,
    working_dtype,
)
from circuitbench.recurrences._selective_scan import plain_scan, selective_scan

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from circuitbench.recurrences._linear import Edits


def forward(
    x: Float[Tensor, "b t *h d"],
    dt: Float[Tensor, "b t *h d"],
    A: Float[Tensor, "*h d n"],
    B: Float[Tensor, "b t *h n"],
    C: Float[Tensor, "b t *h n"],
    D: Float[Tensor, "*h d"] | None = None,
    initial_state: Float[Tensor, "b *h d n"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t *h d n"] | None = None,
    decay: Float[Tensor, "b t *h d n"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t *h d"], Float[Tensor, "b *h d n"]]:
    """Output, D skip included, and final state; differentiable at O(L) cost.

    Args:
        edits: position -> new state, or function from h_t to it.
        when: "before_read": y_t and all later positions follow the edit; "after_read": y_t keeps the unedited read.
        write: replaces dt·B·x, what each position adds to the state.
        decay: replaces exp(dt·A).
        accumulate: torch.float64 runs the recurrence in double precision.

    Returns:
        (y, final state).
    """
    steps, A, state = _prepare(x, dt, A, B, C, initial_state, write, decay, accumulate, D)
    checked = check_edits(edits, x.shape[1], when)

    replaced = write is not None or decay is not None

    def scan(run: dict[str, Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
        if replaced:
            return plain_scan(_decay(run, A), _write(run), run["C"], h)
        if h.ndim == 3:
            return selective_scan(run["x"], run["dt"], A, run["B"], run["C"], h)
        heads = [
            selective_scan(*operands)
            for operands in zip(
                *(run[name].unbind(2) for name in ("x", "dt")),
                A,
                run["B"].unbind(2),
                run["C"].unbind(2),
                h.unbind(1),
                strict=True,
            )
        ]
        return torch.stack([y for y, _ in heads], 2), torch.stack([state for _, state in heads], 1)

    def read(run: dict[str, Tensor], h: Tensor) -> Tensor:
        return torch.einsum("...dn,...n->...d", h, run["C"][:, -1])[:, None]

    cuts = memory_cuts(None, state, x.shape[1]) if replaced else ()
    y, final = scan_with_edits(scan, read, steps, state, checked, when, cuts)
    if D is not None:
        y = y + D.to(y) * steps["x"]
    return y.to(x.dtype), final


def states(
    x: Float[Tensor, "b t *h d"],
    dt: Float[Tensor, "b t *h d"],
    A: Float[Tensor, "*h d n"],
    B: Float[Tensor, "b t *h n"],
    C: Float[Tensor, "b t *h n"],
    initial_state: Float[Tensor, "b *h d n"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t *h d n"] | None = None,
    decay: Float[Tensor, "b t *h d n"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t *h d n"]:
    """All states h_t, after edits; arguments as in `forward`."""
    steps, A, state = _prepare(x, dt, A, B, C, initial_state, write, decay, accumulate)
    checked = check_edits(edits, x.shape[1], when)
    runs = [h for _, h in states_with_edits(lambda run, h: _states(run, A, h), steps, state, checked)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


def iter_states(
    x: Float[Tensor, "b t *h d"],
    dt: Float[Tensor, "b t *h d"],
    A: Float[Tensor, "*h d n"],
    B: Float[Tensor, "b t *h n"],
    C: Float[Tensor, "b t *h n"],
    initial_state: Float[Tensor, "b *h d n"] | None = None,
    *,
    chunk: int | None = None,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t *h d n"] | None = None,
    decay: Float[Tensor, "b t *h d n"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Iterator[tuple[int, Float[Tensor, "b c d n"]]]:
    """All states in bounded memory: yields (first position, states of the next `chunk` positions or fewer).

    Without `chunk`, as many positions at once as make 64 MiB of states. An edited position ends its chunk.
    """
    steps, A, state = _prepare(x, dt, A, B, C, initial_state, write, decay, accumulate)
    checked = check_edits(edits, x.shape[1], when)
    cuts = memory_cuts(chunk, state, x.shape[1])
    return states_with_edits(lambda run, h: _states(run, A, h), steps, state, checked, cuts)


def decay_of(
    x: Float[Tensor, "b t *h d"],
    dt: Float[Tensor, "b t *h d"],
    A: Float[Tensor, "*h d n"],
    B: Float[Tensor, "b t *h n"],
    C: Float[Tensor, "b t *h n"],
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t *h d n"]:
    """exp(dt·A): the share of the state that survives each step."""
    steps, A, _ = _prepare(x, dt, A, B, C, None, None, None, accumulate)
    return _decay(steps, A)


def write_of(
    x: Float[Tensor, "b t *h d"],
    dt: Float[Tensor, "b t *h d"],
    A: Float[Tensor, "*h d n"],
    B: Float[Tensor, "b t *h n"],
    C: Float[Tensor, "b t *h n"],
    initial_state: Float[Tensor, "b *h d n"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t *h d n"]:
    """dt·B·x: what each step adds to the state (whatever the state is)."""
    steps, A, _ = _prepare(x, dt, A, B, C, initial_state, None, None, accumulate)
    return _write(steps)


def adjoint(
    x: Float[Tensor, "b t *h d"],
    dt: Float[Tensor, "b t *h d"],
    A: Float[Tensor, "*h d n"],
    B: Float[Tensor, "b t *h n"],
    C: Float[Tensor, "b t *h n"],
    grad_y: Float[Tensor, "b t *h d"],
    grad_final_state: Float[Tensor, "b *h d n"] | None = None,
    *,
    decay: Float[Tensor, "b t *h d n"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t *h d n"]:
    """∂L/∂h_t at every position, later steps included, from ∂L/∂y: g_t = C_t·∂L/∂y_t + exp(dt_{t+1}·A)·g_{t+1}."""
    steps, A, state = _prepare(x, dt, A, B, C, grad_final_state, None, decay, accumulate, name="grad_final_state")
    match_shapes(x=(x, _axes("b t d", x)), grad_y=(grad_y, _axes("b t d", x)))
    direct = grad_y.to(state)[..., None] * steps["C"][..., None, :]
    return reverse_states(_decay(steps, A), direct, state)


def mixing(
    x: Float[Tensor, "b t *h d"],
    dt: Float[Tensor, "b t *h d"],
    A: Float[Tensor, "*h d n"],
    B: Float[Tensor, "b t *h n"],
    C: Float[Tensor, "b t *h n"],
    channels: Sequence[int] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b c t t"]:
    """The scan of each asked channel as a causal matrix: y = mixing·x + D·x, from a zero initial state.

    Args:
        channels: which channels; required, since all of them at once are d matrices of t × t. With heads, channel c
            of head h is number h·d + c.
    """
    steps, A, _ = _prepare(x, dt, A, B, C, None, None, None, accumulate)
    count = x.shape[2:].numel()
    if channels is None:
        raise BadInput(f"S6 has one mixing matrix per channel; give channels=, one or more of 0 to {count - 1}.")
    chosen = index_list(channels, "channels", count, x.device)
    head = chosen // x.shape[-1]
    dt = steps["dt"].flatten(2)[:, :, chosen].transpose(1, 2)
    # One pair of B and C for all channels, or one a head.
    B, C = (
        (value if value.ndim == 4 else value[:, :, None])[:, :, head].transpose(1, 2)
        for value in (steps["B"], steps["C"])
    )
    mixed = torch.zeros(())
    for a, B_n, C_n in zip(A.flatten(0, -2)[chosen].unbind(1), B.unbind(3), C.unbind(3), strict=True):
        kept = survival_from_log(dt * a[:, None])
        mixed = mixed + kept * C_n[..., None] * (B_n * dt)[:, :, None]
    return mixed


def knockout(
    x: Float[Tensor, "b t *h d"],
    dt: Float[Tensor, "b t *h d"],
    A: Float[Tensor, "*h d n"],
    B: Float[Tensor, "b t *h n"],
    C: Float[Tensor, "b t *h n"],
    sources: Bool[Tensor, "*b t"],
    destinations: Bool[Tensor, "*b t"],
    D: Float[Tensor, "*h d"] | None = None,
    initial_state: Float[Tensor, "b *h d n"] | None = None,
    *,
    channels: Sequence[int] | None = None,
    decay: Float[Tensor, "b t *h d n"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t *h d"], Float[Tensor, "b *h d n"]]:
    """`forward` with what `sources` contribute to the scan's output at `destinations` taken out; the D skip stays.

    Exact, because the scan is linear in x: the outputs of a scan over x masked to the sources are subtracted. The state
    goes on as it was, so the final state and all other positions are unchanged.

    Args:
        sources, destinations: boolean masks over positions, `(t,)` or `(b, t)`.
        channels: only in these channels (default: all).
    """
    y, final = forward(x, dt, A, B, C, D, initial_state, decay=decay, accumulate=accumulate)
    source, destination = (
        mask.unflatten(2, x.shape[2:]) if mask.shape[2] > 1 else mask.reshape(*mask.shape[:2], *[1] * (x.ndim - 2))
        for mask in knockout_masks(sources, destinations, channels, "channels", x.flatten(2))
    )
    removed, _ = forward(x * source, dt, A, B, C, decay=decay, accumulate=accumulate)
    return y - removed * destination, final


def frozen(
    x: Float[Tensor, "b t *h d"],
    dt: Float[Tensor, "b t *h d"],
    A: Float[Tensor, "*h d n"],
    B: Float[Tensor, "b t *h n"],
    C: Float[Tensor, "b t *h n"],
    D: Float[Tensor, "*h d"] | None = None,
    initial_state: Float[Tensor, "b *h d n"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t *h d"], Float[Tensor, "b *h d n"]]:
    """`forward` with all but x detached: linear in x, so gradient × input sums to y (from a zero initial state)."""
    dt, A, B, C = dt.detach(), A.detach(), B.detach(), C.detach()
    D = None if D is None else D.detach()
    initial_state = None if initial_state is None else initial_state.detach()
    return forward(x, dt, A, B, C, D, initial_state, accumulate=accumulate)


def _prepare(x, dt, A, B, C, initial_state, write, decay, accumulate, D=None, name="initial_state"):
    """Checked operands over positions in the working dtype, A, and the starting state."""
    axes = {"x": "b t d", "dt": "b t d", "A": "d n", "B": "b t n", "C": "b t n", "D": "d"}
    axes |= {"write": "b t d n", "decay": "b t d n", name: "b d n"}
    given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "write": write, "decay": decay, name: initial_state}
    size = match_shapes(**{key: (given[key], _axes(axes[key], x)) for key in given})
    dtype = working_dtype(accumulate, x, dt, A, B, C)
    steps = {"x": x, "dt": dt, "B": B, "C": C, "write": write, "decay": decay}
    steps = {key: value.to(dtype) for key, value in steps.items() if value is not None}
    state = start_state(initial_state, [size[axis] for axis in _axes("b d n", x).split()], steps["x"])
    return steps, A.to(dtype), state


def _axes(axes: str, x: Tensor) -> str:
    """An operand's axes, with the heads where x has them."""
    if x.ndim < 4:
        return axes
    return axes.replace("d", "h d") if "d" in axes else axes.replace("n", "h n")


def _decay(run: dict[str, Tensor], A: Tensor) -> Tensor:
    return run["decay"] if "decay" in run else torch.exp(run["dt"][..., None] * A)


def _write(run: dict[str, Tensor]) -> Tensor:
    return run["write"] if "write" in run else (run["dt"] * run["x"])[..., None] * run["B"][..., None, :]


def _states(run: dict[str, Tensor], A: Tensor, state: Tensor) -> Tensor:
    return linear_states(_decay(run, A), _write(run), state)
