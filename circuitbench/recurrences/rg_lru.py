"""RG-LRU, the real-gated linear recurrent unit of Griffin and RecurrentGemma (De et al. 2024, arXiv:2402.19427).

h_t = a_t∘h_{t-1} + x_t and y_t = h_t: every channel is one number that decays by its own gate. x is what reaches the
recurrence (in Griffin already multiplied by the input gate and by √(1 − a²)), and a is the recurrence gate, 0 where a
document begins.

Shapes: x, a `(b, t, d)`; D `(d,)` or None; state `(b, d)`. Everything is computed in float32 (float64 if an operand is,
or with `accumulate=torch.float64`); y comes back in x's dtype, states in the dtype they were computed in. A shape that
does not fit raises BadInput.
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
    survival,
    working_dtype,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from circuitbench.recurrences._linear import Edits


def forward(
    x: Float[Tensor, "b t d"],
    a: Float[Tensor, "b t d"],
    D: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "b d"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t d"] | None = None,
    decay: Float[Tensor, "b t d"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """Output and final state; differentiable at O(L) cost.

    Args:
        D: a skip D·x added to y, for families that have one.
        edits: position -> new state, or function from h_t to it.
        when: "before_read": y_t and all later positions follow the edit; "after_read": y_t keeps the unedited read.
        write: replaces x as what each position adds to the state.
        decay: replaces a.
        accumulate: torch.float64 runs the recurrence in double precision.

    Returns:
        (y, final state).
    """
    steps, state = _prepare(x, a, initial_state, write, decay, accumulate, D)
    checked = check_edits(edits, x.shape[1], when)

    def scan(run: dict[str, Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
        states = _states(run, h)
        return states, states[:, -1]

    def read(run: dict[str, Tensor], h: Tensor) -> Tensor:
        return h[:, None]

    y, final = scan_with_edits(scan, read, steps, state, checked, when)
    if D is not None:
        y = y + D.to(y) * steps["x"]
    return y.to(x.dtype), final.clone()  # y is the states: who edits it in place must not edit the final state


def states(
    x: Float[Tensor, "b t d"],
    a: Float[Tensor, "b t d"],
    initial_state: Float[Tensor, "b d"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t d"] | None = None,
    decay: Float[Tensor, "b t d"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d"]:
    """All states h_t, after edits; arguments as in `forward`."""
    steps, state = _prepare(x, a, initial_state, write, decay, accumulate)
    checked = check_edits(edits, x.shape[1], when)
    runs = [h for _, h in states_with_edits(_states, steps, state, checked)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


def iter_states(
    x: Float[Tensor, "b t d"],
    a: Float[Tensor, "b t d"],
    initial_state: Float[Tensor, "b d"] | None = None,
    *,
    chunk: int | None = None,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t d"] | None = None,
    decay: Float[Tensor, "b t d"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Iterator[tuple[int, Float[Tensor, "b c d"]]]:
    """All states in bounded memory: yields (first position, states of the next `chunk` positions or fewer).

    Without `chunk`, as many positions at once as make 64 MiB of states. An edited position ends its chunk.
    """
    steps, state = _prepare(x, a, initial_state, write, decay, accumulate)
    checked = check_edits(edits, x.shape[1], when)
    return states_with_edits(_states, steps, state, checked, memory_cuts(chunk, state, x.shape[1]))


def decay_of(
    x: Float[Tensor, "b t d"], a: Float[Tensor, "b t d"], *, accumulate: torch.dtype | None = None
) -> Float[Tensor, "b t d"]:
    """a: the share of the state that survives each step."""
    steps, _ = _prepare(x, a, None, None, None, accumulate)
    return _decay(steps).clone()


def write_of(
    x: Float[Tensor, "b t d"],
    a: Float[Tensor, "b t d"],
    initial_state: Float[Tensor, "b d"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d"]:
    """x: what each step adds to the state (whatever the state is)."""
    steps, _ = _prepare(x, a, initial_state, None, None, accumulate)
    return _write(steps).clone()


def adjoint(
    x: Float[Tensor, "b t d"],
    a: Float[Tensor, "b t d"],
    grad_y: Float[Tensor, "b t d"],
    grad_final_state: Float[Tensor, "b d"] | None = None,
    *,
    decay: Float[Tensor, "b t d"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d"]:
    """∂L/∂h_t at every position, later steps included, from ∂L/∂y: g_t = ∂L/∂y_t + a_{t+1}∘g_{t+1}."""
    steps, state = _prepare(x, a, grad_final_state, None, decay, accumulate, name="grad_final_state")
    match_shapes(x=(x, "b t d"), grad_y=(grad_y, "b t d"))
    return reverse_states(_decay(steps), grad_y.to(state), state)


def mixing(
    x: Float[Tensor, "b t d"],
    a: Float[Tensor, "b t d"],
    channels: Sequence[int] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b c t t"]:
    """The recurrence of each asked channel as a causal matrix: y = mixing·x, from a zero initial state.

    Args:
        channels: which channels; required, since all of them at once are d matrices of t × t.
    """
    steps, _ = _prepare(x, a, None, None, None, accumulate)
    if channels is None:
        raise BadInput(f"RG-LRU has one mixing matrix a channel; give channels=, one or more of 0 to {x.shape[2] - 1}.")
    return survival(_decay(steps)[:, :, index_list(channels, "channels", x.shape[2], x.device)].transpose(1, 2))


def knockout(
    x: Float[Tensor, "b t d"],
    a: Float[Tensor, "b t d"],
    sources: Bool[Tensor, "*b t"],
    destinations: Bool[Tensor, "*b t"],
    D: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "b d"] | None = None,
    *,
    channels: Sequence[int] | None = None,
    decay: Float[Tensor, "b t d"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """`forward` with what `sources` contribute to the output at `destinations` taken out; a D skip stays.

    Exact, because the recurrence is linear in x: the outputs of a run over x masked to the sources are subtracted. The
    state goes on as it was, so the final state and all other positions are unchanged.

    Args:
        sources, destinations: boolean masks over positions, `(t,)` or `(b, t)`.
        channels: only in these channels (default: all).
    """
    y, final = forward(x, a, D, initial_state, decay=decay, accumulate=accumulate)
    source, destination = knockout_masks(sources, destinations, channels, "channels", x)
    removed, _ = forward(x * source, a, decay=decay, accumulate=accumulate)
    return y - removed * destination, final


def frozen(
    x: Float[Tensor, "b t d"],
    a: Float[Tensor, "b t d"],
    D: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "b d"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """`forward` with all but x detached: linear in x, so gradient × input sums to y (from a zero initial state)."""
    D = None if D is None else D.detach()
    initial_state = None if initial_state is None else initial_state.detach()
    return forward(x, a.detach(), D, initial_state, accumulate=accumulate)


def _prepare(x, a, initial_state, write, decay, accumulate, D=None, name="initial_state"):
    """Checked operands over positions in the working dtype, and the starting state."""
    size = match_shapes(
        x=(x, "b t d"),
        a=(a, "b t d"),
        D=(D, "d"),
        write=(write, "b t d"),
        decay=(decay, "b t d"),
        **{name: (initial_state, "b d")},
    )
    dtype = working_dtype(accumulate, x, a)
    steps = {"x": x, "a": a, "write": write, "decay": decay}
    steps = {key: value.to(dtype) for key, value in steps.items() if value is not None}
    return steps, start_state(initial_state, (size["b"], size["d"]), steps["x"])


def _decay(run: dict[str, Tensor]) -> Tensor:
    return run["decay"] if "decay" in run else run["a"]


def _write(run: dict[str, Tensor]) -> Tensor:
    return run["write"] if "write" in run else run["x"]


def _states(run: dict[str, Tensor], state: Tensor) -> Tensor:
    return linear_states(_decay(run), _write(run), state)
