"""The sites inside a scan: what it is given, its state, its output, read and changed while the model runs.

A scan is one operation of the model. Its operands are read from that operation's inputs; everything else (the state,
the decay, what a step writes) is recomputed from them, exactly. An edit replays the recurrence and replaces the
operation's output, so it works for a whole sequence, for one decoding step with its cache, and beside other blocks of
the same batch.

Travels to remote servers by value (see `events`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..errors import BadInput
from .events import flush, notes, own_rows, passed, read_whole, wanted, worker, write_back, write_whole
from .spots import edited, matching, splice, version_of, visit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight.intervention.envoy import Envoy
    from torch import Tensor

    from ..architectures.scans import Call, Scan


class Firing:
    """One run of the scan operation, shared by every block of the batch.

    Attributes:
        gate: The gate that the operation would have applied, once it has been taken from it; canonical, whole batch.
        y: Scan output before the gate, canonical, whole batch, once the operation has run.
        dtype: What the operation returned y in (Mamba-2's torch code: float32, whatever the model is in).
        state: Final state it returned, or the cache it updated.
    """

    def __init__(self) -> None:
        self.gate: Any = None
        self.y: Any = None
        self.state: Any = None


class ScanRun:
    """One block's dealings with one run of the scan."""

    def __init__(self, address: str, envoy: Envoy, scan: Scan, recurrence: Any) -> None:
        now = visit(envoy, address)
        self.address = address
        self.scan = scan
        self.recurrence = recurrence
        self.decoding = now.decoding
        self.length = now.length
        operation = f"{envoy.path}.source.{scan.step if now.decoding else scan.sequence}"
        self.input, self.output = f"{operation}.input", f"{operation}.output"
        self.occurrence = wanted(self.input)
        if passed(self.input, self.occurrence):
            raise self.too_late("its sites were asked for")
        self.rows = own_rows(self.input)
        batcher = worker(self.input).interleaver.batcher
        if not hasattr(batcher, "circuitbench"):
            batcher.circuitbench = {}
        self.firing: Any = batcher.circuitbench.setdefault((operation, self.occurrence), Firing())
        args, kwargs = read_whole(self.input)
        self.whole: Call = scan.read(args, kwargs, self.decoding)
        shared = self.whole.operands
        self.operands = {key: shared[key][self.rows] if key in scan.operand_names else shared[key] for key in shared}
        initial = self.whole.initial_state
        self.initial_state = None if initial is None else initial[self.rows]
        gate = self.firing.gate if self.firing.gate is not None else self.whole.gate
        self.gate: Any = None if gate is None else gate[self.rows]
        self.gated = gate is not None
        self.held: dict[str, tuple[Tensor, int]] = {}  # what the block holds, and its version when it was handed out
        self.given: dict[str, Tensor] = {}  # what the block assigned
        self.edits: dict[int, Any] = {}
        self.when = "before_read"
        self.knockouts: list[dict[str, Any]] = []
        self.overridden: set[str] = set()  # decay and write, where the block changed them
        self.replayed = False
        self.pending: Any = None  # the write-back that will settle this run

    def too_late(self, what: str) -> BadInput:
        """The error for anything asked after the model has moved on."""
        return BadInput(
            f"{self.address}: {what} after the model had moved past its scan; ask for sites in forward order "
            "(operands and state edits, then y, gate, gated, out, then later layers)."
        )

    # Operands -------------------------------------------------------------------------------------------------------

    def current(self, name: str) -> Tensor:
        """An operand (or decay, or write) as it now stands: assigned, held, or the model's own."""
        if name in self.given:
            return self.given[name]
        if name in self.held:
            return self.held[name][0]
        if name == "decay":
            return self.recurrence.decay_of(**self.current_operands())
        if name == "write":
            return self.own_write()
        return self.operands[name]

    def own_write(self) -> Tensor:
        """What each step adds to the state by the model's own rule."""
        operands = {**self.current_operands(), **self.starting()}
        if self.scan.write_follows_state and ("decay" in self.given or "decay" in self.held):
            operands["decay"] = self.current("decay")
        return self.recurrence.write_of(**operands)

    def current_operands(self) -> dict[str, Tensor]:
        """All operands as they now stand."""
        return {key: self.current(key) for key in self.operands}

    def starting(self) -> dict[str, Tensor | None]:
        """The state this run starts from."""
        return {"initial_state": self.initial_state}

    def take(self, name: str) -> Tensor:
        """Hand out an operand: a tensor of the block's own, whose edits are replayed."""
        if name not in self.held and name not in self.given:
            self.check_order(name)
            value = self.current(name)
            value = value.clone() if name in self.operands else value
            self.held[name] = (value, version_of(value))
            self.settle_later(f"{name} was asked for")
        return self.current(name)

    def give(self, name: str, value: Tensor) -> None:
        """Replace an operand."""
        self.check_order(name)
        now = self.current(name)
        value = matching(value, now, f"{self.address}.{name}")
        if same(value, now):
            return
        if passed(self.input, self.occurrence):
            raise self.too_late(f"{name} was written")
        self.given[name] = value
        self.settle_later(f"{name} was written")

    def check_order(self, name: str) -> None:
        """What a step writes is read before the state is edited, where it depends on the state."""
        if name == "write" and self.edits and self.scan.write_follows_state:
            raise BadInput(f"{self.address}.write depends on the state; read and write it before you edit the state.")

    def changed(self, names: tuple[str, ...]) -> bool:
        """Whether the block changed any of these, by assignment or in place; the same values again are no change."""
        return any(name in self.given or (name in self.held and self.edited_in_place(name)) for name in names)

    def edited_in_place(self, name: str) -> bool:
        """Whether what the block holds was edited, and differs from what it would be otherwise."""
        value, version = self.held[name]
        if not edited(value, version):
            return False
        held = self.held.pop(name)
        untouched = torch.equal(value, self.current(name))
        self.held[name] = held
        return not untouched

    # The state --------------------------------------------------------------------------------------------------------

    def changes(self) -> dict[str, Any]:
        """The edits of the recurrence itself, as its verbs take them."""
        changes: dict[str, Any] = {"edits": self.edits or None, "when": self.when}
        for name in ("write", "decay"):
            if self.changed((name,)) or (name in self.held and torch.is_grad_enabled()):
                self.overridden.add(name)
            if name in self.overridden:
                changes[name] = self.current(name)
        return changes

    def states(self) -> Tensor:
        """All h_t of this run, edits included."""
        return self.recurrence.states(**self.current_operands(), **self.starting(), **self.changes())

    def iter_states(self, chunk: int) -> Iterator[tuple[int, Tensor]]:
        """(first position, states of a chunk of positions), in bounded memory."""
        return self.recurrence.iter_states(**self.current_operands(), **self.starting(), **self.changes(), chunk=chunk)

    def edit(self, edits: dict[int, Any], when: str) -> None:
        """Register state edits, by position."""
        if when not in ("before_read", "after_read"):
            raise BadInput(f'when= is "before_read" or "after_read", not {when!r}.')
        if self.edits and when != self.when:
            raise BadInput(
                f'{self.address}: state edits with when="{self.when}" and when="{when}" cannot share a run of the scan.'
            )
        if passed(self.input, self.occurrence):
            raise self.too_late("the state was edited")
        for position, value in edits.items():
            if not isinstance(position, int) or not -self.length <= position < self.length:
                raise BadInput(
                    f"{self.address}.edit_state: position {position!r} is out of range; this run has positions "
                    f"0 to {self.length - 1} (negative ones count from the end)."
                )
            position %= self.length
            self.edits[position] = composed(self.edits.get(position), value)
        self.when = when
        self.settle_later("the state was edited")

    def mixing(self, channels: Any = None) -> Tensor:
        """The scan as a causal matrix."""
        given = {} if channels is None else {"channels": channels}
        return self.recurrence.mixing(**self.current_operands(), **given)

    def knock_out(self, sources: Tensor, destinations: Tensor, heads: Any = None) -> None:
        """Register a knockout of what `sources` contribute to y at `destinations`."""
        if passed(self.input, self.occurrence):
            raise self.too_late("a knockout was asked for")
        if self.decoding:
            raise BadInput(
                f"{self.address}: a Knockout needs its sources in the same forward; while one token is decoded from a "
                "cached state, what came from where can no longer be told apart."
            )
        self.knockouts.append({"sources": sources, "destinations": destinations, "heads": heads})
        self.settle_later("a knockout was asked for")

    def replay(self) -> tuple[Tensor, Tensor]:
        """y before the gate and the final state, with everything the block asked for."""
        operands = self.current_operands()
        changes = self.changes()
        y, state = self.recurrence.forward(**operands, D=self.whole.D, **self.starting(), **changes)
        if self.knockouts and (self.edits or "write" in changes or "decay" in changes):
            raise BadInput(f"{self.address}: a Knockout cannot share one run of the scan with edits of its state.")
        for index, knockout in enumerate(self.knockouts):
            check_disjoint(self.address, knockout, self.knockouts[:index])
            without, _ = self.recurrence.knockout(
                **operands, D=self.whole.D, **self.starting(), **{k: v for k, v in knockout.items() if v is not None}
            )
            plain, _ = self.recurrence.forward(**operands, D=self.whole.D, **self.starting())
            y = y + (without - plain)
        return y, state

    # The output -------------------------------------------------------------------------------------------------------

    def arrive(self) -> None:
        """Let the operation run, and keep what it returned."""
        if self.firing.y is None:
            if self.gated and self.firing.gate is None:
                args, kwargs = read_whole(self.input)
                self.firing.gate = self.whole.gate
                write_whole(self.input, self.scan.gateless(args, kwargs))
            output = read_whole(self.output)
            self.firing.y = self.scan.output_y(output, self.decoding)
            self.firing.dtype = self.firing.y.dtype
            if self.whole.returns_state:
                self.firing.state = output[1]
            if self.firing.gate is not None:
                self.publish()  # other blocks of the batch may never ask for y
        else:
            read_whole(self.output)

    def publish(self) -> None:
        """Hand the operation's output to the model, gated as the operation would have."""
        y = self.firing.y
        if self.firing.gate is not None:
            y = y * F.silu(self.firing.gate).reshape(y.shape)  # the gate has no head axis
        packed = self.scan.pack(self.whole, y.to(self.firing.dtype).contiguous(), self.firing.state, self.decoding)
        write_whole(self.output, packed)

    def take_y(self) -> Tensor:
        """The scan's output before the gate."""
        self.be_at_output()
        if "y" not in self.held:
            value = self.firing.y[self.rows]
            tracked = torch.is_grad_enabled() and value.requires_grad
            if (self.gated and self.rows != slice(None)) or (tracked and (self.gated or value._is_view())):
                value = value.clone()
            self.held["y"] = (value, version_of(value))
        self.settle_later("y was asked for")
        return self.held["y"][0]

    def give_y(self, value: Tensor) -> None:
        """Replace the scan's output before the gate."""
        self.be_at_output()
        now = self.firing.y[self.rows]
        value = matching(value, now, f"{self.address}.y")
        if not same(value, now) or "y" in self.held:
            self.held.pop("y", None)
            self.firing.y = splice(self.firing.y, self.rows, value)
            self.publish()
        self.settle_later("y was written")

    def be_at_output(self) -> None:
        """Wait at the operation's output, with every edit of its inputs replayed."""
        if passed(self.output, self.occurrence):
            raise self.too_late("y was asked for")
        mediator = worker(self.output)
        if mediator.transform is self.pending:
            mediator.transform = None  # settled here instead, so that the gate can be taken before the operation runs
            self.settle()
        self.arrive()

    def settle_later(self, what: str) -> None:
        """Settle when the block moves on."""
        if passed(self.output, self.occurrence):
            raise self.too_late(what)
        mediator = worker(self.output)
        if mediator.transform is not self.pending:
            flush(mediator)
        self.pending = write_back(self.output, self.occurrence, self.settle)

    def settle(self) -> None:
        """Make what the block asked for true: replay if the recurrence was touched, publish if the output was."""
        inputs = (*self.operands, "write", "decay")
        if self.replayed and any(edited(*self.held[name]) for name in inputs if name in self.held):
            raise self.too_late("an operand was edited in place")
        dirty = not self.replayed and self.settle_inputs(inputs)
        if "gate" in self.given or ("gate" in self.held and (edited(*self.held["gate"]) or torch.is_grad_enabled())):
            self.arrive()
            self.firing.gate = splice(self.firing.gate, self.rows, self.current("gate"))
            dirty = True
        if "y" in self.held:
            value, version = self.held["y"]
            if value.data_ptr() != self.firing.y[self.rows].data_ptr():
                self.firing.y = splice(self.firing.y, self.rows, value)
                dirty = True
            elif self.gated and edited(value, version):
                dirty = True
        if dirty:
            self.publish()

    def settle_inputs(self, inputs: tuple[str, ...]) -> bool:
        """Replay the recurrence if the block changed it, or wants gradients of it; tells whether it did."""
        touched = bool(self.edits or self.knockouts) or self.changed(inputs)
        tracked = torch.is_grad_enabled() and any(self.held[n][0].requires_grad for n in inputs if n in self.held)
        if not (touched or tracked):
            return False
        if "y" in self.held and passed(self.input, self.occurrence):
            raise self.too_late("an operand was edited")
        y, state = self.replay()
        self.replayed = True
        for name in inputs:  # from here on, an edit in place comes too late
            if name in self.held:
                self.held[name] = (self.held[name][0], version_of(self.held[name][0]))
        self.arrive()
        if not touched:  # only gradients are asked for: the model's own numbers, the replay's derivatives
            y = self.firing.y[self.rows].detach() + (y - y.detach())
        self.firing.y = splice(self.firing.y, self.rows, y.to(self.firing.y.dtype))
        if touched:
            self.put_state(state)
        return True

    def put_state(self, state: Tensor) -> None:
        """The final state, to where the model keeps it for the next step."""
        if self.whole.cache is not None:
            with torch.no_grad():
                self.whole.cache[self.rows].copy_(state)
        elif self.whole.returns_state and self.firing.state is not None:
            self.firing.state = splice(self.firing.state, self.rows, state.to(self.firing.state.dtype))

    def take_gate(self) -> Tensor:
        """The gate before its activation, where the operation itself applies it."""
        if "gate" not in self.held and "gate" not in self.given:
            value = self.gate.clone()
            self.held["gate"] = (value, version_of(value))
            self.settle_later("the gate was asked for")
        return self.current("gate")

    def give_gate(self, value: Tensor) -> None:
        """Replace the gate."""
        value = matching(value, self.gate, f"{self.address}.gate")
        if same(value, self.gate):
            return
        self.given["gate"] = value
        self.settle_later("the gate was written")


def same(value: Tensor, now: Tensor) -> bool:
    """Whether writing `value` over `now` changes nothing at all: not a bit, and no gradient."""
    return value is now or (torch.equal(value, now) and not (torch.is_grad_enabled() and value.requires_grad))


def composed(first: Any, then: Any) -> Any:
    """One edit after another at the same position."""
    if first is None or isinstance(then, torch.Tensor):
        return then

    def both(state: Tensor) -> Tensor:
        return then(first(state) if callable(first) else first)

    return both


def check_disjoint(address: str, knockout: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
    """Removing one contribution twice would put it in with a minus sign."""
    for other in earlier:
        if (knockout["sources"] & other["sources"]).any() and (knockout["destinations"] & other["destinations"]).any():
            raise BadInput(f"{address}: two Knockouts remove the same source from the same destination; merge them.")


def run_of(address: str, envoy: Envoy, scan: Scan, recurrence: Any) -> ScanRun:
    """The block's current run of this scan, or a new one at the visit it asks for next."""
    seen = notes(envoy.path)
    last = seen.get(("scan", envoy.path))
    now = visit(envoy, address)
    if last is None or last[0] is not now:
        last = seen[("scan", envoy.path)] = (now, ScanRun(address, envoy, scan, recurrence))
    return last[1]
