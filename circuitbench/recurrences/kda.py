"""Kimi Delta Attention, the gated delta rule with a decay for every key channel (Kimi Team 2025, arXiv:2510.26692).

S_t = Diag(exp(g_t))·S_{t-1} + k_t⊗e_t with e_t = beta_t·(x_t − (Diag(exp(g_t))·S_{t-1})ᵀk_t), and y_t = S_tᵀq_t: as in
`gated_delta`, each step writes what is missing for key k_t to give back value x_t, but each channel of the keys forgets
at its own rate. What a step adds depends on the state, but linearly: the state is multiplied by
(I − beta·k⊗k)·Diag(exp(g)), and all is linear in x.

Operands carry the names of the sites: x are the values `(b, t, h, dv)`; B the keys, C the queries and g the log decay
`(b, t, h, dk)`, keys and queries as they reach the recurrence (normalised and scaled if the model does so); beta
`(b, t, h)`; state `(b, h, dk, dv)`. The log decay may be as far below zero as it likes. Everything is computed in
float32 (float64 if an operand is, or with `accumulate=torch.float64`); y comes back in x's dtype, states in the dtype
they were computed in. A shape that does not fit raises BadInput.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from circuitbench.recurrences._dplr import (
    dplr_adjoint,
    dplr_forward,
    dplr_iter_states,
    dplr_mixing,
    dplr_states,
    dplr_with_write,
    dplr_write,
)
from circuitbench.recurrences._linear import knockout_masks, match_shapes, start_state, working_dtype

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from circuitbench.recurrences._linear import Edits


def forward(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h dk"],
    beta: Float[Tensor, "b t h"],
    D: Float[Tensor, "h dv"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h dk dv"] | None = None,
    decay: Float[Tensor, "b t h dk"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h dk dv"]]:
    """Output and final state; differentiable at O(L) cost.

    Args:
        D: a skip D·x added to y, for families that have one.
        edits: position -> new state, or function from S_t to it.
        when: "before_read": y_t and all later positions follow the edit; "after_read": y_t keeps the unedited read.
        write: at each (batch, position, head) where it differs from `write_of`, exactly this is added to the decayed
            state; where it is equal, the model's own rule stands. A gradient with respect to `write` is that of one
            position's write, later ones following the rule.
        decay: replaces exp(g).
        accumulate: torch.float64 runs the recurrence in double precision.

    Returns:
        (y, final state).
    """
    steps, state, cuts = _prepare(x, B, C, g, beta, initial_state, write, decay, accumulate, D)
    y, final = dplr_forward(steps, state, edits, when, cuts)
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D).to(y) * steps["x"]
    return y.to(x.dtype), final


def states(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h dk"],
    beta: Float[Tensor, "b t h"],
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h dk dv"] | None = None,
    decay: Float[Tensor, "b t h dk"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv"]:
    """All states S_t, after edits; arguments as in `forward`."""
    steps, state, cuts = _prepare(x, B, C, g, beta, initial_state, write, decay, accumulate)
    return dplr_states(steps, state, edits, when, cuts)


def iter_states(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h dk"],
    beta: Float[Tensor, "b t h"],
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    chunk: int | None = None,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h dk dv"] | None = None,
    decay: Float[Tensor, "b t h dk"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Iterator[tuple[int, Float[Tensor, "b c h dk dv"]]]:
    """All states in bounded memory: yields (first position, states of the next `chunk` positions or fewer).

    Without `chunk`, as many positions at once as make 64 MiB of states. An edited position ends its chunk.
    """
    steps, state, cuts = _prepare(x, B, C, g, beta, initial_state, write, decay, accumulate)
    return dplr_iter_states(steps, state, edits, when, cuts, chunk)


def decay_of(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h dk"],
    beta: Float[Tensor, "b t h"],
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk"]:
    """exp(g): the share of each channel of the state that survives a step, before the write erases what it replaces."""
    steps, _, _ = _prepare(x, B, C, g, beta, None, None, None, accumulate)
    return steps["decay"]


def write_of(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h dk"],
    beta: Float[Tensor, "b t h"],
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    decay: Float[Tensor, "b t h dk"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv"]:
    """k⊗e: what each step adds to the decayed state, in the run from `initial_state`."""
    steps, state, _ = _prepare(x, B, C, g, beta, initial_state, None, decay, accumulate)
    return dplr_write(steps, state)


def adjoint(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h dk"],
    beta: Float[Tensor, "b t h"],
    grad_y: Float[Tensor, "b t h dv"],
    grad_final_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    decay: Float[Tensor, "b t h dk"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv"]:
    """∂L/∂S_t at every position: G_t = q_t⊗∂L/∂y_t + Diag(exp(g))(I − beta·k⊗k)|_{t+1} G_{t+1}."""
    steps, G, _ = _prepare(x, B, C, g, beta, grad_final_state, None, decay, accumulate, name="grad_final_state")
    match_shapes(x=(x, "b t h dv"), grad_y=(grad_y, "b t h dv"))
    return dplr_adjoint(steps, grad_y, G)


def mixing(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h dk"],
    beta: Float[Tensor, "b t h"],
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b h t t"]:
    """The recurrence as one causal matrix per head: y = mixing·x, from a zero initial state."""
    steps, _, _ = _prepare(x, B, C, g, beta, None, None, None, accumulate)
    return dplr_mixing(steps)


def knockout(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h dk"],
    beta: Float[Tensor, "b t h"],
    sources: Bool[Tensor, "*b t"],
    destinations: Bool[Tensor, "*b t"],
    D: Float[Tensor, "h dv"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    heads: Sequence[int] | None = None,
    decay: Float[Tensor, "b t h dk"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h dk dv"]]:
    """`forward` with what the values at `sources` contribute to the output at `destinations` taken out; a D skip stays.

    Exact, because the recurrence is linear in x: the outputs of a run over x masked to the sources are subtracted. What
    a source erases stays erased. The state goes on as it was, so the final state and all other positions are unchanged.

    Args:
        sources, destinations: boolean masks over positions, `(t,)` or `(b, t)`.
        heads: only in these heads (default: all).
    """
    y, final = forward(x, B, C, g, beta, D, initial_state, decay=decay, accumulate=accumulate)
    source, destination = knockout_masks(sources, destinations, heads, "heads", x)
    removed, _ = forward(x * source, B, C, g, beta, decay=decay, accumulate=accumulate)
    return y - removed * destination, final


def frozen(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h dk"],
    beta: Float[Tensor, "b t h"],
    D: Float[Tensor, "h dv"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h dk dv"]]:
    """`forward` with all but x detached: linear in x, so gradient × input sums to y (from a zero initial state)."""
    B, C, g, beta = B.detach(), C.detach(), g.detach(), beta.detach()
    D = None if D is None else D.detach()
    initial_state = None if initial_state is None else initial_state.detach()
    return forward(x, B, C, g, beta, D, initial_state, accumulate=accumulate)


def _prepare(x, B, C, g, beta, initial_state, write, decay, accumulate, D=None, name="initial_state"):
    """Checked operands over positions in the working dtype, the starting state, and cuts around the given writes."""
    size = match_shapes(
        x=(x, "b t h dv"),
        B=(B, "b t h dk"),
        C=(C, "b t h dk"),
        g=(g, "b t h dk"),
        beta=(beta, "b t h"),
        D=(D, "h" if D is None or D.ndim == 1 else "h dv"),
        write=(write, "b t h dk dv"),
        decay=(decay, "b t h dk"),
        **{name: (initial_state, "b h dk dv")},
    )
    dtype = working_dtype(accumulate, x, B, C, g, beta)
    key, kept = B.to(dtype), g.to(dtype).exp() if decay is None else decay.to(dtype)
    # The key asks the state after its decay; what it misses is written beta times.
    steps = {
        "decay": kept,
        "probe": kept * key,
        "k": beta.to(dtype)[..., None] * key,
        "r": C.to(dtype),
        "x": x.to(dtype),
    }
    state = start_state(initial_state, [size[axis] for axis in ("b", "h", "dk", "dv")], steps["x"])
    own = None
    if write is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and write.requires_grad):
            own = dplr_write(steps, state)
    steps, cuts = dplr_with_write(steps, write, own)
    return steps, state, cuts
