"""Attention patterns: read from eager attention, and changed by recomputing what the pattern weighs.

Travels to remote servers by value (see `events`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import BadInput
from .events import notes, own_rows, read_whole, seal, waiting, wanted, worker, write_back, write_whole
from .spots import edited, instrument, matching, splice, version_of

if TYPE_CHECKING:
    from nnsight.intervention.envoy import Envoy
    from torch import Tensor

OPERATION = "attention_interface_1"  # nnsight's name of the call; `attention_interface_0` is the assignment before it


class Pattern:
    """The attention weights of one layer, `(b, heads, t_query, t_key)`."""

    def __init__(self, address: str, envoy: Envoy) -> None:
        self.address = address
        self.envoy = envoy
        self.instrument: list[Envoy] = []

    def places(self) -> tuple[str, str]:
        """Locations of the attention operation's input and output."""
        worker(self.address)
        instrument(self.instrument, self.address)
        operation = f"{self.envoy.path}.source.{OPERATION}"
        return f"{operation}.input", f"{operation}.output"

    def get(self) -> Tensor:
        """Read the pattern."""
        before, after = self.places()
        occurrence, seen = wanted(after), notes(after)
        held = seen.get(self.address)
        if held is not None and held[0] is waiting(after) and held[0].occurrence == occurrence:
            return held[1]
        values = self.values(before, after, occurrence)
        weights = self.weights(read_whole(after, self.address))
        rows = own_rows(after, len(weights))
        tracked = torch.is_grad_enabled() and weights.requires_grad
        view = weights[rows].clone()
        version = version_of(view)

        def finish():
            seal(view, self.address)
            changed = edited(view, version) and not torch.equal(view, weights[rows])
            if changed or tracked:
                self.put(after, view, values, rows, keep=not changed)

        seen[self.address] = (write_back(after, occurrence, finish), view)
        return view

    def set(self, value: Tensor) -> None:
        """Replace the pattern: each head's output becomes `value` times the values it attends to."""
        before, after = self.places()
        values = self.values(before, after, wanted(after))
        weights = self.weights(read_whole(after, self.address))
        rows = own_rows(after, len(weights))
        value = matching(value, weights[rows], self.address)
        changed = not torch.equal(value, weights[rows])
        if changed or (torch.is_grad_enabled() and value.requires_grad):
            self.put(after, value, values, rows, keep=not changed)

    def values(self, before: str, after: str, occurrence: int) -> Tensor:
        """The values that the pattern weighs, `(b, kv_heads, t, p)`, kept from the operation's input."""
        seen, key = notes(before), (before, occurrence)
        if key not in seen:
            seen[key] = read_whole(before, self.address)[0][3]
        return seen[key]

    def weights(self, output: tuple) -> Tensor:
        """The weights in the operation's output."""
        if output[1] is None:
            raise BadInput(
                f"{self.address} needs eager attention, which returns its weights: call "
                'model.hf.set_attn_implementation("eager") (on a server, it has to be loaded that way).'
            )
        return output[1]

    def put(self, location: str, pattern: Tensor, values: Tensor, rows: slice, keep: bool) -> None:
        """Recompute the heads' outputs of this block's rows; `keep` leaves their values, and changes only gradients."""
        output, weights, *rest = read_whole(location)
        values = values[rows]
        values = values.repeat_interleave(pattern.shape[1] // values.shape[1], dim=1)
        mixed = (pattern.to(values.dtype) @ values).transpose(1, 2)
        if keep:
            mixed = output[rows].detach() + (mixed - mixed.detach())
        replaced = splice(output, rows, mixed.to(output.dtype)).contiguous()
        write_whole(location, (replaced, splice(weights, rows, pattern), *rest))
