"""One run of a scan, and what all blocks of the batch have asked of it.

Blocks meet here: interventions that are held, and a user's own; several invokes of one batch. Each puts in what it
changes while the model waits at the scan's input; the recurrence is then replayed once, with all of it, for the whole
batch.

Travels to remote servers by value (see `events`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..errors import BadInput
from .spots import splice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..architectures.scans import Call, Scan


class Firing:
    """One run of the scan operation; everything in it is for the whole batch, in canonical form.

    Attributes:
        operands: What the recurrence is given, edits included.
        overrides: decay and write, where a block has put others in the place of the recurrence's own.
        edits: State edits: (rows, position, tensor or function).
        knockouts: Masks over positions, `(b, t)`, and heads.
        stale: Whether the model's own output no longer holds, so that the recurrence has to be replayed.
        tracked: Whether a block wants gradients of what it was handed out.
        gate: The gate; `gated`: whether the operation itself applies one; `gate_taken`: whether it was kept from it.
        y: Scan output before the gate, once the operation has run, and every edit of it.
        state: Final state, in the form that the operation returned it.
        started: Whether a block has given it the state it starts from.
        instead: What stands in for a loop that is skipped.
    """

    def __init__(self, address: str, scan: Scan, recurrence: Any, call: Call, decoding: bool) -> None:
        self.address = address
        self.scan = scan
        self.recurrence = recurrence
        self.call = call
        self.decoding = decoding
        self.operands = dict(call.operands)
        self.overrides: dict[str, Tensor] = {}
        self.edits: list[tuple[slice, int, Any]] = []
        self.when = self.default
        self.knockouts: list[dict[str, Any]] = []
        self.stale = False
        self.tracked = False
        self.gate: Any = call.gate
        self.gated = call.gate is not None
        self.gate_taken = False
        self.y: Any = None
        self.state: Any = None
        self.dtype: Any = None
        self.strides: Any = None
        self.instead: Any = None
        self.started = False

    @property
    def default(self) -> str:
        """When a state edit comes that does not say when: before whatever reads the state."""
        return "after_read" if self.scan.reads_before_write else "before_read"

    # What goes in -----------------------------------------------------------------------------------------------------

    def current(self, name: str) -> Tensor:
        """An operand, the decay, or what each step writes, as it now stands."""
        if name in self.overrides:
            return self.overrides[name]
        if name == "decay":
            return self.recurrence.decay_of(**self.operands)
        if name == "write":
            own = {**self.operands, "initial_state": self.call.initial_state}
            if self.scan.write_follows_state and "decay" in self.overrides:
                own["decay"] = self.overrides["decay"]
            return self.recurrence.write_of(**own)
        return self.operands[name]

    def put(self, name: str, rows: slice, value: Tensor) -> None:
        """Replace some rows of an operand, the decay or the writes."""
        home = self.operands if name in self.operands else self.overrides
        home[name] = splice(self.current(name), rows, value)

    def start_from(self, state: Tensor) -> None:
        """Let the recurrence go on from a state that the operation itself does not take."""
        self.call.initial_state = state.to(self.call.operands["x"].device)
        self.started = True
        self.stale = True

    def edit(self, rows: slice, position: int, value: Any, when: str) -> None:
        """Add a state edit."""
        if when == "before_read" and self.scan.reads_before_write:
            raise BadInput(
                f"{self.address}.edit_state: y of a position reads the state before the position's own write, so no "
                'edit of its state can change that y; use when="after_read" (y changes from the next position on), or '
                "edit the position before."
            )
        if self.edits and when != self.when:
            raise BadInput(
                f'{self.address}: state edits with when="{self.when}" and when="{when}" cannot share a run of the scan.'
            )
        self.when = when
        self.edits.append((rows, position, value))
        self.stale = True

    def knock_out(self, knockout: dict[str, Any]) -> None:
        """Add a knockout. Removing one contribution twice would put it in with a minus sign."""
        for other in self.knockouts:
            heads, others = knockout["heads"], other["heads"]
            shared = heads is None or others is None or set(heads) & set(others)
            pairs = (knockout["sources"] & other["sources"]).any(1) & (
                knockout["destinations"] & other["destinations"]
            ).any(1)
            if shared and pairs.any():
                raise BadInput(
                    f"{self.address}: two Knockouts remove the same source from the same destination; merge them."
                )
        self.knockouts.append(knockout)
        self.stale = True

    # What comes out ---------------------------------------------------------------------------------------------------

    def changes(self) -> dict[str, Any]:
        """The edits of the recurrence itself, as its verbs take them."""
        edits: dict[int, Any] = {}
        for rows, position, value in self.edits:
            edits[position] = composed(edits.get(position), rows, value)
        return {
            **self.operands,
            **self.overrides,
            "initial_state": self.call.initial_state,
            "edits": edits or None,
            "when": self.when,
        }

    def states(self) -> Tensor:
        """All h_t."""
        return self.recurrence.states(**self.changes())

    def scale(self) -> Tensor:
        """The logarithm of the units that the states are in."""
        return self.recurrence.scale_of(**self.operands)

    def iter_states(self, chunk: int) -> Iterator[tuple[int, Tensor]]:
        """(first position, states of a chunk of positions), in bounded memory."""
        return self.recurrence.iter_states(**self.changes(), chunk=chunk)

    def mixing(self, channels: Any) -> Tensor:
        """The scan as a causal matrix."""
        if self.overrides or self.knockouts:
            raise BadInput(
                f"{self.address}.mixing is the matrix of the operands; where decay or write were edited, or a Knockout "
                "was asked for, read it in a run of its own."
            )
        given = {} if channels is None else {"channels": channels}
        if self.scan.weighs:
            given["initial_state"] = self.call.initial_state
        return self.recurrence.mixing(**self.operands, **given)

    def replay(self) -> tuple[Tensor, Tensor]:
        """y before the gate and the final state, with everything the blocks asked for."""
        y, state = self.recurrence.forward(**self.changes(), D=self.call.D)
        if self.knockouts and (self.edits or self.overrides):
            raise BadInput(f"{self.address}: a Knockout cannot share one run of the scan with edits of its state.")
        for knockout in self.knockouts:
            asked = {key: value for key, value in knockout.items() if value is not None}
            start = {"initial_state": self.call.initial_state, "D": self.call.D}
            without, _ = self.recurrence.knockout(**self.operands, **start, **asked)
            plain, _ = self.recurrence.forward(**self.operands, **start)
            y = y + (without - plain)
        return y, state

    def ran(self, output: Any) -> bool:
        """Take over what the operation returned, replayed where it was touched; tells whether to publish it."""
        own = self.scan.output_y(output, self.decoding)
        self.y, self.dtype, self.strides = own, own.dtype, own.stride()
        if self.call.returns_state:
            self.state = output[1]
        if self.stale:
            y, state = self.replay()
            self.y = self.laid_out(y.to(own.dtype))
            self.keep(state)
        elif self.tracked:  # only gradients are asked for: the model's own numbers, the replay's derivatives
            y, _ = self.replay()
            self.y = own.detach() + (y - y.detach()).to(own.dtype)
        return self.stale or self.tracked or self.gate_taken

    def skipped(self) -> list[Any]:
        """What to put in front of a loop so that it leaves the replayed result (see `Scan.skip`)."""
        if self.instead is None:
            y, state = self.replay()
            self.instead = self.scan.skip(self.call, y.to(self.call.dtype), state, self.decoding)
        return self.instead

    def run_here(self) -> None:
        """y by the recurrence, where the model makes it only together with the gate."""
        y, state = self.replay()
        self.y, self.dtype = y.to(self.call.dtype), self.call.dtype
        self.state = state if self.stale else None

    def packed_head(self, head: int, own: Any, args: tuple, kwargs: dict) -> Any:
        """What the operation returns for one head; `own` is what it has returned."""
        packed = self.scan.pack_head(self.call, head, self.y, self.state, args, kwargs)
        return (packed, own[1]) if isinstance(own, tuple) and not isinstance(packed, tuple) else packed

    def keep(self, state: Tensor) -> None:
        """The final state, to where the model keeps it for the next step."""
        if self.call.cache is not None:
            with torch.no_grad():
                self.call.cache.copy_(state)
        elif self.state is not None:
            self.state = self.scan.kept(self.state, state, self.scale()[:, -1] if self.scan.weighs else None)

    def packed(self) -> Any:
        """The operation's output as the model takes it, gated as the operation would have."""
        if self.gate_taken:
            y = self.laid_out((self.y * F.silu(self.gate).reshape(self.y.shape)).to(self.dtype))  # no head axis
        else:
            y = self.y = self.laid_out(self.y.to(self.dtype))  # what is handed out is what the model gets, not a copy
        return self.scan.pack(self.call, y, self.state, self.decoding)

    def laid_out(self, y: Tensor) -> Tensor:
        """y in memory as the operation's own output was: matrix products round as they find their operands."""
        if y.stride() == self.strides:
            return y
        return torch.empty_strided(y.shape, self.strides, dtype=y.dtype, device=y.device).copy_(y)


def composed(first: Any, rows: slice, value: Any) -> Any:
    """One edit of some rows of h_t after another."""

    def edit(state):
        if first is not None:
            state = first(state)
        part = state[rows]
        new: Any = value(part) if callable(value) else value
        return splice(state, rows, new)

    return edit
