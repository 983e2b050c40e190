"""The gated delta rule of Gated DeltaNet and Qwen3-Next (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464).

S_t = exp(g_t)·S_{t-1} + k_t⊗e_t with e_t = beta_t·(x_t − (exp(g_t)·S_{t-1})ᵀk_t), and y_t = S_tᵀq_t: each step writes
what is missing for key k_t to give back value x_t. What a step adds depends on the state, but linearly: the state is
multiplied by exp(g)·(I − beta·k⊗k), and all is linear in x.

Operands carry the names of the sites: x are the values `(b, t, h, dv)`; B the keys and C the queries `(b, t, h, dk)`,
as they reach the recurrence (normalised and scaled if the model does so); g the log decay and beta, both `(b, t, h)`;
state `(b, h, dk, dv)`. Everything is computed in float32 (float64 if an operand is, or with
`accumulate=torch.float64`); y comes back in x's dtype, states in the dtype they were computed in. A shape that does not
fit raises BadInput.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from circuitbench.recurrences._linear import (
    check_edits,
    knockout_masks,
    linear_states,
    match_shapes,
    memory_cuts,
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

CHUNK = 32  # positions solved together; 16 and 64 are slower on a CPU core, a step at a time ten times slower


def forward(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    D: Float[Tensor, "h dv"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h dk dv"] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
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
    checked = check_edits(edits, x.shape[1], when)

    def scan(run: dict[str, Tensor], S: Tensor) -> tuple[Tensor, Tensor]:
        if _given(run):
            S = _given_step(run, S)
            return read(run, S), S
        _, y, S = _chunked(run, S)
        return y, S

    def read(run: dict[str, Tensor], S: Tensor) -> Tensor:
        return torch.einsum("bhkv,bhk->bhv", S, run["C"][:, -1])[:, None]

    y, final = scan_with_edits(scan, read, steps, state, checked, when, cuts)
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D).to(y) * steps["x"]
    return y.to(x.dtype), final


def states(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h dk dv"] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv"]:
    """All states S_t, after edits; arguments as in `forward`."""
    steps, state, cuts = _prepare(x, B, C, g, beta, initial_state, write, decay, accumulate)
    checked = check_edits(edits, x.shape[1], when)
    runs = [h for _, h in states_with_edits(_states, steps, state, checked, cuts)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


def iter_states(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    chunk: int | None = None,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h dk dv"] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Iterator[tuple[int, Float[Tensor, "b c h dk dv"]]]:
    """All states in bounded memory: yields (first position, states of the next `chunk` positions or fewer).

    Without `chunk`, as many positions at once as make 64 MiB of states. An edited position ends its chunk.
    """
    steps, state, cuts = _prepare(x, B, C, g, beta, initial_state, write, decay, accumulate)
    checked = check_edits(edits, x.shape[1], when)
    cuts = [*cuts, *memory_cuts(chunk, state, x.shape[1])]
    return states_with_edits(_states, steps, state, checked, cuts)


def decay_of(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h"]:
    """exp(g): the share of the state that survives each step, before the write erases what it replaces."""
    steps, _, _ = _prepare(x, B, C, g, beta, None, None, None, accumulate)
    return _decay(steps)


def write_of(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv"]:
    """k⊗e: what each step adds to the decayed state, in the run from `initial_state`."""
    steps, state, _ = _prepare(x, B, C, g, beta, initial_state, None, decay, accumulate)
    errors, _, _ = _chunked(steps, state)
    return steps["B"][..., None] * errors[..., None, :]


def adjoint(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    grad_y: Float[Tensor, "b t h dv"],
    grad_final_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv"]:
    """∂L/∂S_t at every position, later steps included: G_t = q_t⊗∂L/∂y_t + exp(g)(I − beta·k⊗k)|_{t+1} G_{t+1}."""
    steps, G, _ = _prepare(x, B, C, g, beta, grad_final_state, None, decay, accumulate, name="grad_final_state")
    match_shapes(x=(x, "b t h dv"), grad_y=(grad_y, "b t h dv"))
    k, q = steps["B"][..., None].unbind(1), steps["C"][..., None].unbind(1)
    grads = grad_y.to(G)[..., None, :].unbind(1)
    decays, betas = (steps_at[..., None, None].unbind(1) for steps_at in (_decay(steps), steps["beta"]))
    reverse = []
    for t in range(x.shape[1] - 1, -1, -1):
        G = G + q[t] * grads[t]
        reverse.append(G)
        G = decays[t] * (G - betas[t] * k[t] * (k[t].mT @ G))
    return torch.stack(reverse[::-1], 1)


def mixing(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b h t t"]:
    """The recurrence as one causal matrix per head: y = mixing·x, from a zero initial state."""
    steps, _, _ = _prepare(x, B, C, g, beta, None, None, None, accumulate)
    k, q, beta = steps["B"].transpose(1, 2), steps["C"].transpose(1, 2), steps["beta"].transpose(1, 2)
    kept = survival_from_log(steps["g"].transpose(1, 2))
    system = (beta[..., None] * k @ k.mT) * kept
    errors = torch.linalg.solve_triangular(system, torch.diag_embed(beta), upper=False, unitriangular=True)
    return (q @ k.mT * kept) @ errors


def knockout(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    g: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    sources: Bool[Tensor, "*b t"],
    destinations: Bool[Tensor, "*b t"],
    D: Float[Tensor, "h dv"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    heads: Sequence[int] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
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
    g: Float[Tensor, "b t h"],
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
        g=(g, "b t h"),
        beta=(beta, "b t h"),
        D=(D, "h" if D is None or D.ndim == 1 else "h dv"),
        write=(write, "b t h dk dv"),
        decay=(decay, "b t h"),
        **{name: (initial_state, "b h dk dv")},
    )
    dtype = working_dtype(accumulate, x, B, C, g, beta)
    steps = {"x": x, "B": B, "C": C, "g": g, "beta": beta, "decay": decay}
    steps = {key: value.to(dtype) for key, value in steps.items() if value is not None}
    state = start_state(initial_state, [size[axis] for axis in ("b", "h", "dk", "dv")], steps["x"])
    if write is None:
        return steps, state, []
    tracked = torch.is_grad_enabled() and write.requires_grad
    with torch.set_grad_enabled(tracked):
        own = write_of(x, B, C, g, beta, initial_state, decay=decay, accumulate=accumulate).to(write.dtype)
    forced = (write != own).flatten(3).any(-1)
    positions = range(size["t"]) if tracked else forced.any(2).any(0).nonzero().flatten().tolist()
    steps.update(write=write.to(dtype), forced=forced)
    if tracked:  # zero wherever it is used: it carries the gradient of `write`, and takes out what x would get twice
        steps["shift"] = (write - own).to(dtype)
    return steps, state, [cut for t in positions for cut in (t, t + 1)]


def _decay(run: dict[str, Tensor]) -> Tensor:
    return run["decay"] if "decay" in run else run["g"].exp()


def _given(run: dict[str, Tensor]) -> bool:
    """Whether the given write matters in this run, which is then one position long."""
    return "shift" in run or ("forced" in run and bool(run["forced"].any()))


def _given_step(run: dict[str, Tensor], S: Tensor) -> Tensor:
    """One position where some rows add the given write, and the others what the model's own rule says."""
    _, _, own = _chunked(run, S)
    if "shift" in run:
        own = own + run["shift"][:, 0]
    given = _decay(run)[:, 0, :, None, None] * S + run["write"][:, 0]
    return torch.where(run["forced"][:, 0, :, None, None], given, own)


def _states(run: dict[str, Tensor], S: Tensor) -> Tensor:
    if _given(run):
        return _given_step(run, S)[:, None]
    errors, _, _ = _chunked(run, S)
    return linear_states(_decay(run)[..., None, None], run["B"][..., None] * errors[..., None, :], S)


def _chunked(run: dict[str, Tensor], S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Errors e `(b, t, h, dv)`, outputs and final state, by chunks: the whole ones at once, then the rest."""
    errors, outputs = [], []
    for _, _, part in segments(run, chunk=CHUNK):
        e, y, S = _equal_chunks(part, S)
        errors += e
        outputs += y
    return torch.cat(errors, 1), torch.cat(outputs, 1), S


def _equal_chunks(run: dict[str, Tensor], S: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The UT transform of DeltaNet (Yang et al. 2024, arXiv:2406.06484) with decay.

    Within a chunk that starts from S, with P_i the decay since its start and K_ij that from j to i,
    e_i + Σ_{j<i} beta_i·K_ij·(k_i·k_j)·e_j = beta_i·(x_i − P_i·Sᵀk_i): one triangular system for all positions, whose
    inverse does not depend on S. So only three products run from chunk to chunk.
    """
    cut = (-1, min(CHUNK, run["x"].shape[1]))
    x, k, q, beta, log = (
        run[name].unflatten(1, cut).transpose(2, 3).contiguous() for name in ("x", "B", "C", "beta", "g")
    )
    if "decay" in run:
        first = run["decay"].unflatten(1, cut).transpose(2, 3)
        kept = survival(first)
    else:
        first, kept = log.exp(), survival_from_log(log)
    since_start = (kept[..., 0] * first[..., :1])[..., None]
    system = (k * beta[..., None] @ k.mT) * kept
    solve = torch.linalg.solve_triangular(system, torch.diag_embed(beta), upper=False, unitriangular=True)
    scores = (q @ k.mT) * kept
    k_to_end = k * kept[..., -1, :, None]
    parts = (x, k * since_start, q * since_start, k_to_end, solve, scores, since_start[..., -1:, :])
    errors, outputs = [], []
    for value, key, query, key_to_end, to_error, score, survives in zip(*(v.unbind(1) for v in parts), strict=True):
        e = to_error @ (value - key @ S)
        errors.append(e.transpose(1, 2))
        outputs.append((query @ S + score @ e).transpose(1, 2))
        S = survives * S + key_to_end.mT @ e
    return errors, outputs, S
