"""Scans that a family's mixer runs as a loop of its own rather than as one operation: Zamba and MiniMax.

What the loop is given is read from the operations before it. An edit either skips the loop (its `range` is replaced by
an empty one, and what it would have left behind by the replayed result), or replaces what each of its calls returns.

Travels to remote servers by value (see `scans`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .scans import Call, Scan, cloned, discretised

if TYPE_CHECKING:
    from torch import Tensor


class Loop:
    """Where a scan's loop stands.

    Attributes:
        given: Name -> address of what the loop is given, in forward order; `Scan.read` gets them as keywords.
        output: Address of what comes out of it; with `each_head`, of the operation that it calls once a head.
        skipped: Addresses, in forward order, whose values can be replaced so that the loop does not run.
        each_head: Whether the loop goes over heads, calling one operation for each.
    """

    def __init__(
        self, given: dict[str, str], output: str, skipped: tuple[str, ...] = (), each_head: bool = False
    ) -> None:
        self.given = given
        self.output = output
        self.skipped = skipped
        self.each_head = each_head


class S6HeadsScan(Scan):
    """``mamba_selective_scan`` and ``mamba_selective_state_update``, called once a head (Zamba)."""

    recurrence = "s6"
    continues = False
    operand_names = ("x", "dt", "B", "C")
    given = {
        "x": "/hidden_states_B_C_7:output",
        "projected": "/torch_split_0:output",
        "dt": "/time_step_0:output",
        "bias": "/time_proj_bias_0:output",
        "A": "/A_0:output",
    }
    loops = (
        Loop(given, "/mamba_selective_scan_0", each_head=True),
        Loop(given, "/mamba_selective_state_update_0", each_head=True),
    )

    def loop(self, now: Any) -> Loop:
        return self.loops[1 if now.decoding else 0]

    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Call:
        module, cache, bias = kwargs["module"], kwargs["cache"], kwargs["bias"]
        bias = None if bias is None else bias[:, None, :, None]
        dt = discretised(kwargs["dt"], bias, True, None)
        _, B, C = kwargs["projected"]
        state = cache.get_recurrent_state(module.layer_idx) if decoding else None
        return Call(
            operands={
                "x": kwargs["x"].permute(1, 3, 0, 2),
                "dt": dt.permute(1, 3, 0, 2),
                "A": kwargs["A"],
                "B": B.permute(1, 2, 0, 3),
                "C": C.permute(1, 2, 0, 3),
            },
            D=module.D,
            dtype=kwargs["x"].dtype,
            initial_state=cloned(state),
            returns_state=not decoding and cache is not None,
            cache=state,
        )

    def pack_head(self, call: Call, head: int, y: Tensor, state: Tensor | None, args: tuple, kwargs: dict) -> Any:
        """What the operation would have returned for one head, gated with the gate it was given.

        Args:
            call: The scan's call, of all heads.
            head: The head.
            y: Output of all heads, `(b, t, h, p)`.
            state: Final state of all heads, where it was replayed.
            args, kwargs: What the operation was given.
        """
        own = y[:, :, head].transpose(1, 2)
        own = (own * F.silu(kwargs["z"]).reshape(own.shape)).to(call.dtype)
        if call.cache is None:
            return (own, state[:, head]) if call.returns_state and state is not None else own
        if state is not None:
            with torch.no_grad():
                call.cache[:, head].copy_(state[:, head])
        return own.squeeze(2)


class LightningScan(Scan):
    """Lightning attention (MiniMax-01, arXiv:2501.08313): SSD with dt = 1 and one fixed decay a head."""

    recurrence = "ssd"
    operand_names = ("x", "B", "C")
    given = {"C": "/query_states_0:output", "B": "/key_states_0:output", "x": "/value_states_0:output"}
    loops = (
        Loop(
            given, "/torch_cat_0:output", ("/attn_weights_inter_2:output", "/attn_output_0:output", "/range_0:output")
        ),
        Loop(
            given, "/torch_cat_0:output", ("/attn_weights_inter_1:output", "/attn_output_1:output", "/range_1:output")
        ),
    )

    def loop(self, now: Any) -> Loop:
        return self.loops[1 if now.cached else 0]

    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Call:
        module, cache, x = kwargs["module"], kwargs["cache"], kwargs["x"].transpose(1, 2)
        state = cloned(None if cache is None else cache.get_linear_cache(module.layer_idx))
        return Call(
            operands={
                "x": x,
                "dt": x.new_ones(x.shape[:3]),
                "A": -module.slope_rate[:, 0, 0],
                "B": kwargs["B"].transpose(1, 2),
                "C": kwargs["C"].transpose(1, 2),
            },
            D=None,
            dtype=x.dtype,
            initial_state=None if state is None else state.mT,
        )

    def skip(self, call: Call, y: Tensor, state: Tensor, decoding: bool) -> list[Any]:
        return [state.mT.to(call.dtype).contiguous(), [self.pack(call, y, state, decoding)], range(0)]

    def pack(self, call: Call, y: Tensor, state: Tensor | None, decoding: bool) -> Tensor:
        return y.transpose(1, 2)

    def output_y(self, output: Any, decoding: bool) -> Tensor:
        return output.transpose(1, 2)
