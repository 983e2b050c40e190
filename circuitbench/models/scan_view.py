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

from ..errors import BadInput
from .events import at_visit, flush, notes, own_rows, passed, read_whole, seal, wanted, worker, write_back, write_whole
from .firing import Firing
from .spots import edited, matching, splice, version_of, visit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight.intervention.envoy import Envoy
    from torch import Tensor

    from ..architectures.scans import Scan
    from .spots import Visit


class ScanRun:
    """One block's dealings with one run of the scan."""

    def __init__(
        self, address: str, envoy: Envoy, scan: Scan, recurrence: Any, now: Visit, start: Tensor | None
    ) -> None:
        self.address = address
        self.scan = scan
        self.length = now.length
        loop = scan.loop(now)
        self.each_head = loop is not None and loop.each_head
        if loop is None:
            operation = located(envoy, scan.step if now.decoding else scan.sequence)
            given, self.output = {"": f"{operation}.input"}, f"{operation}.output"
        else:
            given = {name: located(envoy, at) for name, at in loop.given.items()}
            self.output = located(envoy, f"{loop.output}:output" if loop.each_head else loop.output)
        self.call = f"{self.output.removesuffix('output')}input"  # of the operation itself, where there is one
        self.skipped = [located(envoy, at) for at in loop.skipped] if loop is not None else []
        self.input = list(given.values())[-1]
        self.unpublished = False  # whether the heads' calls are still to be given what was made of y
        # Operations of a loop run in some calls of the part only, so each has a count of its own.
        places = (*given.values(), *self.skipped, self.output)
        self.occurrences = {location: wanted(location) for location in places}
        if self.gone(self.input):
            raise self.too_late("its sites were asked for")
        found = {name: self.read(location) for name, location in given.items()}
        args, kwargs = found[""] if loop is None else ((), {**found, "cache": now.cache})
        if loop is not None or scan.asks_module:
            kwargs = {**kwargs, "module": envoy._module}
        batcher = worker(self.input).interleaver.batcher
        if not hasattr(batcher, "circuitbench"):
            batcher.circuitbench = {}
        shared, key = batcher.circuitbench, (self.output, self.occurrences[self.output])
        if key not in shared:
            call = scan.read(args, kwargs, now.decoding)
            shared[key] = Firing(address, scan, recurrence, call, now.decoding)
        self.firing: Any = shared[key]
        if start is not None:
            self.firing.start_from(start)
        following = now.cached or self.firing.call.initial_state is not None
        self.decoding = following and now.length == 1
        if following and now.length > 1 and not scan.continues and not self.firing.started:
            raise BadInput(
                f"{address}: {now.length} tokens follow a cached state, and transformers starts {scan.restarts} from "
                "zero again; give it one token at a time, the whole sequence without a cache, or use "
                "circuitbench.continue_from."
            )
        self.rows = own_rows(self.input, len(self.firing.call.operands["x"]))
        self.held: dict[str, tuple[Tensor, Any]] = {}  # what the block holds, and its version when it was handed out
        self.pending: Any = None  # the write-back that will settle this run
        if start is not None:
            self.settle_later("it was given a state")

    def gone(self, location: str) -> bool:
        """Whether the model is past this run's visit of a location."""
        return passed(location, self.occurrences[location])

    def read(self, location: str) -> Any:
        """The value at a location of this run."""
        return at_visit(self.occurrences[location], read_whole, location)

    def write(self, location: str, value: Any) -> None:
        """Replace the value at a location of this run."""
        at_visit(self.occurrences[location], write_whole, location, value)

    def too_late(self, what: str) -> BadInput:
        """The error for anything asked after the model has moved on."""
        return BadInput(
            f"{self.address}: {what} after the model had moved past its scan; ask for sites in forward order "
            "(operands and state edits, then y, gate, gated, out, then later layers)."
        )

    def before(self, what: str) -> None:
        """Raise unless the model still waits at the operation's input."""
        if self.gone(self.input):
            raise self.too_late(what)

    # Operands ---------------------------------------------------------------------------------------------------------

    def current(self, name: str) -> Tensor:
        """An operand (or decay, or write) of this block's rows, as it now stands."""
        if name in self.held:
            return self.held[name][0]
        value = self.firing.gate if name == "gate" else self.firing.current(name)
        return value[self.rows]

    def take(self, name: str) -> Tensor:
        """Hand out an operand: a tensor of the block's own, whose edits are replayed."""
        if name not in self.held:
            self.check_order(name)
            self.merge()
            value = self.current(name).clone()
            self.held[name] = (value, version_of(value))
            self.settle_later(f"{name} was asked for")
        return self.held[name][0]

    def give(self, name: str, value: Tensor) -> None:
        """Replace an operand."""
        self.check_order(name)
        now = self.current(name)
        value = matching(value, now, f"{self.address}.{name}")
        if same(value, now):
            return
        self.before(f"{name} was written")
        self.held.pop(name, None)
        if torch.equal(value, now):  # the same numbers with a gradient: the model keeps its own output
            self.firing.tracked = True
        else:
            self.firing.stale = True
        self.firing.put(name, self.rows, value)
        self.settle_later(f"{name} was written")

    def check_order(self, name: str) -> None:
        """What a step writes is read before the state is edited, where it depends on the state."""
        if name == "write" and self.firing.edits and self.scan.write_follows_state:
            raise BadInput(f"{self.address}.write depends on the state; read and write it before you edit the state.")

    def merge(self) -> None:
        """Put what the block holds and has edited into the run that all blocks share."""
        if self.gone(self.input):
            return
        for name, (value, version) in list(self.held.items()):
            if name in ("y", "gate"):
                continue
            changed = edited(value, version) and not torch.equal(value, self.firing.current(name)[self.rows])
            tracked = torch.is_grad_enabled() and value.requires_grad
            if changed or tracked:
                self.firing.put(name, self.rows, value)
                self.firing.stale |= changed
                self.firing.tracked |= tracked
            self.held[name] = (value, version_of(value))

    # The state --------------------------------------------------------------------------------------------------------

    def states(self) -> Tensor:
        """All h_t of this block's rows, edits included."""
        self.merge()
        return self.firing.states()[self.rows]

    def scale(self) -> Tensor:
        """The logarithm of the units that the states are in."""
        self.merge()
        return self.firing.scale()[self.rows]

    def iter_states(self, chunk: int) -> Iterator[tuple[int, Tensor]]:
        """(first position, states of a chunk of positions), in bounded memory."""
        self.merge()
        for start, states in self.firing.iter_states(chunk):
            yield start, states[self.rows]
            del states  # not two chunks at a time

    def edit(self, edits: dict[int, Any], when: str | None) -> None:
        """Register state edits, by position."""
        when = self.firing.default if when is None else when
        if when not in ("before_read", "after_read"):
            raise BadInput(f'when= is "before_read" or "after_read", not {when!r}.')
        self.before("the state was edited")
        self.merge()
        if not isinstance(edits, dict):
            raise BadInput(
                f"{self.address}.edit_state takes {{position: tensor or function}}, not {type(edits).__name__}."
            )
        named = [position % self.length for position in edits if isinstance(position, int)]
        if len(set(named)) < len(named):
            raise BadInput(f"{self.address}.edit_state: positions {list(edits)} name one position twice.")
        for position, value in edits.items():
            if not isinstance(position, int) or not -self.length <= position < self.length:
                raise BadInput(
                    f"{self.address}.edit_state: position {position!r} is out of range; this run has positions "
                    f"0 to {self.length - 1} (negative ones count from the end)."
                )
            self.firing.edit(self.rows, position % self.length, value, when)
        self.settle_later("the state was edited")

    def mixing(self, channels: Any = None) -> Tensor:
        """The scan as a causal matrix."""
        self.merge()
        return self.firing.mixing(channels)[self.rows]

    def knock_out(self, sources: Tensor, destinations: Tensor, heads: Any = None) -> None:
        """Register a knockout of what `sources` contribute to y at `destinations`."""
        self.before("a knockout was asked for")
        if self.decoding:
            raise BadInput(
                f"{self.address}: a Knockout needs its sources in the same forward; while one token is decoded from a "
                "cached state, what came from where can no longer be told apart."
            )
        batch = len(self.firing.call.operands["x"])
        masks = []
        for mask in (sources, destinations):
            whole = mask.new_zeros(batch, self.length)
            whole[self.rows] = mask
            masks.append(whole)
        self.firing.knock_out({"sources": masks[0], "destinations": masks[1], "heads": heads})
        self.settle_later("a knockout was asked for")

    # The output -------------------------------------------------------------------------------------------------------

    def arrive(self) -> None:
        """Let the operation run, and keep what it returned."""
        firing = self.firing
        if self.each_head:
            # Every block's edits are in when the first head's call is reached.
            at_visit(self.occurrences[self.output], read_whole, self.call)
            if firing.y is None:
                firing.run_here()
            return
        if firing.y is None and firing.gated and not firing.gate_taken:
            args, kwargs = self.read(self.input)
            firing.gate_taken = True
            self.write(self.input, self.scan.gateless(args, kwargs))
        for number, location in enumerate(self.skipped):
            if firing.y is None and not self.gone(location):
                self.read(location)
                # Asked only now, as below.
                if firing.stale:
                    self.write(location, firing.skipped()[number])
        output = self.read(self.output)
        # Asked only now: another block of the batch may have been here while this one waited.
        if firing.y is None and firing.ran(output):
            self.write(self.output, firing.packed())

    def take_y(self) -> Tensor:
        """The scan's output before the gate."""
        self.be_at_output()
        if "y" not in self.held:
            value = self.firing.y[self.rows]
            tracked = torch.is_grad_enabled() and value.requires_grad
            apart = self.firing.gated and self.rows != slice(None)
            if apart or (tracked and (self.firing.gated or value._is_view())):
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
        if self.gone(self.output):
            raise self.too_late("y was asked for")
        mediator = worker(self.output)
        if mediator.transform is self.pending:
            mediator.transform = None  # settled here instead, so that the gate can be taken before the operation runs
            if self.each_head:
                self.merge()  # what is made of y goes out in one
            else:
                self.settle()
        self.arrive()

    def publish(self) -> None:
        """Give the model what was made of y."""
        if self.each_head:
            self.unpublished = True
        else:
            self.write(self.output, self.firing.packed())

    def publish_heads(self) -> None:
        """The same where one operation is called once a head: each call returns its part."""
        firing, first = self.firing, self.occurrences[self.output]
        for head in range(firing.call.operands["x"].shape[2]):
            args, kwargs = at_visit(first + head, read_whole, self.call)
            own = at_visit(first + head, read_whole, self.output)
            at_visit(first + head, write_whole, self.output, firing.packed_head(head, own, args, kwargs))

    def settle_later(self, what: str) -> None:
        """Settle when the block moves on."""
        if self.gone(self.output):
            raise self.too_late(what)
        if worker(self.output).transform is not self.pending:
            flush()
        self.pending = write_back(self.output, self.occurrences[self.output], self.settle)

    def settle(self) -> None:
        """Make what the block asked for true: replay if the recurrence was touched, publish if the output was."""
        firing = self.firing
        if not self.gone(self.input):
            self.merge()
        elif any(edited(*self.held[name]) for name in self.held if name not in ("y", "gate")):
            raise self.too_late("an operand was edited in place")
        gate_held = "gate" in self.held and (edited(*self.held["gate"]) or torch.is_grad_enabled())
        if firing.stale or firing.tracked or gate_held:
            self.arrive()
            self.unpublished = self.each_head
        dirty = False
        if gate_held:
            firing.gate = splice(firing.gate, self.rows, self.held["gate"][0])
            dirty = True
        if "y" in self.held:
            value, version = self.held["y"]
            touched = edited(value, version)
            apart = value.data_ptr() != firing.y[self.rows].data_ptr()
            if apart and (touched or (torch.is_grad_enabled() and value.requires_grad)):
                firing.y = splice(firing.y, self.rows, value)
                dirty = True
            elif (firing.gated or self.each_head) and touched:
                dirty = True
        if dirty:
            self.publish()
        if self.unpublished and not self.gone(self.output):
            self.publish_heads()
        for name, (value, _) in self.held.items():
            self.held[name] = (value, version_of(value))
            seal(value, f"{self.address}.{name}")

    def take_gate(self) -> Tensor:
        """The gate before its activation, where the operation itself applies it."""
        if "gate" not in self.held:
            value = self.current("gate").clone()
            self.held["gate"] = (value, version_of(value))
            self.settle_later("the gate was asked for")
        return self.held["gate"][0]

    def give_gate(self, value: Tensor) -> None:
        """Replace the gate."""
        now = self.current("gate")
        value = matching(value, now, f"{self.address}.gate")
        if same(value, now):
            return
        if self.gone(self.output):
            raise self.too_late("the gate was written")
        self.held.pop("gate", None)
        self.firing.gate = splice(self.firing.gate, self.rows, value)
        self.be_at_output()
        self.write(self.output, self.firing.packed())
        self.settle_later("the gate was written")


def same(value: Tensor, now: Tensor) -> bool:
    """Whether writing `value` over `now` changes nothing at all: not a bit, and no gradient."""
    return value is now or (torch.equal(value, now) and not (torch.is_grad_enabled() and value.requires_grad))


def located(envoy: Envoy, at: str) -> str:
    """nnsight's location for an address relative to a part; without a port, that of the operation or module itself."""
    target, _, port = at.partition(":")
    path, _, operation = target.partition("/")
    location = f"{envoy.path}.{path}" if path else envoy.path
    location = f"{location}.source.{operation}" if operation else location
    return f"{location}.{port}" if port else location


def run_of(
    address: str, envoy: Envoy, scan: Scan, recurrence: Any, continues: str, start: Tensor | None = None
) -> ScanRun:
    """The block's current run of this scan, or a new one at the visit it asks for next, from `start` if it is given."""
    seen = notes(envoy.path)
    last = seen.get(("scan", envoy.path))
    now = visit(envoy, address, continues)
    if last is None or last[0] is not now:
        last = seen[("scan", envoy.path)] = (now, ScanRun(address, envoy, scan, recurrence, now, start))
    return last[1]
