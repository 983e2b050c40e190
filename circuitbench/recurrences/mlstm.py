"""mLSTM, the matrix memory of xLSTM (Beck et al. 2024, arXiv:2405.04517).

Every head keeps a matrix C and a normaliser n, with exponential input gates and sigmoid forget gates. In units of
exp(m_t), where m_t = max(log σ(f_t) + m_{t-1}, i_t) keeps the numbers in range,

    [C_t | n_t] = exp(log σ(f_t) + m_{t-1} − m_t)·[C_{t-1} | n_{t-1}] + exp(i_t − m_t)·k_t⊗[x_t, 1]
    y_t = C_tᵀq_t / (max(|n_t·q_t|, exp(−m_t)) + eps)

m depends on the gates alone, so [C | n] is a linear recurrence in these units, and y linear in x where the denominators
are held.

Operands carry the names of the sites: x are the values `(b, t, h, dv)`; B the keys and C the queries `(b, t, h, dk)`,
as they reach the recurrence (scaled if the model does so); input_gate and forget_gate `(b, t, h)` before exp and
sigmoid; initial_scale m_{-1} `(b, h)`, zeros by default; eps a number. The state is `(b, h, dk, dv + 1)`: C, and the
normaliser n as its last column. Everything is computed in float32 (float64 if an operand is, or with
`accumulate=torch.float64`); y comes back in x's dtype, states in the dtype they were computed in. A shape that does not
fit raises BadInput.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

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
    working_dtype,
)
from circuitbench.recurrences._stabiliser import before, running_max

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from circuitbench.recurrences._linear import Edits

CHUNK = 32  # positions per matrix product
EPS = 1e-6  # xLSTM's default


def forward(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    input_gate: Float[Tensor, "b t h"],
    forget_gate: Float[Tensor, "b t h"],
    initial_scale: Float[Tensor, "b h"] | None = None,
    eps: float | Float[Tensor, ""] = EPS,
    D: Float[Tensor, "h dv"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h dk dv+1"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h dk dv+1"] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h dk dv+1"]]:
    """Output and final state; differentiable at O(L) cost.

    Args:
        initial_scale: m_{-1}, in whose units `initial_state` is.
        eps: added to the denominators.
        D: a skip D·x added to y, for families that have one.
        edits: position -> new state, or function from [C_t | n_t] to it.
        when: "before_read": y_t and all later positions follow the edit; "after_read": y_t keeps the unedited read.
        write: replaces exp(i − m)·k⊗[x, 1], what each position adds to the state. m follows the gates as before.
        decay: replaces exp(log σ(f) + m_{t-1} − m_t).
        accumulate: torch.float64 runs the recurrence in double precision.

    Returns:
        (y, final state), the state in units of exp(m) at the last position (see `scale_of`).
    """
    steps, state = _prepare(x, B, C, input_gate, forget_gate, initial_scale, initial_state, write, decay, accumulate, D)
    checked = check_edits(edits, x.shape[1], when)

    def scan(run: dict[str, Tensor], S: Tensor) -> tuple[Tensor, Tensor]:
        if "write" not in run:
            return _chunked(run, S)
        states = _states(run, S)
        return torch.einsum("bthkv,bthk->bthv", states, run["C"]), states[:, -1]

    def read(run: dict[str, Tensor], S: Tensor) -> Tensor:
        return torch.einsum("bhkv,bhk->bhv", S, run["C"][:, -1])[:, None]

    cuts = () if write is None else memory_cuts(None, state, x.shape[1])
    sums, final = scan_with_edits(scan, read, steps, state, checked, when, cuts)
    y = sums[..., :-1] / _denominators(sums[..., -1], steps["m"], eps)[..., None]
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D).to(y) * x.to(y)
    return y.to(x.dtype), final


def states(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    input_gate: Float[Tensor, "b t h"],
    forget_gate: Float[Tensor, "b t h"],
    initial_scale: Float[Tensor, "b h"] | None = None,
    eps: float | Float[Tensor, ""] = EPS,
    initial_state: Float[Tensor, "b h dk dv+1"] | None = None,
    *,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h dk dv+1"] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv+1"]:
    """All states [C_t | n_t], after edits, each in units of its own exp(m_t); arguments as in `forward`."""
    steps, state = _prepare(x, B, C, input_gate, forget_gate, initial_scale, initial_state, write, decay, accumulate)
    checked = check_edits(edits, x.shape[1], when)
    runs = [h for _, h in states_with_edits(_states, steps, state, checked)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 1)


def iter_states(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    input_gate: Float[Tensor, "b t h"],
    forget_gate: Float[Tensor, "b t h"],
    initial_scale: Float[Tensor, "b h"] | None = None,
    eps: float | Float[Tensor, ""] = EPS,
    initial_state: Float[Tensor, "b h dk dv+1"] | None = None,
    *,
    chunk: int | None = None,
    edits: Edits | None = None,
    when: str = "before_read",
    write: Float[Tensor, "b t h dk dv+1"] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Iterator[tuple[int, Float[Tensor, "b c h dk dv+1"]]]:
    """All states in bounded memory: yields (first position, states of the next `chunk` positions or fewer).

    Without `chunk`, as many positions at once as make 64 MiB of states. An edited position ends its chunk.
    """
    steps, state = _prepare(x, B, C, input_gate, forget_gate, initial_scale, initial_state, write, decay, accumulate)
    checked = check_edits(edits, x.shape[1], when)
    return states_with_edits(_states, steps, state, checked, memory_cuts(chunk, state, x.shape[1]))


def scale_of(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    input_gate: Float[Tensor, "b t h"],
    forget_gate: Float[Tensor, "b t h"],
    initial_scale: Float[Tensor, "b h"] | None = None,
    eps: float | Float[Tensor, ""] = EPS,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h"]:
    """m_t: [C_t | n_t] is held in units of exp(m_t)."""
    steps, _ = _prepare(x, B, C, input_gate, forget_gate, initial_scale, None, None, None, accumulate)
    return steps["m"]


def decay_of(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    input_gate: Float[Tensor, "b t h"],
    forget_gate: Float[Tensor, "b t h"],
    initial_scale: Float[Tensor, "b h"] | None = None,
    eps: float | Float[Tensor, ""] = EPS,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h"]:
    """exp(log σ(f) + m_{t-1} − m_t): the share of the state that survives each step, in its new units."""
    steps, _ = _prepare(x, B, C, input_gate, forget_gate, initial_scale, None, None, None, accumulate)
    return steps["decay"]


def write_of(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    input_gate: Float[Tensor, "b t h"],
    forget_gate: Float[Tensor, "b t h"],
    initial_scale: Float[Tensor, "b h"] | None = None,
    eps: float | Float[Tensor, ""] = EPS,
    initial_state: Float[Tensor, "b h dk dv+1"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv+1"]:
    """exp(i − m)·k⊗[x, 1]: what each step adds to the state (whatever the state is)."""
    steps, _ = _prepare(x, B, C, input_gate, forget_gate, initial_scale, initial_state, None, None, accumulate)
    return _write(steps)


def adjoint(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    input_gate: Float[Tensor, "b t h"],
    forget_gate: Float[Tensor, "b t h"],
    grad_y: Float[Tensor, "b t h dv"],
    grad_final_state: Float[Tensor, "b h dk dv+1"] | None = None,
    initial_scale: Float[Tensor, "b h"] | None = None,
    eps: float | Float[Tensor, ""] = EPS,
    initial_state: Float[Tensor, "b h dk dv+1"] | None = None,
    *,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b t h dk dv+1"]:
    """∂L/∂[C_t | n_t] at every position, later steps included, from ∂L/∂y, in the run from `initial_state`.

    y is a ratio, so its derivative depends on the state: through n where |n·q| is the denominator, else not.
    """
    steps, state = _prepare(x, B, C, input_gate, forget_gate, initial_scale, initial_state, None, decay, accumulate)
    match_shapes(x=(x, "b t h dv"), grad_y=(grad_y, "b t h dv"), grad_final_state=(grad_final_state, "b h dk columns"))
    sums, _ = _chunked(steps, state)
    num, den = sums[..., :-1], sums[..., -1]
    total = _denominators(den, steps["m"], eps)
    direct = grad_y.to(state) / total[..., None]
    through = torch.where(den.abs() > (-steps["m"]).exp(), -den.sign() * (direct * num).sum(-1) / total, 0.0)
    direct = steps["C"][..., None] * torch.cat((direct, through[..., None]), -1)[..., None, :]
    return reverse_states(steps["decay"][..., None, None], direct, start_state(grad_final_state, state.shape, state))


def mixing(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    input_gate: Float[Tensor, "b t h"],
    forget_gate: Float[Tensor, "b t h"],
    initial_scale: Float[Tensor, "b h"] | None = None,
    eps: float | Float[Tensor, ""] = EPS,
    initial_state: Float[Tensor, "b h dk dv+1"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "b h t t"]:
    """The recurrence as one causal matrix per head, denominators included: y = mixing·x, exactly.

    If an `initial_state` is given, y is mixing·x plus what the denominators leave of the initial C.
    """
    steps, state = _prepare(x, B, C, input_gate, forget_gate, initial_scale, initial_state, None, None, accumulate)
    sums, _ = _chunked(steps, state)
    total = _denominators(sums[..., -1], steps["m"], eps)
    k, q, decay, added, total = (
        v.transpose(1, 2) for v in (steps["B"], steps["C"], steps["decay"], steps["added"], total)
    )
    return q @ k.mT * survival(decay) * added[:, :, None] / total[..., None]


def knockout(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    input_gate: Float[Tensor, "b t h"],
    forget_gate: Float[Tensor, "b t h"],
    sources: Bool[Tensor, "*b t"],
    destinations: Bool[Tensor, "*b t"],
    initial_scale: Float[Tensor, "b h"] | None = None,
    eps: float | Float[Tensor, ""] = EPS,
    D: Float[Tensor, "h dv"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h dk dv+1"] | None = None,
    *,
    heads: Sequence[int] | None = None,
    decay: Float[Tensor, "b t h"] | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h dk dv+1"]]:
    """`forward` with what the values at `sources` contribute to the output at `destinations` taken out.

    The entries of the mixing matrix become zero; the denominators stay as they are, and so does a D skip. The state
    goes on as it was: the final state and all other positions are unchanged.

    Args:
        sources, destinations: boolean masks over positions, `(t,)` or `(b, t)`.
        heads: only in these heads (default: all).
    """
    given, options = (B, C, input_gate, forget_gate, initial_scale, eps), {"decay": decay, "accumulate": accumulate}
    y, final = forward(x, *given, D, initial_state, **options)
    source, destination = knockout_masks(sources, destinations, heads, "heads", x)
    weighed = None
    if initial_state is not None:
        weighed = torch.cat((torch.zeros_like(initial_state[..., :-1]), initial_state[..., -1:]), -1)
    removed, _ = forward(x * source, *given, None, weighed, **options)
    return y - removed * destination, final


def frozen(
    x: Float[Tensor, "b t h dv"],
    B: Float[Tensor, "b t h dk"],
    C: Float[Tensor, "b t h dk"],
    input_gate: Float[Tensor, "b t h"],
    forget_gate: Float[Tensor, "b t h"],
    initial_scale: Float[Tensor, "b h"] | None = None,
    eps: float | Float[Tensor, ""] = EPS,
    D: Float[Tensor, "h dv"] | Float[Tensor, " h"] | None = None,
    initial_state: Float[Tensor, "b h dk dv+1"] | None = None,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h dk dv+1"]]:
    """`forward` with all but x detached, the denominators with them: linear in x, so gradient × input sums to y."""
    B, C, input_gate, forget_gate = B.detach(), C.detach(), input_gate.detach(), forget_gate.detach()
    initial_scale, D, initial_state = (
        None if value is None else value.detach() for value in (initial_scale, D, initial_state)
    )
    eps = eps.detach() if isinstance(eps, torch.Tensor) else eps
    return forward(x, B, C, input_gate, forget_gate, initial_scale, eps, D, initial_state, accumulate=accumulate)


def _prepare(x, B, C, input_gate, forget_gate, initial_scale, initial_state, write, decay, accumulate, D=None):
    """What each position does to the state, in the working dtype, and the starting state."""
    size = match_shapes(
        x=(x, "b t h dv"),
        B=(B, "b t h dk"),
        C=(C, "b t h dk"),
        input_gate=(input_gate, "b t h"),
        forget_gate=(forget_gate, "b t h"),
        initial_scale=(initial_scale, "b h"),
        D=(D, "h" if D is None or D.ndim == 1 else "h dv"),
        decay=(decay, "b t h"),
    )
    columns = {"t": size["t"], "b": size["b"], "h": size["h"], "dk": size["dk"], "dv+1": size["dv"] + 1}
    for name, tensor, axes in (("initial_state", initial_state, "b h dk dv+1"), ("write", write, "b t h dk dv+1")):
        if tensor is not None and tuple(tensor.shape) != tuple(columns[axis] for axis in axes.split()):
            known = ", ".join(f"{axis}={columns[axis]}" for axis in axes.split())
            raise BadInput(f"{name} has shape {tuple(tensor.shape)}; it must be ({known}).")
    dtype = working_dtype(accumulate, x, B, C, input_gate, forget_gate)
    x, B, C, i, log_forget = (value.to(dtype) for value in (x, B, C, input_gate, forget_gate))
    log_forget = F.logsigmoid(log_forget)
    start = i.new_zeros(size["b"], size["h"]) if initial_scale is None else initial_scale.to(dtype)
    m = running_max(log_forget, i, start)
    steps = {"B": B, "C": C, "m": m, "added": (i - m).exp()}
    steps["decay"] = (before(m, start) + log_forget - m).exp() if decay is None else decay.to(dtype)
    steps["x"] = torch.cat((x, torch.ones_like(x[..., :1])), -1)
    if write is not None:
        steps["write"] = write.to(dtype)
    return steps, start_state(initial_state, [columns[axis] for axis in ("b", "h", "dk", "dv+1")], x)


def _denominators(den: Tensor, m: Tensor, eps: float | Tensor) -> Tensor:
    return torch.maximum(den.abs(), (-m).exp()) + eps


def _write(run: dict[str, Tensor]) -> Tensor:
    if "write" in run:
        return run["write"]
    return run["B"][..., None] * (run["added"][..., None] * run["x"])[..., None, :]


def _states(run: dict[str, Tensor], S: Tensor) -> Tensor:
    return linear_states(run["decay"][..., None, None], _write(run), S)


def _chunked(run: dict[str, Tensor], S: Tensor) -> tuple[Tensor, Tensor]:
    """[Cᵀq, n·q] at every position, and the final state, by chunks: the whole ones at once, then the rest."""
    outputs = []
    for _, _, part in segments(run, chunk=CHUNK):
        sums, S = _equal_chunks(part, S)
        outputs += sums
    return torch.cat(outputs, 1), S


def _equal_chunks(run: dict[str, Tensor], S: Tensor) -> tuple[list[Tensor], Tensor]:
    """Within a chunk a masked matrix product, from chunk to chunk the state (as in xLSTM 7B, arXiv:2503.13427)."""
    cut = (-1, min(CHUNK, run["x"].shape[1]))
    x, k, q, decay, added = (run[name].unflatten(1, cut).transpose(2, 3) for name in ("x", "B", "C", "decay", "added"))
    kept = survival(decay)
    since_start = (kept[..., 0] * decay[..., :1])[..., None]
    inputs = x * added[..., None]
    parts = (inputs, q * since_start, k * kept[..., -1, :, None], (q @ k.mT) * kept, since_start[..., -1:, :])
    outputs = []
    for value, query, key, score, survives in zip(*(v.unbind(1) for v in parts), strict=True):
        outputs.append((query @ S + score @ value).transpose(1, 2))
        S = survives * S + key.mT @ value
    return outputs, S
