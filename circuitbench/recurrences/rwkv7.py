"""The delta rule of RWKV-7 "Goose" (Peng et al. 2025, arXiv:2503.14456).

S_t = Diag(exp(w_t))·S_{t-1} + b_t⊗(S_{t-1}ᵀa_t) + k_t⊗x_t, and y_t = S_tᵀr_t: each channel of the keys has its own
decay; a asks the state *before* its decay, and what it answers is put back along b. In the model a = −κ̂ (the normalised
removal key) and b = κ̂ ⊙ (the in-context learning rate), so the pair takes away what is stored under κ̂. The paper
writes the state transposed. What a step adds depends on the state, but linearly, and all is linear in x.

Operands carry the names of the sites, which are those of the published kernels but for the values: x are the values
`(b, t, h, dv)`; r (receptance, the query), w (the log decay; in the model between −e^−½ and 0), k, a and b
`(b, t, h, dk)`; state `(b, h, dk, dv)`. Everything is computed in float32 (float64 if an operand is, or with
`accumulate=torch.float64`); y comes back in x's dtype, states in the dtype they were computed in. A shape that does not
fit raises BadInput.
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
    r: Float[Tensor, "b t h dk"],
    w: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    a: Float[Tensor, "b t h dk"],
    b: Float[Tensor, "b t h dk"],
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
        decay: replaces exp(w).
        accumulate: torch.float64 runs the recurrence in double precision.

    Returns:
        (y, final state).
    """
    steps, state, cuts = _prepare(x, r, w, k, a, b, initial_state, write, decay, accumulate, D)
    y, final = dplr_forward(steps, state, edits, when, cuts)
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D).to(y) * steps["x"]
    return y.to(x.dtype), final


def states(
    x: Float[Tensor, "b t h dv"],
    r: Float[Tensor, "b t h dk"],
    w: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    a: Float[Tensor, "b t h dk"],
    b: Float[Tensor, "b t h dk"],
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h dk dv"] | None = None,
    decay: Float[Tensor, "b t h dk"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv"]:
    """All states S_t, after edits; arguments as in `forward`."""
    steps, state, cuts = _prepare(x, r, w, k, a, b, initial_state, write, decay, accumulate)
    return dplr_states(steps, state, edits, when, cuts)


def iter_states(
    x: Float[Tensor, "b t h dv"],
    r: Float[Tensor, "b t h dk"],
    w: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    a: Float[Tensor, "b t h dk"],
    b: Float[Tensor, "b t h dk"],
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
    steps, state, cuts = _prepare(x, r, w, k, a, b, initial_state, write, decay, accumulate)
    return dplr_iter_states(steps, state, edits, when, cuts, chunk)


def decay_of(
    x: Float[Tensor, "b t h dv"],
    r: Float[Tensor, "b t h dk"],
    w: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    a: Float[Tensor, "b t h dk"],
    b: Float[Tensor, "b t h dk"],
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk"]:
    """exp(w): the share of each channel of the state that survives a step, before what a and b take away."""
    steps, _, _ = _prepare(x, r, w, k, a, b, None, None, None, accumulate)
    return steps["decay"]


def write_of(
    x: Float[Tensor, "b t h dv"],
    r: Float[Tensor, "b t h dk"],
    w: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    a: Float[Tensor, "b t h dk"],
    b: Float[Tensor, "b t h dk"],
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    decay: Float[Tensor, "b t h dk"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv"]:
    """k⊗x + b⊗(S_{t-1}ᵀa): what each step adds to the decayed state, in the run from `initial_state`."""
    steps, state, _ = _prepare(x, r, w, k, a, b, initial_state, None, decay, accumulate)
    return dplr_write(steps, state)


def adjoint(
    x: Float[Tensor, "b t h dv"],
    r: Float[Tensor, "b t h dk"],
    w: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    a: Float[Tensor, "b t h dk"],
    b: Float[Tensor, "b t h dk"],
    grad_y: Float[Tensor, "b t h dv"],
    grad_final_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    decay: Float[Tensor, "b t h dk"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv"]:
    """∂L/∂S_t at every position, later steps included: G_t = r_t⊗∂L/∂y_t + (Diag(exp(w)) + a⊗b)|_{t+1} G_{t+1}."""
    steps, G, _ = _prepare(x, r, w, k, a, b, grad_final_state, None, decay, accumulate, name="grad_final_state")
    match_shapes(x=(x, "b t h dv"), grad_y=(grad_y, "b t h dv"))
    return dplr_adjoint(steps, grad_y, G)


def mixing(
    x: Float[Tensor, "b t h dv"],
    r: Float[Tensor, "b t h dk"],
    w: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    a: Float[Tensor, "b t h dk"],
    b: Float[Tensor, "b t h dk"],
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b h t t"]:
    """The recurrence as one causal matrix per head: y = mixing·x, from a zero initial state."""
    steps, _, _ = _prepare(x, r, w, k, a, b, None, None, None, accumulate)
    return dplr_mixing(steps)


def knockout(
    x: Float[Tensor, "b t h dv"],
    r: Float[Tensor, "b t h dk"],
    w: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    a: Float[Tensor, "b t h dk"],
    b: Float[Tensor, "b t h dk"],
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
    y, final = forward(x, r, w, k, a, b, D, initial_state, decay=decay, accumulate=accumulate)
    source, destination = knockout_masks(sources, destinations, heads, "heads", x)
    removed, _ = forward(x * source, r, w, k, a, b, decay=decay, accumulate=accumulate)
    return y - removed * destination, final


def frozen(
    x: Float[Tensor, "b t h dv"],
    r: Float[Tensor, "b t h dk"],
    w: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    a: Float[Tensor, "b t h dk"],
    b: Float[Tensor, "b t h dk"],
    D: Float[Tensor, "h dv"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h dk dv"]]:
    """`forward` with all but x detached: linear in x, so gradient × input sums to y (from a zero initial state)."""
    r, w, k, a, b = r.detach(), w.detach(), k.detach(), a.detach(), b.detach()
    D = None if D is None else D.detach()
    initial_state = None if initial_state is None else initial_state.detach()
    return forward(x, r, w, k, a, b, D, initial_state, accumulate=accumulate)


def _prepare(x, r, w, k, a, b, initial_state, write, decay, accumulate, D=None, name="initial_state"):
    """Checked operands over positions in the working dtype, the starting state, and cuts around the given writes."""
    size = match_shapes(
        x=(x, "b t h dv"),
        r=(r, "b t h dk"),
        w=(w, "b t h dk"),
        k=(k, "b t h dk"),
        a=(a, "b t h dk"),
        b=(b, "b t h dk"),
        D=(D, "h" if D is None or D.ndim == 1 else "h dv"),
        write=(write, "b t h dk dv"),
        decay=(decay, "b t h dk"),
        **{name: (initial_state, "b h dk dv")},
    )
    dtype = working_dtype(accumulate, x, r, w, k, a, b)
    kept = w.to(dtype).exp() if decay is None else decay
    steps = {"decay": kept, "probe": a, "back": b, "k": k, "r": r, "x": x}
    steps = {key: value.to(dtype) for key, value in steps.items()}
    state = start_state(initial_state, [size[axis] for axis in ("b", "h", "dk", "dv")], steps["x"])
    own = None
    if write is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and write.requires_grad):
            own = dplr_write(steps, state)
    steps, cuts = dplr_with_write(steps, write, own)
    return steps, state, cuts
