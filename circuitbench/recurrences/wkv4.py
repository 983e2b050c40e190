"""The WKV operator of RWKV-4 (Peng et al. 2023, arXiv:2305.13048).

Every channel keeps a weighted mean of its values, as numerator and denominator, with weights exp(k): position t reads
it with its own value counted exp(u) times as much, and then adds its own. In units of exp(m_t), where
m_t = max(m_{t-1} + w, k_t) keeps the numbers in range,

    h_t = exp(m_{t-1} + w − m_t)·h_{t-1} + exp(k_t − m_t)·[x_t, 1]                     the state, [num, den]
    y_t = (num_{t-1} + exp(k_t + u − m_{t-1})·x_t) / (den_{t-1} + exp(k_t + u − m_{t-1}))

m depends on k and w alone, so h is linear in what is written, and y linear in x where the denominators are held.

h_t is the state *after* position t's write, as a cache holds it. y_t reads h_{t-1}: an edit of h_t changes y_{t+1} and
all that follows, never y_t. So edits have when="after_read" here, and "before_read" raises BadInput.

Shapes: x (the values), k `(b, t, d)`; w (negative: the log of a step's decay) and u `(d,)`; initial_scale m_{-1}
`(b, d)`; D `(d,)` or None; state `(b, d, 2)`, numerator and denominator last. Everything is computed in float32
(float64 if an operand is, or with `accumulate=torch.float64`); y comes back in x's dtype, states in the dtype they were
computed in. A shape that does not fit raises BadInput.
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
    start_state,
    states_with_edits,
    survival,
    working_dtype,
)
from circuitbench.recurrences._stabiliser import before, running_max

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from circuitbench.recurrences._linear import Edits

NOTHING = -1e30  # m where nothing was written yet; transformers starts a cache so


def forward(
    x: Float[Tensor, "b t d"],
    k: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    initial_scale: Float[Tensor, "b d"] | None = None,
    D: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "b d 2"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "after_read",
    write: Float[Tensor, "b t d 2"] | None = None,
    decay: Float[Tensor, "b t d"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d 2"]]:
    """Output and final state; differentiable at O(L) cost.

    Args:
        initial_scale: m_{-1}, in whose units `initial_state` is; needed with it.
        D: a skip D·x added to y, for families that have one.
        edits: position -> new state, or function from h_t to it; y_{t+1} and all later positions follow.
        when: "after_read", the only one there is: y_t reads the state before position t's write.
        write: replaces exp(k_t − m_t)·[x_t, 1], what each position adds to the state. m, and position t's own bonus in
            y_t, follow k and x as before.
        decay: replaces exp(m_{t-1} + w − m_t).
        accumulate: torch.float64 runs the recurrence in double precision.

    Returns:
        (y, final state), the state in units of exp(m) at the last position (see `scale_of`).
    """
    steps, state = _prepare(x, k, w, u, initial_scale, initial_state, write, decay, accumulate, D)
    h = _edited(steps, state, _check_edits(edits, x.shape[1], when))
    num, den = _sums(steps, before(h, state))
    y = num / den
    if D is not None:
        y = y + D.to(y) * steps["x"]
    return y.to(x.dtype), h[:, -1].clone()


def states(
    x: Float[Tensor, "b t d"],
    k: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    initial_scale: Float[Tensor, "b d"] | None = None,
    initial_state: Float[Tensor, "b d 2"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "after_read",
    write: Float[Tensor, "b t d 2"] | None = None,
    decay: Float[Tensor, "b t d"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d 2"]:
    """All states h_t, after edits, each in units of its own exp(m_t); arguments as in `forward`."""
    steps, state = _prepare(x, k, w, u, initial_scale, initial_state, write, decay, accumulate)
    return _edited(steps, state, _check_edits(edits, x.shape[1], when))


def iter_states(
    x: Float[Tensor, "b t d"],
    k: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    initial_scale: Float[Tensor, "b d"] | None = None,
    initial_state: Float[Tensor, "b d 2"] | None = None,
    *,
    chunk: int | None = None,
    edits: Edits | None = None,
    when: str = "after_read",
    write: Float[Tensor, "b t d 2"] | None = None,
    decay: Float[Tensor, "b t d"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Iterator[tuple[int, Float[Tensor, "b c d 2"]]]:
    """All states in bounded memory: yields (first position, states of the next `chunk` positions or fewer).

    Without `chunk`, as many positions at once as make 64 MiB of states. An edited position ends its chunk.
    """
    steps, state = _prepare(x, k, w, u, initial_scale, initial_state, write, decay, accumulate)
    checked = _check_edits(edits, x.shape[1], when)
    return states_with_edits(_states, steps, state, checked, memory_cuts(chunk, state, x.shape[1]))


def scale_of(
    x: Float[Tensor, "b t d"],
    k: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    initial_scale: Float[Tensor, "b d"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d"]:
    """m_t: h_t is held in units of exp(m_t)."""
    steps, _ = _prepare(x, k, w, u, initial_scale, None, None, None, accumulate)
    return steps["m"]


def decay_of(
    x: Float[Tensor, "b t d"],
    k: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    initial_scale: Float[Tensor, "b d"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d"]:
    """exp(m_{t-1} + w − m_t): the share of the state that survives each step, in its new units."""
    steps, _ = _prepare(x, k, w, u, initial_scale, None, None, None, accumulate)
    return steps["decay"]


def write_of(
    x: Float[Tensor, "b t d"],
    k: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    initial_scale: Float[Tensor, "b d"] | None = None,
    initial_state: Float[Tensor, "b d 2"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d 2"]:
    """exp(k − m)·[x, 1]: what each step adds to the state (whatever the state is)."""
    steps, _ = _prepare(x, k, w, u, initial_scale, initial_state, None, None, accumulate)
    return steps["write"]


def adjoint(
    x: Float[Tensor, "b t d"],
    k: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    grad_y: Float[Tensor, "b t d"],
    grad_final_state: Float[Tensor, "b d 2"] | None = None,
    initial_scale: Float[Tensor, "b d"] | None = None,
    initial_state: Float[Tensor, "b d 2"] | None = None,
    *,
    decay: Float[Tensor, "b t d"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t d 2"]:
    """∂L/∂h_t at every position, later steps included, from ∂L/∂y, in the run from `initial_state`.

    y is a ratio, so its derivative depends on the state: ∂y_t/∂num_{t-1} = 1/den and ∂y_t/∂den_{t-1} = −y_t/den, in
    the units of the read.
    """
    steps, state = _prepare(x, k, w, u, initial_scale, initial_state, None, decay, accumulate)
    match_shapes(x=(x, "b t d"), grad_y=(grad_y, "b t d"), grad_final_state=(grad_final_state, "b d two"))
    earlier = before(_states(steps, state), state)
    num, den = _sums(steps, earlier)
    direct = grad_y.to(state) * steps["survives"] / den
    direct = torch.stack((direct, -direct * num / den), -1)
    direct = torch.cat((direct[:, 1:], torch.zeros_like(direct[:, :1])), 1)  # y_{t+1} reads h_t
    return reverse_states(steps["decay"][..., None], direct, start_state(grad_final_state, state.shape, state))


def mixing(
    x: Float[Tensor, "b t d"],
    k: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    initial_scale: Float[Tensor, "b d"] | None = None,
    channels: Sequence[int] | None = None,
    initial_state: Float[Tensor, "b d 2"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b c t t"]:
    """Each asked channel as a causal matrix of weights, the bonus on the diagonal: y = mixing·x, exactly.

    Rows sum to one, less what `initial_state` weighs, if one is given: y = mixing·x plus its share.

    Args:
        channels: which channels; required, since all of them at once are d matrices of t × t.
    """
    steps, state = _prepare(x, k, w, u, initial_scale, initial_state, None, None, accumulate)
    if channels is None:
        raise BadInput(f"RWKV-4 has one mixing matrix a channel; give channels=, one or more of 0 to {x.shape[2] - 1}.")
    chosen = index_list(channels, "channels", x.shape[2], x.device)
    _, den = _sums(steps, before(_states(steps, state), state))
    decay, added, survives, bonus, den = (
        value[:, :, chosen].transpose(1, 2)
        for value in (steps["decay"], steps["write"][..., 1], steps["survives"], steps["bonus"], den)
    )
    # Column s of row t: written at s, decayed up to t - 1, read at t.
    held = torch.cat((torch.zeros_like(decay)[:, :, None], survival(decay)[:, :, :-1]), 2) * added[:, :, None]
    return (held * survives[..., None] + torch.diag_embed(bonus)) / den[..., None]


def knockout(
    x: Float[Tensor, "b t d"],
    k: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    sources: Bool[Tensor, "*b t"],
    destinations: Bool[Tensor, "*b t"],
    initial_scale: Float[Tensor, "b d"] | None = None,
    D: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "b d 2"] | None = None,
    *,
    channels: Sequence[int] | None = None,
    decay: Float[Tensor, "b t d"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d 2"]]:
    """`forward` with what the values at `sources` contribute to the output at `destinations` taken out.

    The entries of the mixing matrix become zero; the other weights stay as they are, so that they no longer sum to one.
    A D skip stays. The state goes on as it was: the final state and all other positions are unchanged.

    Args:
        sources, destinations: boolean masks over positions, `(t,)` or `(b, t)`.
        channels: only in these channels (default: all).
    """
    options = {"decay": decay, "accumulate": accumulate}
    y, final = forward(x, k, w, u, initial_scale, D, initial_state, **options)
    source, destination = knockout_masks(sources, destinations, channels, "channels", x)
    weighed = None if initial_state is None else initial_state * torch.tensor([0.0, 1.0]).to(initial_state)
    removed, _ = forward(x * source, k, w, u, initial_scale, None, weighed, **options)
    return y - removed * destination, final


def frozen(
    x: Float[Tensor, "b t d"],
    k: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    initial_scale: Float[Tensor, "b d"] | None = None,
    D: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "b d 2"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d 2"]]:
    """`forward` with all but x detached, the denominators with them: linear in x, so gradient × input sums to y."""
    k, w, u = k.detach(), w.detach(), u.detach()
    initial_scale, D, initial_state = (
        None if value is None else value.detach() for value in (initial_scale, D, initial_state)
    )
    return forward(x, k, w, u, initial_scale, D, initial_state, accumulate=accumulate)


def _check_edits(edits, length, when):
    """Edits by position; none can be seen by the output of its own position."""
    if when == "before_read":
        raise BadInput(
            "y_t of RWKV-4 reads the state before position t's write, so no edit of h_t can change y_t; use "
            'when="after_read" (y_{t+1} and all that follows change), or edit position t - 1.'
        )
    return check_edits(edits, length, when)


def _prepare(x, k, w, u, initial_scale, initial_state, write, decay, accumulate, D=None):
    """What each position does to the state and how it is read, in the working dtype, and the starting state."""
    size = match_shapes(
        x=(x, "b t d"),
        k=(k, "b t d"),
        w=(w, "d"),
        u=(u, "d"),
        initial_scale=(initial_scale, "b d"),
        D=(D, "d"),
        write=(write, "b t d two"),
        decay=(decay, "b t d"),
        initial_state=(initial_state, "b d two"),
    )
    if size.get("two", 2) != 2:
        raise BadInput(f"The state of RWKV-4 has numerator and denominator last, not {size['two']} numbers.")
    if initial_state is not None and initial_scale is None:
        raise BadInput("initial_state is in units of exp(initial_scale); give initial_scale, the m it was left with.")
    dtype = working_dtype(accumulate, x, k, w, u)
    x, k, w, u = (value.to(dtype) for value in (x, k, w, u))
    start = x.new_full((size["b"], size["d"]), NOTHING) if initial_scale is None else initial_scale.to(dtype)
    m = running_max(w.expand_as(k), k, start)
    m_before = before(m, start)
    m_read = torch.maximum(m_before, k + u)
    steps = {"x": x, "m": m, "survives": (m_before - m_read).exp(), "bonus": (k + u - m_read).exp()}
    steps["decay"] = (m_before + w - m).exp() if decay is None else decay.to(dtype)
    if write is None:
        added = (k - m).exp()
        steps["write"] = torch.stack((added * x, added), -1)
    else:
        steps["write"] = write.to(dtype)
    return steps, start_state(initial_state, (size["b"], size["d"], 2), x)


def _states(run: dict[str, Tensor], state: Tensor) -> Tensor:
    # Channels innermost, as two numbers make too short a row for vector instructions.
    return linear_states(run["decay"][:, :, None], run["write"].mT, state.mT).mT


def _edited(steps: dict[str, Tensor], state: Tensor, edits: Edits) -> Tensor:
    """All states, edits included."""
    runs = [h for _, h in states_with_edits(_states, steps, state, edits)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


def _sums(run: dict[str, Tensor], earlier: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of every read, from the states one position earlier."""
    survives, bonus = run["survives"], run["bonus"]
    return survives * earlier[..., 0] + bonus * run["x"], survives * earlier[..., 1] + bonus
