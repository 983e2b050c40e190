"""Checks of single sites: they read, they keep their own value, an edit moves what it should and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .blocks import edits, identities, readings, same_states
from .live import Failure, relative

if TYPE_CHECKING:
    from torch import Tensor

    from .live import Live

EDITED = 3  # columns that an edit changes: the last ones
TOGETHER = 200  # sites in one run, which keeps all of them in memory
SAME = (
    "Writing back what was read has to change nothing: the layout must be undone exactly, and the location must be the "
    "tensor that the model goes on with."
)
LOST = "Nothing follows from an edit: the model goes on with another tensor (or its weights ignore this one)."
SPILT = "An edit reaches earlier tokens or another prompt: the layout mixes batch, position and channel axes."
IN_PLACE = (
    "In place and by assignment differ: for a residual stream that is added again later, set in_place=True; for a "
    "branch that reads the residual stream itself, copied=True."
)


def check_reading(live: Live) -> None:
    """Every site can be read, alone and with all others in the map's order; shapes are the map's; nothing moves."""
    found = read_all(live, live.addresses)
    if isinstance(found, Failure):
        live.addresses = in_order(live, live.addresses)
        found = read_all(live, live.addresses)
    if isinstance(found, Failure):
        live.note("model", "reads, all sites together", found, None, "Each site holds alone; please report this.")
        live.addresses = []
        return
    seen, moved = found
    sound = []
    for address in live.addresses:
        advice = misfit(live, address, *seen[address])
        if not advice and moved > live.exact:
            alone = live.moved(readings, [address])
            if isinstance(alone, Failure) or alone > live.exact:
                advice = f"Reading it moves the logits ({alone}): its location is not what it seems."
        live.note(address, "reads", not advice, None, advice)
        if not advice:
            sound.append(address)
    live.addresses = sound


def read_all(live: Live, addresses: list[str]) -> tuple[dict[str, tuple], float] | Failure:
    """Shape and finiteness of every site, read in order, and how far the logits moved."""
    seen: dict[str, tuple] = {}
    moved = 0.0
    for start in range(0, max(1, len(addresses)), TOGETHER):
        found = live.attempt(readings, addresses[max(0, start - 1) : start + TOGETHER])  # each run begins at the last
        if isinstance(found, Failure):
            return found
        seen |= found["sites"]
        moved = max(moved, live.distance(found["logits"], live.base))
    return seen, moved


def in_order(live: Live, addresses: list[str]) -> list[str]:
    """The sites that can be read one after the other; the others are noted."""
    kept: list[str] = []
    for address in addresses:
        alone = live.attempt(readings, [address])
        if isinstance(alone, Failure):
            live.note(address, "reads", alone, None, "Correct its location or its layout in the map.")
            continue
        advice = misfit(live, address, *alone["sites"][address])
        if advice:
            live.note(address, "reads", False, None, advice)
            continue
        after = live.attempt(readings, [*kept[-1:], address])
        if isinstance(after, Failure):
            advice = f"The model reaches it before {kept[-1]}: a map lists its sites in the model's order."
            live.note(address, "reads", after, None, advice)
            continue
        kept.append(address)
    return kept


def misfit(live: Live, address: str, shape: tuple[int, ...], finite: bool) -> str:
    """What is wrong with a site's tensor, or nothing."""
    wanted = expected_shape(live, address)
    if len(shape) != len(wanted) or any(w not in ("", s) for s, w in zip(shape, wanted, strict=True)):
        return f"It has shape {shape}, where the map says {wanted}: correct its layout or its location."
    return "" if finite else "It holds NaN or infinity."


def expected_shape(live: Live, address: str) -> tuple[int | str, ...]:
    """The site's shape by the map, ``""`` for sizes that the map does not know."""
    b, t = live.mask.shape
    layer, _, name = address.removeprefix("layers.").partition(".")
    shape = live.model.layers[int(layer)].shapes[name] if name else live.model._shapes[address]
    known = {"b": b, "t": t, "channels": 1, f"{live.model.meta_tokens}+t": live.columns.shape[1]}
    return tuple(int(axis) if axis.isdigit() else known.get(axis, "") for axis in shape)


def check_identities(live: Live) -> None:
    """A site that gets its own value leaves the logits as they are, to the last bit, with gradients and without."""
    for check, in_place in (("own value assigned", False), ("own value in place", True)):

        def measure(addresses: list[str], in_place: bool = in_place) -> float | Failure:
            moved = [live.moved(identities, addresses, in_place, gradients=which) for which in (False, True)]
            failures = [one for one in moved if isinstance(one, Failure)]
            return failures[0] if failures else max(one for one in moved if not isinstance(one, Failure))

        one_by_one(live, live.writable, check, live.exact, SAME, measure)


def one_by_one(
    live: Live,
    addresses: list[str],
    check: str,
    bound: float,
    advice: str,
    measure: Callable[[list[str]], float | Failure],
) -> None:
    """Measure many sites in one run, and only if that fails each one alone."""
    if len(addresses) > TOGETHER:
        one_by_one(live, addresses[TOGETHER:], check, bound, advice, measure)
        addresses = addresses[:TOGETHER]
    together = measure(addresses)
    holds = not isinstance(together, Failure) and together <= bound
    alone = [together if holds else measure([address]) for address in addresses]
    for address, measured in zip(addresses, alone, strict=True):
        live.note(address, check, measured, bound, advice)
    if not holds and all(not isinstance(measured, Failure) and measured <= bound for measured in alone):
        live.note(
            "model", f"{check}, all sites together", together, bound, "Each site holds alone; please report this."
        )


def check_edits(live: Live) -> None:
    """An edit of the second prompt's last tokens moves its logits from there on, and nothing else; however written."""
    row, start = 1, live.mask.shape[1] - EDITED
    chosen = [
        address
        for address in live.writable
        if not address.startswith("layers.") or int(address.split(".")[1]) in live.first
    ]
    here = torch.zeros_like(live.mask)
    here[row, start:] = True
    elsewhere = live.mask & ~here
    replays: dict[str, Tensor] = {}

    def change(address: str, logits: Tensor, where: Tensor) -> float:
        """How far an edit moved some logits; what replaying its scan moves by itself is not its doing."""
        moved = relative(logits[where], live.base[where])
        if live.kind(address) != "scan":
            return moved
        _, layer, part, _ = address.split(".")
        if f"{layer}.{part}" not in replays:
            replay = live.attempt(same_states, [(int(layer), part)], 0)
            replays[f"{layer}.{part}"] = live.base if isinstance(replay, Failure) else replay["logits"]
        return min(moved, relative(logits[where], replays[f"{layer}.{part}"][where]))

    for address in chosen:
        found = live.attempt(edits, [address], row, EDITED, False)
        if isinstance(found, Failure):
            inside = outside = found
        else:
            inside, outside = (change(address, found["logits"], where) for where in (here, elsewhere))
        live.note_movement(address, "an edit moves the logits", inside, LOST)
        live.note(address, "an edit stays in its prompt and later", outside, live.tolerance, SPILT)

    def difference(addresses: list[str]) -> float | Failure:
        """How far the logits after edits in place are from those after edits by assignment."""
        assigned = live.attempt(edits, addresses, row, EDITED, False)
        in_place = live.attempt(edits, addresses, row, EDITED, True)
        if isinstance(assigned, Failure):
            return assigned
        return in_place if isinstance(in_place, Failure) else live.distance(in_place["logits"], assigned["logits"])

    one_by_one(live, chosen, "in place equals assigned", live.tolerance, IN_PLACE, difference)
