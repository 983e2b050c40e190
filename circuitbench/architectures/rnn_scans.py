"""How RecurrentGemma, RWKV-4 and xLSTM call their recurrences. One operation each, for a sequence and for a step.

RWKV-4 and xLSTM hold the state in units of a running maximum (see `recurrences.wkv4`, `recurrences.mlstm`), which their
caches keep beside it; `Scan.kept` gives it back with them.

Travels to remote servers by value (see `scans`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .scans import Call, Scan, bind, cloned

if TYPE_CHECKING:
    from torch import Tensor

NOTHING = -1e30  # the scale of a state that holds nothing yet, in RWKV-4


def started(state: Tensor) -> Tensor | None:
    """A copy of a state that a cache held, or ``None`` if it is the empty one that a cache begins with."""
    return cloned(state) if state.any() else None


class RGLRUScan(Scan):
    """``_rnn_scan`` (RecurrentGemma): the recurrence on inputs that are gated and normalised already.

    The state is kept on the module. Several tokens that follow it go on from it, but not so in the convolution before.
    """

    recurrence = "rg_lru"
    sequence = step = "rg_lru/self__rnn_scan_0"
    continues = False
    restarts = "the convolution before this scan"
    operand_names = ("x",)

    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Call:
        given = bind(("hidden_states", "recurrent_gate", "reset", "recurrent_states"), args, kwargs)
        x, reset, state = given["hidden_states"], given["reset"], given.get("recurrent_states")
        begins = bool(reset[:, 0].all())  # what an earlier run has left on the module is then forgotten
        return Call(
            operands={"x": x, "a": given["recurrent_gate"] * ~reset},
            D=None,
            dtype=x.dtype,
            initial_state=None if begins or state is None else started(state),
            returns_state=True,
        )

    def pack(self, call: Call, y: Tensor, state: Any, decoding: bool) -> tuple[Tensor, Tensor]:
        return y, state

    def output_y(self, output: Any, decoding: bool) -> Tensor:
        return output[0]


class WKV4Scan(Scan):
    """``rwkv_linear_attention`` (RWKV-4): x are the values, k the keys, the state numerator and denominator."""

    recurrence = "wkv4"
    sequence = step = "/rwkv_linear_attention_0"
    reads_before_write = True
    weighs = True
    operand_names = ("k", "x")

    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Call:
        given = bind(("time_decay", "time_first", "key", "value", "state", "return_state"), args, kwargs)
        key, state = given["key"], given.get("state")
        initial, scale = None, key.new_full(key[:, 0].shape, NOTHING, dtype=torch.float32)
        if state is not None:
            initial, scale = started(torch.stack(tuple(state[:2]), -1)), state[2].detach().clone()
        return Call(
            operands={
                "x": given["value"],
                "k": key,
                "w": -torch.exp(given["time_decay"]),
                "u": given["time_first"],
                "initial_scale": scale,
            },
            D=None,
            dtype=key.dtype,
            initial_state=initial,
            returns_state=state is not None or bool(given.get("return_state", False)),
        )

    def pack(self, call: Call, y: Tensor, state: Any, decoding: bool) -> tuple[Tensor, Any]:
        return y, state

    def kept(self, own: Any, state: Tensor, scale: Any) -> list[Tensor]:
        return [value.to(was.dtype) for value, was in zip((*state.unbind(-1), scale), own, strict=True)]

    def output_y(self, output: Any, decoding: bool) -> Tensor:
        return output[0]


class MLSTMScan(Scan):
    """xLSTM's backend module: x are the values, B the keys, C the queries, gates before exp and sigmoid."""

    recurrence = "mlstm"
    sequence = step = "mlstm_backend"
    asks_module = True  # for eps
    weighs = True
    operand_names = ("x", "B", "C", "input_gate", "forget_gate")

    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Call:
        names = ("query", "key", "value", "igate", "fgate", "c_initial", "n_initial", "m_initial")
        short = dict(zip(("q", "k", "v", "i", "f"), names, strict=False))  # of the package xlstm, where it is installed
        given = bind(names, args, {short.get(name, name): value for name, value in kwargs.items()})
        query, key, value, igate, fgate = (given[name].transpose(1, 2) for name in names[:5])
        memory, normaliser, scale = (given.get(name) for name in names[5:])
        initial = None
        if memory is None or normaliser is None or scale is None:
            scale = igate.new_zeros(igate[:, 0].shape, dtype=torch.float32)
        else:
            initial, scale = started(torch.cat([memory, normaliser[..., None]], -1)), scale.detach().squeeze(-1).clone()
        return Call(
            operands={
                "x": value,
                "B": key,
                "C": query * query.shape[-1] ** -0.5,
                "input_gate": igate,
                "forget_gate": fgate,
                "initial_scale": scale,
                "eps": torch.tensor(given["module"].mlstm_backend.config.eps, device=query.device),
            },
            D=None,
            dtype=query.dtype,
            initial_state=initial,
            returns_state=True,
        )

    def pack(self, call: Call, y: Tensor, state: Any, decoding: bool) -> tuple[Tensor, Any]:
        return y.transpose(1, 2), state

    def kept(self, own: Any, state: Tensor, scale: Any) -> tuple[Tensor, ...]:
        parts = (state[..., :-1], state[..., -1], scale[..., None])
        return tuple(value.to(was.dtype) for value, was in zip(parts, own, strict=True))

    def output_y(self, output: Any, decoding: bool) -> Tensor:
        return output[0].transpose(1, 2)
