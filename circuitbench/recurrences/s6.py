"""S6, the selective scan of Mamba (Gu & Dao 2023, arXiv:2312.00752).

h_t = exp(dt_t·A)·h_{t-1} + dt_t·B_t·x_t and y_t = C_t·h_t + D·x_t: every channel has its own state of n numbers and its
own decay for each of them.

Shapes: x, dt `(b, t, d)` with dt after softplus; A `(d, n)`; B, C `(b, t, n)`; D `(d,)` or None; state `(b, d, n)`.
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
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "b d n"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t d n"] | None = None,
    decay: Float[Tensor, "b t d n"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
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
        return selective_scan(run["x"], run["dt"], A, run["B"], run["C"], h)

    def read(run: dict[str, Tensor], h: Tensor) -> Tensor:
        return torch.einsum("bdn,bn->bd", h, run["C"][:, -1])[:, None]

    cuts = memory_cuts(None, state, x.shape[1]) if replaced else ()
    y, final = scan_with_edits(scan, read, steps, state, checked, when, cuts)
    if D is not None:
        y = y + D.to(y) * steps["x"]
    return y.to(x.dtype), final


def states(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    initial_state: Float[Tensor, "b d n"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t d n"] | None = None,
    decay: Float[Tensor, "b t d n"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d n"]:
    """All states h_t, after edits; arguments as in `forward`."""
    steps, A, state = _prepare(x, dt, A, B, C, initial_state, write, decay, accumulate)
    checked = check_edits(edits, x.shape[1], when)
    runs = [h for _, h in states_with_edits(lambda run, h: _states(run, A, h), steps, state, checked)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


def iter_states(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    initial_state: Float[Tensor, "b d n"] | None = None,
    *,
    chunk: int | None = None,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t d n"] | None = None,
    decay: Float[Tensor, "b t d n"] | None = None,
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
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d n"]:
    """exp(dt·A): the share of the state that survives each step."""
    steps, A, _ = _prepare(x, dt, A, B, C, None, None, None, accumulate)
    return _decay(steps, A)


def write_of(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    initial_state: Float[Tensor, "b d n"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d n"]:
    """dt·B·x: what each step adds to the state (whatever the state is)."""
    steps, A, _ = _prepare(x, dt, A, B, C, initial_state, None, None, accumulate)
    return _write(steps)


def adjoint(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    grad_y: Float[Tensor, "b t d"],
    grad_final_state: Float[Tensor, "b d n"] | None = None,
    *,
    decay: Float[Tensor, "b t d n"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d n"]:
    """∂L/∂h_t at every position, later steps included, from ∂L/∂y: g_t = C_t·∂L/∂y_t + exp(dt_{t+1}·A)·g_{t+1}."""
    steps, A, state = _prepare(x, dt, A, B, C, grad_final_state, None, decay, accumulate, name="grad_final_state")
    match_shapes(x=(x, "b t d"), grad_y=(grad_y, "b t d"))
    direct = grad_y.to(state)[..., None] * steps["C"][:, :, None]
    return reverse_states(_decay(steps, A), direct, state)


def mixing(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    channels: Sequence[int] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b c t t"]:
    """The scan of each asked channel as a causal matrix: y = mixing·x + D·x, from a zero initial state.

    Args:
        channels: which channels; required, since all of them at once are d matrices of t × t.
    """
    steps, A, _ = _prepare(x, dt, A, B, C, None, None, None, accumulate)
    if channels is None:
        raise BadInput(f"S6 has one mixing matrix per channel; give channels=, one or more of 0 to {x.shape[2] - 1}.")
    chosen = index_list(channels, "channels", x.shape[2], x.device)
    dt = steps["dt"][:, :, chosen].transpose(1, 2)
    mixed = torch.zeros(())
    for a, B_n, C_n in zip(A[chosen].unbind(1), steps["B"].unbind(2), steps["C"].unbind(2), strict=True):
        kept = survival_from_log(dt * a[:, None])
        mixed = mixed + kept * C_n[:, None, :, None] * (B_n[:, None] * dt)[:, :, None]
    return mixed


def knockout(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    sources: Bool[Tensor, "*b t"],
    destinations: Bool[Tensor, "*b t"],
    D: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "b d n"] | None = None,
    *,
    channels: Sequence[int] | None = None,
    decay: Float[Tensor, "b t d n"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """`forward` with what `sources` contribute to the scan's output at `destinations` taken out; the D skip stays.

    Exact, because the scan is linear in x: the outputs of a scan over x masked to the sources are subtracted. The state
    goes on as it was, so the final state and all other positions are unchanged.

    Args:
        sources, destinations: boolean masks over positions, `(t,)` or `(b, t)`.
        channels: only in these channels (default: all).
    """
    y, final = forward(x, dt, A, B, C, D, initial_state, decay=decay, accumulate=accumulate)
    source, destination = knockout_masks(sources, destinations, channels, "channels", x)
    removed, _ = forward(x * source, dt, A, B, C, decay=decay, accumulate=accumulate)
    return y - removed * destination, final


def frozen(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "b d n"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """`forward` with all but x detached: linear in x, so gradient × input sums to y (from a zero initial state)."""
    dt, A, B, C = dt.detach(), A.detach(), B.detach(), C.detach()
    D = None if D is None else D.detach()
    initial_state = None if initial_state is None else initial_state.detach()
    return forward(x, dt, A, B, C, D, initial_state, accumulate=accumulate)


def _prepare(x, dt, A, B, C, initial_state, write, decay, accumulate, D=None, name="initial_state"):
    """Checked operands over positions in the working dtype, A, and the starting state."""
    size = match_shapes(
        x=(x, "b t d"),
        dt=(dt, "b t d"),
        A=(A, "d n"),
        B=(B, "b t n"),
        C=(C, "b t n"),
        D=(D, "d"),
        write=(write, "b t d n"),
        decay=(decay, "b t d n"),
        **{name: (initial_state, "b d n")},
    )
    dtype = working_dtype(accumulate, x, dt, A, B, C)
    steps = {"x": x, "dt": dt, "B": B, "C": C, "write": write, "decay": decay}
    steps = {key: value.to(dtype) for key, value in steps.items() if value is not None}
    state = start_state(initial_state, (size["b"], size["d"], size["n"]), steps["x"])
    return steps, A.to(dtype), state


def _decay(run: dict[str, Tensor], A: Tensor) -> Tensor:
    return run["decay"] if "decay" in run else torch.exp(run["dt"][..., None] * A)


def _write(run: dict[str, Tensor]) -> Tensor:
    return run["write"] if "write" in run else (run["dt"] * run["x"])[..., None] * run["B"][:, :, None]


def _states(run: dict[str, Tensor], A: Tensor, state: Tensor) -> Tensor:
    return linear_states(_decay(run, A), _write(run), state)
