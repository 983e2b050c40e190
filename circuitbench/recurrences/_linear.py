"""What all recurrences share: checked operands, edits that cut the sequence, and the scan h_t = a_t·h_{t-1} + w_t.

A recurrence is written once for an unbroken run of positions. An edit of h_t ends one run and begins the next, so edits
cost nothing where there are none. Every tensor over positions is cut by a single `split`: its backward is one
concatenation, while indexing the whole tensor at each cut would write a full-size gradient per cut (O(L²)).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    Edits = Mapping[int, Tensor | Callable[[Tensor], Tensor]]

CHUNK_BYTES = 64 * 2**20  # states held at once where all are not needed together


def match_shapes(**operands: tuple[Tensor | None, str]) -> dict[str, int]:
    """Binds every axis name to a size, or says in one sentence which operand does not fit.

    Args:
        operands: name -> (tensor or None, its axes as one word each, such as `"b t d"`; a number is its own size).

    Returns:
        axis name -> size.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, axes) in operands.items():
        words = axes.split()
        sizes.update({word: int(word) for word in words if word.isdigit()})
        if tensor is None:
            continue
        found = dict(zip(words, tensor.shape, strict=False))
        if tensor.ndim != len(words) or any(sizes.get(word, size) != size for word, size in found.items()):
            known = ", ".join(f"{w}={sizes[w]}" if w in sizes and not w.isdigit() else w for w in words)
            raise BadInput(f"{name} has shape {tuple(tensor.shape)}; it must be ({known}).")
        sizes.update(found)
    if sizes["t"] == 0:
        raise BadInput("The sequence is empty; give at least one position.")
    return sizes


def working_dtype(accumulate: torch.dtype | None, *tensors: Tensor | None) -> torch.dtype:
    """float32 for half and single precision, float64 for double; `accumulate` overrides."""
    if accumulate is not None:
        if accumulate not in (torch.float32, torch.float64):
            raise BadInput(f"accumulate={accumulate} is not possible; use torch.float32 or torch.float64.")
        return accumulate
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def start_state(initial_state: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
    """The state before position 0: the given one in the working dtype, or zeros."""
    if initial_state is None:
        return like.new_zeros(shape)
    if tuple(initial_state.shape) != tuple(shape):
        raise BadInput(f"initial_state has shape {tuple(initial_state.shape)}; it must be {tuple(shape)}.")
    return initial_state.to(like)


def check_edits(edits: Edits | None, length: int, when: str) -> dict[int, Tensor | Callable[[Tensor], Tensor]]:
    """Edits by position in increasing order, or one sentence on what is wrong with them."""
    if when not in ("before_read", "after_read"):
        raise BadInput(f'when={when!r} is not possible; use "before_read" or "after_read".')
    checked = {}
    for position, edit in (edits or {}).items():
        t = operator.index(position)
        if not 0 <= t < length:
            raise BadInput(f"An edit is asked at position {t}; the positions of this sequence are 0 to {length - 1}.")
        checked[t] = edit
    return dict(sorted(checked.items()))


def apply_edit(edit: Tensor | Callable[[Tensor], Tensor], state: Tensor, position: int) -> Tensor:
    """The edited state. The function gets a copy, so that editing in place harms nothing that was read before."""
    edited = edit(state.clone()) if callable(edit) else edit
    if not isinstance(edited, torch.Tensor) or edited.shape != state.shape:
        got = tuple(edited.shape) if isinstance(edited, torch.Tensor) else type(edited).__name__
        raise BadInput(f"The edit at position {position} gives {got}; the state is {tuple(state.shape)}.")
    return edited.to(state)


def segments(
    steps: dict[str, Tensor], edits: Iterable[int] = (), cuts: Iterable[int] = (), chunk: int = 1
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Runs of positions: (start, stop, operands of the run).

    A run ends after an edit, before a cut, and where less than `chunk` positions are left: its length is a multiple of
    `chunk` or less than that, so that chunked forms need no padding.
    """
    length = next(iter(steps.values())).shape[1]
    ends = sorted({0, length} | {t + 1 for t in edits} | set(cuts))
    ends = sorted({*ends, *(stop - (stop - start) % chunk for start, stop in pairwise(ends))})
    sizes = [stop - start for start, stop in pairwise(ends)]
    runs = zip(*(tensor.split(sizes, dim=1) for tensor in steps.values()), strict=True)
    for (start, stop), run in zip(pairwise(ends), runs, strict=True):
        yield start, stop, dict(zip(steps, run, strict=True))


def pairwise(values: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours (itertools is not among the imports that travel)."""
    return list(zip(values[:-1], values[1:], strict=True))


def scan_with_edits(
    scan: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Tensor]],
    read: Callable[[dict[str, Tensor], Tensor], Tensor],
    steps: dict[str, Tensor],
    state: Tensor,
    edits: Mapping[int, Tensor | Callable[[Tensor], Tensor]],
    when: str,
    cuts: Iterable[int] = (),
) -> tuple[Tensor, Tensor]:
    """Outputs and final state of `scan` run piece by piece, with the state changed at the edited positions.

    Args:
        scan: (operands of a run, state before it) -> (outputs of the run, state after it).
        read: (operands of a run, state) -> output at the run's last position, with a position axis of length 1.
        steps: operands over positions, each `(b, t, ...)`.
        state: the state before position 0.
        edits: position -> new state, or function from the state to the new one.
        when: whether the output at the edited position reads the state before or after the edit.
        cuts: further positions before which a run ends.
    """
    outputs = []
    for _, stop, run in segments(steps, edits, cuts):
        y, state = scan(run, state)
        if stop - 1 in edits:
            state = apply_edit(edits[stop - 1], state, stop - 1)
            if when == "before_read":
                y = torch.cat((y[:, :-1], read(run, state)), 1)
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state


def states_with_edits(
    states: Callable[[dict[str, Tensor], Tensor], Tensor],
    steps: dict[str, Tensor],
    state: Tensor,
    edits: Mapping[int, Tensor | Callable[[Tensor], Tensor]],
    cuts: Iterable[int] = (),
) -> Iterator[tuple[int, Tensor]]:
    """All states, run by run: (first position, states of the run), an edited state in place of the recurrence's own."""
    for start, stop, run in segments(steps, edits, cuts):
        h = states(run, state)
        state = h[:, -1].clone()  # the caller may change or drop what is handed out
        if stop - 1 in edits:
            state = apply_edit(edits[stop - 1], state, stop - 1)
            h = torch.cat((h[:, :-1], state[:, None]), 1)
        yield start, h
        del h  # not two chunks at a time


def memory_cuts(chunk: int | None, state: Tensor, length: int) -> range:
    """A cut every `chunk` positions, by default as many as make CHUNK_BYTES of states."""
    if chunk is None:
        chunk = max(1, CHUNK_BYTES // (state.numel() * state.element_size()))
    if operator.index(chunk) < 1:
        raise BadInput(f"chunk={chunk} is not possible; give how many positions to hand out at once, at least 1.")
    return range(chunk, length, chunk)


def knockout_masks(
    sources: Bool[Tensor, "*b t"],
    destinations: Bool[Tensor, "*b t"],
    parts: Sequence[int] | None,
    parts_name: str,
    x: Float[Tensor, "b t ..."],
) -> tuple[Bool[Tensor, "_b t ..."], Bool[Tensor, "_b t ..."]]:
    """Both masks with x's axes; the sources only in the asked parts (heads or channels, x's third axis)."""
    batch, length, count = x.shape[:3]
    masks = []
    for name, mask in (("sources", sources), ("destinations", destinations)):
        if mask.dtype != torch.bool or tuple(mask.shape) not in ((length,), (batch, length)):
            raise BadInput(
                f"{name} is {mask.dtype} of shape {tuple(mask.shape)}; it must be a boolean mask of shape "
                f"({length},) or ({batch}, {length})."
            )
        masks.append(mask.reshape(-1, length, *[1] * (x.ndim - 2)))
    if parts is not None:
        chosen = torch.zeros(count, dtype=torch.bool, device=x.device)
        chosen[index_list(parts, parts_name, count, x.device)] = True
        masks[0] = masks[0] & chosen.reshape(-1, *[1] * (x.ndim - 3))
    return masks[0], masks[1]


def index_list(indices: Sequence[int], name: str, size: int, device: torch.device) -> Tensor:
    """Heads or channels as an index tensor, each checked to exist."""
    checked = [operator.index(i) for i in indices]
    if not checked or not all(0 <= i < size for i in checked):
        raise BadInput(f"{name}={checked} is not possible; give one or more of 0 to {size - 1}.")
    return torch.tensor(checked, device=device)


def linear_states(
    decay: Float[Tensor, "b t ..."], write: Float[Tensor, "b t ..."], initial_state: Float[Tensor, "b ..."]
) -> Float[Tensor, "b t ..."]:
    """All h_t = decay_t·h_{t-1} + write_t (elementwise), differentiable to any order at O(L) cost.

    Args:
        decay: broadcasts against the state at each position (axes of size 1 where it does not depend on them).
        write: what each position adds, of the state's shape.
        initial_state: h_{-1}.
    """
    return _Scan.apply(decay, write, initial_state)


def reverse_states(
    decay: Float[Tensor, "b t ..."], grad: Float[Tensor, "b t ..."], grad_final: Float[Tensor, "b ..."]
) -> Float[Tensor, "b t ..."]:
    """All g_t = grad_t + decay_{t+1}·g_{t+1}, plus `grad_final` at the last one: the adjoint of `linear_states`."""
    return _ReverseScan.apply(decay, grad, grad_final)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay, write, state):
        states = torch.empty_like(write)
        ctx.save_for_backward(decay, state, states)
        h = state
        for a, w, out in zip(decay.unbind(1), write.unbind(1), states.unbind(1), strict=True):
            h = torch.addcmul(w, a, h, out=out)
        return states

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        decay, state, states = ctx.saved_tensors
        g = reverse_states(decay, grad, torch.zeros_like(state))
        before = torch.cat((state[:, None], states[:, :-1]), 1)
        return (g * before).sum_to_size(decay.shape), g, (decay[:, 0] * g[:, 0]).sum_to_size(state.shape)


class _ReverseScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay, grad, grad_final):
        out = torch.empty_like(grad)
        ctx.save_for_backward(decay, out)
        decays, outs = decay.unbind(1), out.unbind(1)
        g = torch.add(grad[:, -1], grad_final, out=outs[-1])
        for a, w, o in zip(decays[:0:-1], grad.unbind(1)[-2::-1], outs[-2::-1], strict=True):
            g = torch.addcmul(w, a, g, out=o)
        return out

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        decay, g = ctx.saved_tensors
        u = linear_states(decay, grad, torch.zeros_like(grad[:, 0]))
        before = torch.cat((torch.zeros_like(u[:, :1]), u[:, :-1]), 1)
        return (before * g).sum_to_size(decay.shape), u, u[:, -1]


def survival(decay: Float[Tensor, "... t"]) -> Float[Tensor, "... t t"]:
    """[i, j] = the product of the decays at j+1 … i, 1 on the diagonal and 0 above it; decays of any sign, and zero."""
    later = _later(decay)
    return torch.where(later.mT, decay[..., None], 1.0).cumprod(-2).masked_fill(later, 0.0)


def survival_from_log(log_decay: Float[Tensor, "... t"]) -> Float[Tensor, "... t t"]:
    """`survival` of exp(log_decay).

    The logarithms are summed for each pair on its own: a difference of two running sums loses all digits behind one
    large step.
    """
    later = _later(log_decay)
    return torch.where(later.mT, log_decay[..., None], 0.0).cumsum(-2).exp().masked_fill(later, 0.0)


def _later(steps: Float[Tensor, "... t"]) -> Bool[Tensor, "t t"]:
    """[i, j]: j comes after i. (Not by `tril`, which starts all threads even for a tiny matrix.)"""
    position = torch.arange(steps.shape[-1], device=steps.device)
    return position > position[:, None]
