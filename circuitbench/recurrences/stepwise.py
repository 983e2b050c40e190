"""A recurrence from its step alone: slow, and right; a researcher's first version.

h_t = step(h_{t-1}, operands at t) and y_t = read(h_t, operands at t). From these two functions come all the verbs that
the recurrences written by hand have, with their meaning; what they know of the recurrence beyond that comes from
running it. The step may be anything that torch can differentiate: a state that takes gradient steps of its own, too.

Travels to remote servers by value, and the functions with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from circuitbench.errors import BadInput
from circuitbench.recurrences._linear import (
    CHUNK_BYTES,
    check_edits,
    index_list,
    knockout_masks,
    memory_cuts,
    start_state,
    working_dtype,
)
from circuitbench.recurrences._steps import Steps

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from circuitbench.recurrences._linear import Edits
    from circuitbench.recurrences._steps import Edited, Run

ROUNDING = 1e-3  # of the largest number: what a matrix that is the scan's may be off by, in single precision


class Stepwise(Steps):
    """The verbs of a recurrence, derived from its step: see `Steps` for what it is made of.

    Every verb takes the operands by name, and everything is computed in float32 (float64 if an operand is, or with
    `accumulate=torch.float64`); y comes back in x's dtype, states in the dtype they were computed in.
    """

    # The verbs --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        *,
        D: Float[Tensor, " ..."] | None = None,
        initial_state: Float[Tensor, " b *state"] | None = None,
        edits: Edits | None = None,
        when: str = "before_read",
        write: Float[Tensor, "b t *state"] | None = None,
        decay: Float[Tensor, "b t *kept"] | None = None,
        accumulate: torch.dtype | None = None,
        **operands: Tensor,
    ) -> tuple[Float[Tensor, "b t *y"], Float[Tensor, " b *state"]]:
        """Output and final state.

        Args:
            D: a skip D·x added to y, with the first of x's axes behind `b t`.
            initial_state: h_{-1}; zeros if not given.
            edits: position -> new state, or function from h_t to it.
            when: "before_read": y_t and all later positions follow the edit; "after_read": y_t keeps the unedited read.
            write: where it differs from `write_of` (at a position, in a row, and in a head if the state has an axis
                `h`), exactly this is added to the decayed state; where it is equal, the step stands. A gradient with
                respect to `write` is that of one position's write, later ones following the step.
            decay: replaces the recurrence's own.
            accumulate: torch.float64 runs the recurrence in double precision.

        Returns:
            (y, final state).
        """
        run = self._prepared(operands, initial_state, write, decay, accumulate, D)
        checked = check_edits(edits, run.length, when)
        outputs, state = [], run.start
        for now, reached, state in self._walk(run, checked):
            outputs.append(self._output(reached if when == "after_read" else state, now))
        y, x = torch.stack(outputs, 1), operands["x"]
        if D is not None:
            if y.shape != x.shape:
                raise BadInput(f"read makes y of shape {tuple(y.shape)} from x of {tuple(x.shape)}; D·x does not fit.")
            y = y + D.to(y).reshape(*D.shape, *[1] * (x.ndim - 2 - D.ndim)) * x.to(y)
        return y.to(x.dtype), state

    def states(
        self,
        *,
        initial_state: Float[Tensor, " b *state"] | None = None,
        edits: Edits | None = None,
        when: str = "before_read",
        write: Float[Tensor, "b t *state"] | None = None,
        decay: Float[Tensor, "b t *kept"] | None = None,
        accumulate: torch.dtype | None = None,
        **operands: Tensor,
    ) -> Float[Tensor, "b t *state"]:
        """All states h_t, after edits; arguments as in `forward`."""
        run = self._prepared(operands, initial_state, write, decay, accumulate)
        return torch.stack([state for _, _, state in self._walk(run, check_edits(edits, run.length, when))], 1)

    def iter_states(
        self,
        *,
        initial_state: Float[Tensor, " b *state"] | None = None,
        chunk: int | None = None,
        edits: Edits | None = None,
        when: str = "before_read",
        write: Float[Tensor, "b t *state"] | None = None,
        decay: Float[Tensor, "b t *kept"] | None = None,
        accumulate: torch.dtype | None = None,
        **operands: Tensor,
    ) -> Iterator[tuple[int, Float[Tensor, "b c *state"]]]:
        """All states in bounded memory: yields (first position, states of the next `chunk` positions or fewer).

        Without `chunk`, as many positions at once as make 64 MiB of states.
        """
        run = self._prepared(operands, initial_state, write, decay, accumulate)
        ends = {*memory_cuts(chunk, run.start, run.length), run.length}
        return self._chunks(run, check_edits(edits, run.length, when), ends)

    def decay_of(self, *, accumulate: torch.dtype | None = None, **operands: Tensor) -> Float[Tensor, "b t *kept"]:
        """The share of the state that survives each step."""
        self._must_decay()
        run = self._prepared(operands, accumulate=accumulate)
        kept = [now.decay.reshape(run.decay_shape) for now in self._moments(run)]
        return torch.stack(kept, 1)

    def write_of(
        self,
        *,
        initial_state: Float[Tensor, " b *state"] | None = None,
        decay: Float[Tensor, "b t *kept"] | None = None,
        accumulate: torch.dtype | None = None,
        **operands: Tensor,
    ) -> Float[Tensor, "b t *state"]:
        """h_t − decay_t·h_{t-1}: what each step adds to the decayed state, in the run from `initial_state`."""
        run = self._prepared(operands, initial_state, None, decay, accumulate)
        return self._written(run)

    def adjoint(
        self,
        *,
        grad_y: Float[Tensor, "b t *y"],
        grad_final_state: Float[Tensor, " b *state"] | None = None,
        initial_state: Float[Tensor, " b *state"] | None = None,
        decay: Float[Tensor, "b t *kept"] | None = None,
        accumulate: torch.dtype | None = None,
        **operands: Tensor,
    ) -> Float[Tensor, "b t *state"]:
        """∂L/∂h_t at every position, later steps included, by autograd through the steps.

        Args:
            grad_y: ∂L/∂y.
            grad_final_state: what else L owes to the final state.
            initial_state: the run's; of consequence where a step is not linear in the state.
        """
        tracked = torch.is_grad_enabled()
        with torch.enable_grad():
            run = self._prepared(operands, initial_state, None, decay, accumulate)
            last = start_state(grad_final_state, run.start.shape, run.start)
            states, outputs = [], []
            for now, _, state in self._walk(run, dict.fromkeys(range(run.length), in_the_graph)):
                states.append(state)
                outputs.append(self._output(state, now))
            shape = (len(outputs[0]), run.length, *outputs[0].shape[1:])
            if tuple(grad_y.shape) != shape:
                raise BadInput(f"grad_y has shape {tuple(grad_y.shape)}; it must be {shape}.")
            pairs = [*zip(outputs, grad_y.to(last).unbind(1), strict=True), (states[-1], last)]
            pairs = [(output, grad) for output, grad in pairs if output.requires_grad]
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                states,
                [grad for _, grad in pairs],
                create_graph=tracked,
                materialize_grads=True,
            )
        return torch.stack(found, 1)

    def mixing(
        self, *, channels: Sequence[int] | None = None, accumulate: torch.dtype | None = None, **operands: Tensor
    ) -> Float[Tensor, "b parts t t"]:
        """The recurrence as causal matrices, from a zero initial state: y = mixing·x. Runs it once for every position.

        Args:
            channels: one matrix for each of these channels (x's axes behind `b t`, flattened). Not given: one for each
                head (x's third axis), for all of its channels.

        Raises:
            BadInput: if y is not linear in x, or not by one such matrix.
        """
        self._must_be_linear("mixing")
        dtype = working_dtype(accumulate, *operands.values())
        given: dict[str, Any] = {name: v.to(dtype) if v.is_floating_point() else v for name, v in operands.items()}
        y, _ = self.forward(**given)
        x = given["x"]
        if channels is None and x.ndim != 4:
            raise BadInput(f"x has axes {self.operands['x']!r}, so no heads: name the channels, as in channels=[0, 1].")
        if y.shape != x.shape:
            raise BadInput(f"read makes y of shape {tuple(y.shape)} from x of {tuple(x.shape)}: no matrix does that.")
        columns = self._responses(given)
        if channels is None:
            matrix = columns[..., 0].permute(1, 3, 2, 0)
            mixed = torch.einsum("bhts,bshv->bthv", matrix, x)
        else:
            asked = index_list(channels, "channels", x[0, 0].numel(), x.device)
            matrix = columns.flatten(3)[..., asked].permute(1, 3, 2, 0)
            mixed = torch.einsum("bcts,bsc->btc", matrix, x.flatten(2)[..., asked])
            y = y.flatten(2)[..., asked]
        if not (mixed - y).abs().max() <= ROUNDING * y.abs().max():
            per = "head" if channels is None else "channel"
            raise BadInput(
                f"This recurrence is not one matrix over positions for every {per}: its y is not mixing·x. Leave "
                "mixing out of the map" + (", or name channels." if channels is None else ".")
            )
        return matrix

    def knockout(
        self,
        *,
        sources: Bool[Tensor, "*b t"],
        destinations: Bool[Tensor, "*b t"],
        D: Float[Tensor, " ..."] | None = None,
        initial_state: Float[Tensor, " b *state"] | None = None,
        heads: Sequence[int] | None = None,
        decay: Float[Tensor, "b t *kept"] | None = None,
        accumulate: torch.dtype | None = None,
        **operands: Tensor,
    ) -> tuple[Float[Tensor, "b t *y"], Float[Tensor, " b *state"]]:
        """`forward` with what the values at `sources` contribute to the output at `destinations` taken out; D·x stays.

        Exact, because y is linear in x. The final state and all other positions are unchanged.

        Args:
            sources, destinations: boolean masks over positions, `(t,)` or `(b, t)`.
            heads: only in these (x's third axis; default: all).
        """
        self._must_be_linear("knockout")
        given: dict[str, Any] = operands
        y, final = self.forward(**given, D=D, initial_state=initial_state, decay=decay, accumulate=accumulate)
        source, destination = knockout_masks(sources, destinations, heads, "heads", operands["x"])
        alone: dict[str, Any] = {**operands, "x": operands["x"] * source}
        removed, _ = self.forward(**alone, decay=decay, accumulate=accumulate)
        return y - removed * destination.reshape(*destination.shape[:2], *[1] * (y.ndim - 2)), final

    def frozen(
        self,
        *,
        D: Float[Tensor, " ..."] | None = None,
        initial_state: Float[Tensor, " b *state"] | None = None,
        accumulate: torch.dtype | None = None,
        **operands: Tensor,
    ) -> tuple[Float[Tensor, "b t *y"], Float[Tensor, " b *state"]]:
        """`forward` with all but x detached: linear in x, so gradient × input sums to y (from a zero initial state)."""
        self._must_be_linear("frozen")
        given: dict[str, Any] = {name: value if name == "x" else value.detach() for name, value in operands.items()}
        D = None if D is None else D.detach()
        initial_state = None if initial_state is None else initial_state.detach()
        return self.forward(**given, D=D, initial_state=initial_state, accumulate=accumulate)

    def _must_be_linear(self, verb: str) -> None:
        if not self.linear:
            raise BadInput(
                f"There is no {verb} of this recurrence: its y is not linear in x, so that what one position gives to "
                "another is not defined (if it is linear, say so: Stepwise(..., linear=True))."
            )

    def _chunks(self, run: Run, edits: Edited, ends: set[int]) -> Iterator[tuple[int, Tensor]]:
        """(first position, states) up to each of the ends."""
        start, held = 0, []
        for position, (_, _, state) in enumerate(self._walk(run, edits)):
            held.append(state)
            if position + 1 in ends:
                yield start, torch.stack(held, 1)
                start, held = position + 1, []

    def _responses(self, operands: dict[str, Tensor]) -> Tensor:
        """y `(source, b, t, ...)` of a run for every source position, where x is 1 there and 0 elsewhere."""
        x = operands["x"]
        size = sum(value.numel() for value in operands.values()) + 4 * self._prepared(operands).start.numel()
        found = []
        for sources in torch.arange(x.shape[1], device=x.device).split(max(1, CHUNK_BYTES // (8 * size))):
            count = len(sources)
            many: dict[str, Any] = {
                name: value.expand(count, *value.shape).flatten(0, 1)
                if self.operands[name].split()[:1] == ["b"]
                else value
                for name, value in operands.items()
            }
            one = x.new_zeros(count, *x.shape)
            one[torch.arange(count), :, sources] = 1
            y, _ = self.forward(**{**many, "x": one.flatten(0, 1)})
            found.append(y.unflatten(0, (count, len(x))))
        return torch.cat(found)


def in_the_graph(state: Tensor) -> Tensor:
    """A node of its own, where autograd can be asked for the gradient."""
    return state if state.requires_grad else state.detach().requires_grad_()
