"""A recurrence as the two functions somebody wrote, `step` and `read`: what they are given, run over the positions.

What `stepwise.Stepwise` derives its verbs from. Travels to remote servers by value, and the functions with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from circuitbench.errors import BadInput
from circuitbench.recurrences._linear import apply_edit, match_shapes, start_state, working_dtype

if TYPE_CHECKING:
    from torch import Tensor

    Edited = Mapping[int, Tensor | Callable[[Tensor], Tensor]]

RESERVED = ("D", "initial_state", "edits", "when", "write", "decay", "accumulate", "chunk", "channels", "heads")
RESERVED += ("sources", "destinations", "grad_y", "grad_final_state")  # arguments of the verbs


class Now:
    """What a step is given beside the state: the operands at its position, as attributes.

    Attributes:
        decay: Where the recurrence names a decay: the one of this position, with an axis of size 1 for every axis of
            the state that it does not depend on.
    """

    decay: Tensor

    def __init__(self, operands: Mapping[str, Tensor]) -> None:
        self.__dict__.update(operands)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"A step is given {', '.join(self.__dict__)}; there is no operand {name!r}.")


class Run:
    """One run of a recurrence.

    Attributes:
        fixed: Operands that are the same at all positions.
        steps: Operands over positions, and what replaces the recurrence's own decay and writes.
        start: h_{-1}.
        decay_shape: Of the decay at one position.
    """

    def __init__(
        self, fixed: dict[str, Tensor], steps: dict[str, Tensor], start: Tensor, decay_shape: list[int]
    ) -> None:
        self.fixed = fixed
        self.steps = steps
        self.start = start
        self.decay_shape = decay_shape

    @property
    def length(self) -> int:
        """Positions."""
        return self.steps["x"].shape[1]


class Steps:
    """A step and a read, checked against the axes they are said to have.

    Attributes:
        operands, state, linear: As given.
        write_follows_state: What a step adds may depend on the state before it; a `Scan` of this recurrence says so.
    """

    write_follows_state = True

    def __init__(
        self,
        step: Callable[[Tensor, Now], Tensor],
        read: Callable[[Tensor, Now], Tensor],
        operands: Mapping[str, str],
        state: str,
        *,
        decay: Callable[[Now], Tensor] | None = None,
        decay_axes: str = "",
        linear: bool = False,
    ) -> None:
        """
        Args:
            step: (h_{t-1}, operands at t) -> h_t.
            read: (h_t, operands at t) -> y_t.
            operands: Name -> axes, a word each: `{"x": "b t h v", "k": "b t h k", "A": "h"}`. Axes of one name are of
                one size. Those with `b t` first have a value at every position, the others are the same at all. `x` is
                what is mixed over positions (values, inputs), and must be among them.
            state: Axes of the state, `b` first; a number stands for its size: `"b h 2 k v"`.
            decay: (operands at t) -> what share of the state survives the step. `step` is then given it as `now.decay`
                and must use that, so that it can be replaced; what a step writes is h_t − decay·h_{t-1}. Without it,
                that is h_t − h_{t-1}.
            decay_axes: Axes of the decay: some of the state's, in their order, such as `"b h 2"`.
            linear: Whether y is linear in x when the other operands stand still. Only then are there `mixing`,
                `knockout` and `frozen`. (`circuitbench check` finds out whether it is true.)

        Raises:
            BadInput: For axes that do not fit together.
        """
        own, kept = state.split(), decay_axes.split()
        if operands.get("x", "").split()[:2] != ["b", "t"]:
            raise BadInput(f'The operand x has axes {operands.get("x")!r}; give it, with "b t" first.')
        if taken := [name for name in operands if name in RESERVED]:
            raise BadInput(f"An operand cannot be called {taken[0]!r}, which is an argument of the verbs; rename it.")
        known = {axis for axes in operands.values() for axis in axes.split()}
        lost = [axis for axis in own if not axis.isdigit() and axis not in known]
        if own[:1] != ["b"] or "t" in own or lost:
            raise BadInput(
                f"The state has axes {state!r}; they begin with b, are without t, and each is an axis of an operand or "
                "a number" + (f" ({', '.join(lost)} is neither)." if lost else ".")
            )
        if (decay is None) != (not kept) or [axis for axis in own if axis in kept] != kept:
            raise BadInput(
                f"decay_axes is {decay_axes!r}; give both decay and decay_axes, which are some of the state's axes "
                f"({state}), in their order; or neither."
            )
        self.operands = dict(operands)
        self.state = state
        self.linear = linear
        self._step = step
        self._read = read
        self._decay = decay
        self._decay_axes = decay_axes

    def _must_decay(self) -> None:
        if self._decay is None:
            raise BadInput("This recurrence names no decay; give Stepwise its decay= and decay_axes=.")

    def _prepared(
        self,
        operands: dict[str, Tensor],
        initial_state: Tensor | None = None,
        write: Tensor | None = None,
        decay: Tensor | None = None,
        accumulate: torch.dtype | None = None,
        D: Tensor | None = None,
    ) -> Run:
        """Checked operands in the working dtype, the starting state, and what replaces the recurrence's own."""
        if operands.keys() != self.operands.keys():
            raise BadInput(
                f"The operands of this recurrence are {', '.join(self.operands)}; given were {', '.join(operands)}."
            )
        if decay is not None:
            self._must_decay()
        behind = self.operands["x"].split()[2:]
        over_positions = f"b t {self.state.removeprefix('b')}"
        size = match_shapes(
            **{name: (value, self.operands[name]) for name, value in operands.items()},
            D=(D, "" if D is None else " ".join(behind[: D.ndim])),
            write=(write, over_positions),
            decay=(decay, f"b t {self._decay_axes.removeprefix('b')}"),
            initial_state=(initial_state, self.state),
        )
        dtype = working_dtype(accumulate, *operands.values())
        # Copies: a step that works in place changes no tensor of the model.
        values = {
            name: value.to(dtype, copy=True) if value.is_floating_point() else value for name, value in operands.items()
        }
        steps = {name: value for name, value in values.items() if self.operands[name].split()[:2] == ["b", "t"]}
        state = [size[axis] for axis in self.state.split()]
        run = Run(
            fixed={name: value for name, value in values.items() if name not in steps},
            steps=steps,
            start=start_state(initial_state, state, values["x"]),
            decay_shape=[size[axis] for axis in self._decay_axes.split()],
        )
        if decay is not None:
            steps["decay"] = decay.to(dtype)
        if write is not None:
            # The gradient of `write` goes past the rule, and takes out what the operands would get twice.
            tracked = torch.is_grad_enabled() and write.requires_grad
            with torch.set_grad_enabled(tracked):
                own = self._written(run).to(write.dtype)
            forced = write != own
            within = [axis for axis, name in enumerate(over_positions.split()) if axis > 1 and name != "h"]
            forced = forced.any(dim=within, keepdim=True) if within else forced
            run.steps = {**steps, "write": write.to(dtype), "forced": forced}
            if tracked:
                run.steps["shift"] = (write - own).to(dtype)
        return run

    def _moments(self, run: Run) -> Iterator[Now]:
        """The operands position by position."""
        names = list(run.steps)
        for values in zip(*(value.unbind(1) for value in run.steps.values()), strict=True):
            now = Now({**run.fixed, **dict(zip(names, values, strict=True))})
            if self._decay is not None:
                value = now.decay if "decay" in run.steps else self._decay(now)
                if list(value.shape) != run.decay_shape:
                    raise BadInput(f"decay gives {tuple(value.shape)}; by decay_axes it is {tuple(run.decay_shape)}.")
                for axis, name in enumerate(self.state.split()):
                    value = value if name in self._decay_axes.split() else value.unsqueeze(axis)
                now.decay = value
            yield now

    def _walk(self, run: Run, edits: Edited) -> Iterator[tuple[Now, Tensor, Tensor]]:
        """(operands, state as the step leaves it, that state after its edit) at every position."""
        state = run.start
        for position, now in enumerate(self._moments(run)):
            reached = self._next(state, now)
            state = apply_edit(edits[position], reached, position) if position in edits else reached
            yield now, reached, state

    def _written(self, run: Run) -> Tensor:
        """h_t − decay_t·h_{t-1} at all positions."""
        added, before = [], run.start
        for now, _, state in self._walk(run, {}):
            added.append(state - self._kept(before, now))
            before = state
        return torch.stack(added, 1)

    def _next(self, state: Tensor, now: Now) -> Tensor:
        """h_t by the step; or, where another write is given, by that."""
        own = self._step(state.clone(), now)  # the step may work in place
        if not isinstance(own, torch.Tensor) or own.shape != state.shape:
            got = tuple(own.shape) if isinstance(own, torch.Tensor) else type(own).__name__
            raise BadInput(f"step gives {got}; the state is {tuple(state.shape)} ({self.state}).")
        given = now.__dict__
        if "write" not in given:
            return own.to(state)
        if "shift" in given:
            own = own + given["shift"]
        return torch.where(given["forced"], self._kept(state, now) + given["write"], own)

    def _kept(self, state: Tensor, now: Now) -> Tensor:
        """What survives of the state."""
        return state if self._decay is None else now.decay * state

    def _output(self, state: Tensor, now: Now) -> Tensor:
        """y_t."""
        y = self._read(state.clone(), now)
        if not isinstance(y, torch.Tensor) or y.ndim == 0 or len(y) != len(state):
            got = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise BadInput(f"read gives {got}; y of one position has the batch, {len(state)}, as its first axis.")
        return y
