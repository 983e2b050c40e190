"""A site bound to one module of one model: how a view reads it and writes it.

Travels to remote servers by value (see `events`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange

from ..errors import BadInput, ReadOnlySite
from .events import (
    before,
    follows,
    forget,
    hand_out,
    instrumented,
    notes,
    own_rows,
    passed,
    read_whole,
    seal,
    waiting,
    wanted,
    worker,
    write_back,
    write_whole,
)

if TYPE_CHECKING:
    from nnsight.intervention.envoy import Envoy
    from torch import Tensor


class Visit:
    """One call of a part's forward: which one, how long, and whether it goes on from a cached state."""

    def __init__(self, occurrence: int, batch: int, length: int, cached: bool, cache: Any) -> None:
        self.occurrence = occurrence
        self.batch = batch
        self.length = length
        self.cached = cached
        self.cache = cache
        self.decoding = cached and length == 1  # one token from a cached state is another operation


def visit(part: Envoy, address: str, continues: str = "") -> Visit:
    """The call of `part` that the block is at or asks for next; parks at the part's input the first time.

    Args:
        part: The part.
        address: What is asked for, for errors.
        continues: How to tell that it goes on from a cached state (`Part.cache`).
    """
    location = f"{part.path}.input"
    seen = notes(location)
    last, want = seen.get(location), wanted(location)
    if last is not None:
        # A request that no step pins goes to the visit the model is inside of, until that visit's output has been made.
        following = follows(location) and not passed(f"{part.path}.output", last.occurrence)
        if following or want == last.occurrence:
            return last
    if passed(location, want):
        raise BadInput(
            f"{address}: the model had moved past the beginning of its block when it was asked for; ask for sites in "
            "forward order (operands and state edits, then y, gate, gated, out, then later layers)."
        )
    args, kwargs = read_whole(location)
    hidden = args[0] if args else kwargs["hidden_states"]
    cache = kwargs.get("cache_params", kwargs.get("past_key_values"))
    cached = False
    if hidden.dim() == 3 and continues and cache is not None:
        cached = getattr(cache, continues)(part._module.layer_idx) is not None
    elif continues in kwargs:
        cached = bool(kwargs[continues])
    batch, length = (hidden.shape[0], hidden.shape[1]) if hidden.dim() == 3 else (0, 0)
    seen[location] = Visit(want, batch, length, cached, cache)
    return seen[location]


def instrument(envoys: list[Envoy], address: str) -> None:
    """Let nnsight instrument these modules' forwards, so that operations inside them can be parked at for `address`."""
    for envoy in envoys:
        if not instrumented(envoy):
            before(f"{envoy.path}.input", address)
        envoy.source  # noqa: B018


def edited(tensor: Tensor, version: Any) -> bool:
    """Whether a tensor was changed in place since `version` was taken."""
    return not torch.equal(tensor, version) if tensor.is_inference() else tensor._version != version


def version_of(tensor: Tensor) -> Any:
    """The tensor's in-place version; inference tensors keep no count, so a copy stands in for it."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def splice(whole: Tensor, rows: slice, part: Tensor) -> Tensor:
    """`whole` with `rows` replaced, out of place (autograd keeps both histories)."""
    if rows == slice(None):
        return part
    return torch.cat([whole[: rows.start], part, whole[rows.stop :]])


def matching(value: Any, like: Tensor, address: str) -> Tensor:
    """`value`, if it can stand where `like` stands; else one sentence that says what can."""
    if not isinstance(value, torch.Tensor):
        raise BadInput(f"{address} takes a tensor of shape {tuple(like.shape)}, not a {type(value).__name__}.")
    if value.shape != like.shape:
        raise BadInput(f"{address} has shape {tuple(like.shape)} here, but was given {tuple(value.shape)}.")
    if value.dtype != like.dtype:
        raise BadInput(
            f"{address} is {like.dtype} here, but was given {value.dtype}; write value.to({like.dtype}) to convert it."
        )
    return value.to(like.device)


def shares_memory(view: Tensor, raw: Tensor) -> bool:
    """Whether an in-place edit of `view` is an edit of `raw`."""
    return view.untyped_storage().data_ptr() == raw.untyped_storage().data_ptr()


class Spot:
    """One site of one layer.

    Attributes:
        address: ``layers.3.ssm.gated``.
        envoy: The module the location belongs to.
        part: The part's module (for its length and its phase), or ``None`` where that is never needed.
        locations: nnsight location of the tensor for a whole sequence, and while decoding.
        raw, canonical: einops patterns.
        continues: How to tell that the part goes on from a cached state (`Part.cache`).
        opens: Whether the site comes before the part's scan, or another site that depends on the visit: which visit it
            is has to be known from here on.
        instrument: Modules whose operations must be instrumented before this site is asked for.
        sizes: Axis sizes that the patterns need.
    """

    def __init__(
        self,
        address: str,
        envoy: Envoy,
        part: Any,
        locations: tuple[str, str],
        element: Any,
        raw: str,
        canonical: str,
        sizes: dict[str, int],
        index: int | None,
        scale: float | None,
        divided: float | None,
        trim: bool,
        in_place: bool,
        copied: bool,
        made_from: str,
        writable: bool,
    ) -> None:
        self.address = address
        self.envoy = envoy
        self.part = part
        self.locations = locations
        self.element = element
        self.raw = raw
        self.canonical = canonical
        self.sizes = sizes
        self.index = index
        self.scale = scale
        self.divided = divided
        self.trim = trim
        self.in_place = in_place
        self.copied = copied
        self.made_from = made_from
        self.writable = writable
        self.instrument: list[Envoy] = []
        self.opens = False
        self.continues = ""

    # Where ------------------------------------------------------------------------------------------------------------

    @property
    def timed(self) -> bool:
        """Whether its place or its layout depends on the visit: how long it is, and whether it decodes one token."""
        return self.trim or self.locations[0] != self.locations[1] or "(b t" in self.raw

    def here(self) -> tuple[str, Visit | None]:
        """The location to park at for this visit, and the visit where the layout depends on it."""
        worker(self.address)
        sequence, step = self.locations
        instrument(self.instrument, self.address)
        if not (self.timed or self.opens):
            return sequence, None
        now = visit(self.part, self.address, self.continues)
        return (step if now.decoding else sequence), now

    def select(self, value: Any) -> Tensor:
        """The site's tensor in the value at its location."""
        if self.element == "input":
            args, kwargs = value
            return args[0] if args else next(iter(kwargs.values()))
        if isinstance(self.element, int) and self.locations[0].endswith(".input"):
            args, kwargs = value
            return args[self.element] if self.element < len(args) else list(kwargs.values())[self.element - len(args)]
        if isinstance(self.element, str):
            return getattr(value, self.element)
        if isinstance(value, (tuple, list)):
            return value[self.element or 0]
        return value

    def replaced(self, value: Any, new: Tensor) -> Any:
        """The value at the location with the site's tensor replaced."""
        if self.locations[0].endswith(".input"):
            args, kwargs = value
            position = 0 if self.element == "input" else self.element
            if position < len(args):
                return (*args[:position], new, *args[position + 1 :]), kwargs
            key = list(kwargs)[position - len(args)]
            return args, {**kwargs, key: new}
        if isinstance(self.element, str):
            value[self.element] = new
            return value
        if isinstance(value, (tuple, list)):
            position = self.element or 0
            return type(value)((*value[:position], new, *value[position + 1 :]))
        return new

    # Layout -----------------------------------------------------------------------------------------------------------

    def known(self, now: Visit | None) -> dict[str, int]:
        """Axis sizes for einops, the length of this visit among them where tokens are flattened."""
        return {**self.sizes, "t": now.length} if now is not None and "(b t" in self.raw else self.sizes

    def factor(self) -> float | None:
        """What the tensor is multiplied by to be the site."""
        return self.scale if self.divided is None or self.envoy._module.training else self.divided

    def to_canonical(self, raw: Tensor, now: Visit | None) -> Tensor:
        """The whole batch in the canonical layout: a view of `raw` wherever that is possible."""
        if self.raw != self.canonical:
            raw = rearrange(raw, f"{self.raw} -> {self.canonical}", **self.known(now))
        if self.index is not None:
            raw = raw[self.index]
        if self.trim and now is not None:
            raw = raw[:, -now.length :]
        factor = self.factor()
        return raw if factor is None else raw * factor

    def to_raw(self, value: Tensor, raw: Tensor, now: Visit | None) -> Tensor:
        """`raw` with the canonical `value` (whole batch) put where it came from."""
        factor = self.factor()
        if factor is not None:
            value = value / factor
        whole = raw
        if self.raw != self.canonical:
            whole = rearrange(raw, f"{self.raw} -> {self.canonical}", **self.known(now))
        target = whole if self.index is None else whole[self.index]
        if self.trim and now is not None and target.shape[1] > now.length:
            value = torch.cat([target[:, : -now.length], value], dim=1)
        if self.index is not None:
            slices = list(whole.unbind(0))
            slices[self.index] = value
            value = torch.stack(slices)
        if self.raw == self.canonical:
            return value
        return rearrange(value, f"{self.canonical} -> {self.raw}", **self.known(now))

    # Reading and writing ----------------------------------------------------------------------------------------------

    def get(self) -> Tensor:
        """Read the site: a tensor that may be saved, differentiated, or edited in place."""
        location, now = self.here()
        seen, occurrence = notes(location), wanted(location)
        held = seen.get(self.address)
        if held is not None and held[0] is waiting(location) and held[0].occurrence == occurrence:
            return held[1]  # read twice before moving on: one tensor
        raw = self.select(read_whole(location, self.address))
        whole = self.to_canonical(raw, now)
        rows = own_rows(location, len(whole))
        view = whole[rows] if rows != slice(None) else whole
        grad = torch.is_grad_enabled() and raw.requires_grad
        if self.in_place or self.copied or self.made_from or (grad and view._is_view()):
            # Autograd refuses in-place edits of some views, and gradients need it in the graph; and what is written by
            # copying must not be what the user has saved.
            view = view.clone()
        if view is raw or (not grad and shares_memory(view, raw)):
            return hand_out(view, self.address)
        version = version_of(view)

        def finish():
            seal(view, self.address)
            changed = edited(view, version)
            if not (changed or grad):
                return
            value = read_whole(location, self.address)
            raw = self.select(value)
            whole = self.to_canonical(raw, now)
            changed = changed and not torch.equal(view, whole[rows])
            if not (changed or grad):
                return  # as in `set`: scaling and scaling back would lose a bit
            if changed:
                self.check_lasting(raw, now)
            new = self.to_raw(splice(whole, rows, view), raw, now)
            if not changed and self.factor() is not None:
                new = raw.detach() + (new - new.detach())  # dividing and multiplying again would lose a bit
            self.put(location, value, raw, new)

        seen[self.address] = (write_back(location, occurrence, finish), view)
        return view

    def set(self, value: Tensor) -> None:
        """Write the site: the model goes on with `value` for the rows of this block."""
        if not self.writable:
            raise ReadOnlySite(f"{self.address} can be read but not written.")
        location, now = self.here()
        held = read_whole(location, self.address)
        raw = self.select(held)
        whole = self.to_canonical(raw, now)
        rows = own_rows(location, len(whole))
        value = matching(value, whole[rows], self.address)
        if value is whole or (
            torch.equal(value, whole[rows]) and not (torch.is_grad_enabled() and value.requires_grad)
        ):
            return  # writing back what is there changes nothing, to the last bit
        self.check_lasting(raw, now)
        new = self.to_raw(splice(whole, rows, value), raw, now)
        if self.factor() is not None and torch.equal(value, whole[rows]):
            new = raw.detach() + (new - new.detach())  # only a gradient is new; dividing again would lose a bit
        self.put(location, held, raw, new)

    def check_lasting(self, raw: Tensor, now: Visit | None) -> None:
        """Refuse to write what the next call would make anew, from what it has cached."""
        if (
            self.made_from
            and now is not None
            and rearrange(raw, f"{self.raw} -> {self.canonical}").shape[1] > now.length
        ):
            raise BadInput(
                f"{self.address} cannot be written where the model goes on from a cache: it is made from "
                f"{self.made_from} at every step, for all positions, and the next step would forget the edit; write "
                f"{self.made_from}, or run the whole sequence at once."
            )

    def put(self, location: str, value: Any, raw: Tensor, new: Tensor) -> None:
        """Hand the new tensor to the model."""
        if self.in_place:
            forget(raw)
            raw.copy_(new)
            return
        new = new.to(raw.dtype)
        if new.stride() != raw.stride() and 0 not in raw.stride():
            # How the model rounds what it computes next depends on the layout in memory.
            new = torch.empty_strided(raw.shape, raw.stride(), dtype=raw.dtype, device=raw.device).copy_(new)
        write_whole(location, self.replaced(value, new))
