"""How Hugging Face calls a scan: from a kernel's arguments to a recurrence's operands, and back.

One `Scan` per recurrence. In transformers 5.22+, ten families call the same few functions, on CPU (torch) and with CUDA
kernels alike, so an adapter per function is all it takes. Each has the same two faces: ``read`` turns (args, kwargs)
into canonical operands, ``pack`` turns a canonical (y, final_state) into what the function would have returned.

These classes travel to remote servers by value: only torch, and no names of ours at module level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .loops import Loop


class Call:
    """One call of a scan, in canonical form.

    Attributes:
        operands: Keyword arguments of the recurrence's verbs (without D, state or edits).
        D: Skip weights, or ``None``.
        initial_state: The state before the first position, or ``None`` for zeros.
        gate: The gate, canonical ``(b, t, d_inner)``, if the function applies it itself; else ``None``.
        returns_state: Whether the function returns ``(y, final_state)`` rather than ``y``.
        cache: The cached state tensor that the function updates in place, if it does.
        dtype: What y has to be cast to.
    """

    def __init__(
        self,
        operands: dict[str, Tensor],
        D: Tensor | None,
        dtype: torch.dtype,
        initial_state: Tensor | None = None,
        gate: Tensor | None = None,
        returns_state: bool = False,
        cache: Tensor | None = None,
    ) -> None:
        self.operands = operands
        self.D = D
        self.dtype = dtype
        self.initial_state = initial_state
        self.gate = gate
        self.returns_state = returns_state
        self.cache = cache


def bind(names: tuple[str, ...], args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments by name, however the caller passed them."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def discretised(dt: Tensor, bias: Tensor | None, softplus: bool, limit: Sequence[float] | None) -> Tensor:
    """dt as the recurrence uses it. The same operations, in the same dtype, as Hugging Face's."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt)
    return dt if limit is None else torch.clamp(dt, min=limit[0], max=limit[1])


def cloned(state: Tensor | None) -> Tensor | None:
    """A copy of a cached state: the function is about to overwrite the original."""
    return None if state is None else state.detach().clone()


class Scan:
    """A family's scan: which operations run it, and which recurrence it is.

    Addresses are written as in a map, relative to the part: ``/operation``, ``module/operation``, or ``module`` for a
    submodule that is the scan.

    Attributes:
        recurrence: Key into ``circuitbench.recurrences.RECURRENCES``.
        sequence: Address of what runs a whole sequence.
        step: Address of what runs one token from a cached state (the same, where one operation does both).
        continues: Whether a sequence of several tokens goes on from a cached state.
        restarts: What starts from zero again, where it does not.
        asks_module: Whether `read` gets the part's module too, as a keyword (loops always do, and the cache).
        reads_before_write: Whether y_t reads the state before position t's write, so that no edit of h_t changes y_t.
        weighs: Whether y is divided by what comes out of the state, so that its matrix depends on the initial one.
        write_follows_state: Whether what a step adds depends on the state before it.
        loops: Where the scan is a loop in the part's own forward rather than one operation: what is before and after
            it, in each of the loops there are (see `loops`).
    """

    recurrence = ""
    sequence = ""
    step = ""
    continues = True
    restarts = "this scan"
    asks_module = False
    reads_before_write = False
    weighs = False
    write_follows_state = False
    operand_names: tuple[str, ...] = ()
    loops: tuple[Loop, ...] = ()

    def loop(self, now: Any) -> Loop | None:
        """The loop that runs in this call of the part: `now.cached` says whether it goes on from a cached state,
        `now.decoding` whether with one token."""
        return None

    def pack_head(self, call: Call, head: int, y: Tensor, state: Tensor | None, args: tuple, kwargs: dict) -> Any:
        """What the operation that a loop calls for one head would have returned, from the result of all heads."""
        raise TypeError("A Scan whose loop goes over heads says what one of them returns")

    def skip(self, call: Call, y: Tensor, state: Tensor, decoding: bool) -> list[Any]:
        """What to put at the loop's `skipped` locations, so that it does not run and leaves this result.

        Args:
            call: The scan's call.
            y: Its output.
            state: Its final state.
            decoding: Whether one token is decoded.
        """
        raise TypeError("A Scan that is a loop says how to skip it")

    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Call:
        """The call in canonical form."""
        raise TypeError("Scan is abstract")

    def pack(self, call: Call, y: Tensor, state: Tensor | None, decoding: bool) -> Any:
        """A canonical result in the form the function returns it."""
        raise TypeError("Scan is abstract")

    def kept(self, own: Any, state: Tensor, scale: Tensor | None) -> Any:
        """A canonical final state in the form of `own`, the one that the function returned.

        Args:
            own: What it returned.
            state: What to put in its place.
            scale: The logarithm of the units it is in, where the recurrence has such.
        """
        return state.to(own.dtype)

    def output_y(self, output: Any, decoding: bool) -> Tensor:
        """The canonical y in what the function returned, as a view of it."""
        raise TypeError("Scan is abstract")

    def gateless(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The same arguments without the gate, so that the function returns y before it."""
        return args, {**kwargs, "z": None}


class S6Scan(Scan):
    """``mamba_selective_scan`` and ``mamba_selective_state_update`` (Mamba, Falcon-Mamba, Jamba): channels first."""

    recurrence = "s6"
    sequence = "/mamba_selective_scan_0"
    step = "/mamba_selective_state_update_0"
    continues = False
    operand_names = ("x", "dt", "B", "C")

    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Call:
        if decoding:
            given = bind(("state", "x", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus", "z"), args, kwargs)
            given = {"x": given.pop("hidden_states", given.get("x")), **given}
            dt = discretised(given["dt"], given.get("dt_bias"), given.get("dt_softplus", False), None)
            gate = given.get("z")
            return Call(
                operands={
                    "x": given["x"].unsqueeze(1),
                    "dt": dt.unsqueeze(1),
                    "A": given["A"],
                    "B": given["B"].unsqueeze(1),
                    "C": given["C"].unsqueeze(1),
                },
                D=given.get("D"),
                dtype=given["x"].dtype,
                initial_state=cloned(given["state"]),
                gate=None if gate is None else gate.unsqueeze(1),
                cache=given["state"],
            )
        given = bind(("x", "dt", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"), args, kwargs)
        bias = given.get("delta_bias")
        bias = None if bias is None else bias[..., None]
        dt = discretised(given["dt"], bias, given.get("delta_softplus", False), None)
        gate = given.get("z")
        return Call(
            operands={
                "x": given["x"].transpose(1, 2),
                "dt": dt.transpose(1, 2),
                "A": given["A"],
                "B": given["B"].transpose(1, 2),
                "C": given["C"].transpose(1, 2),
            },
            D=given.get("D"),
            dtype=given["x"].dtype,
            initial_state=cloned(given.get("initial_state")),
            gate=None if gate is None else gate.transpose(1, 2),
            returns_state=bool(given.get("return_last_state", False)),
        )

    def pack(self, call: Call, y: Tensor, state: Tensor | None, decoding: bool) -> Any:
        if decoding:
            return y.squeeze(1)
        y = y.transpose(1, 2)
        return (y, state) if call.returns_state else y

    def output_y(self, output: Any, decoding: bool) -> Tensor:
        if decoding:
            return output.unsqueeze(1)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)


class ContinuedS6Scan(S6Scan):
    """``continued_selective_scan`` of our Hymba: as S6's, and several tokens go on from a cached state."""

    sequence = "/continued_selective_scan_0"
    continues = True


class SSDScan(Scan):
    """``mamba2_chunk_scan`` and ``mamba2_selective_state_update`` (Mamba-2 and every hybrid built on it)."""

    recurrence = "ssd"
    sequence = "/mamba2_chunk_scan_0"
    step = "/mamba2_selective_state_update_0"
    operand_names = ("x", "dt", "B", "C")

    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Call:
        if decoding:
            given = bind(("state", "x", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus", "z"), args, kwargs)
            # One number a head, expanded by the caller to (b, h, p), (h, p, n) and (h, p).
            bias = given.get("dt_bias")
            dt = discretised(
                given["dt"][..., 0], None if bias is None else bias[:, 0], given.get("dt_softplus", False), None
            )
            gate = given.get("z")
            return Call(
                operands={
                    "x": given["x"].unsqueeze(1),
                    "dt": dt.unsqueeze(1),
                    "A": given["A"][:, 0, 0],
                    "B": given["B"].unsqueeze(1),
                    "C": given["C"].unsqueeze(1),
                },
                D=None if given.get("D") is None else given["D"][:, 0],
                dtype=given["x"].dtype,
                initial_state=cloned(given["state"]),
                gate=None if gate is None else gate.flatten(1).unsqueeze(1),
                cache=given["state"],
            )
        given = bind(("x", "dt", "A", "B", "C", "chunk_size", "D"), args, kwargs)
        dt = discretised(given["dt"], given.get("dt_bias"), given.get("dt_softplus", False), given.get("dt_limit"))
        return Call(
            operands={key: given[key] for key in ("x", "A", "B", "C")} | {"dt": dt},
            D=given.get("D"),
            dtype=given["x"].dtype,
            initial_state=cloned(given.get("initial_states")),
            returns_state=bool(given.get("return_final_states", False)),
        )

    def pack(self, call: Call, y: Tensor, state: Tensor | None, decoding: bool) -> Any:
        if decoding:
            return y.squeeze(1)
        return (y, state) if call.returns_state else y

    def output_y(self, output: Any, decoding: bool) -> Tensor:
        if decoding:
            return output.unsqueeze(1)
        return output[0] if isinstance(output, tuple) else output


class GatedDeltaScan(Scan):
    """``torch_chunk_gated_delta_rule`` and ``torch_recurrent_gated_delta_rule`` (Qwen3-Next and -3.5, OLMo Hybrid)."""

    recurrence = "gated_delta"
    sequence = "/torch_chunk_gated_delta_rule_0"
    step = "/torch_recurrent_gated_delta_rule_0"
    write_follows_state = True
    operand_names = ("x", "B", "C", "g", "beta")

    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Call:
        given = bind(("query", "key", "value", "g", "beta"), args, kwargs)
        query, key, value = given["query"].float(), given["key"].float(), given["value"]
        if given.get("use_qk_l2norm_in_kernel", False):
            query = query * torch.rsqrt((query * query).sum(-1, keepdim=True) + 1e-6)
            key = key * torch.rsqrt((key * key).sum(-1, keepdim=True) + 1e-6)
        repeats = value.shape[2] // key.shape[2]
        query = query.repeat_interleave(repeats, dim=2) * query.shape[-1] ** -0.5
        return Call(
            operands={
                "x": value,
                "B": key.repeat_interleave(repeats, dim=2),
                "C": query,
                "g": given["g"],
                "beta": given["beta"],
            },
            D=None,
            dtype=given["query"].dtype,
            initial_state=cloned(given.get("initial_state")),
            returns_state=True,
        )

    def pack(self, call: Call, y: Tensor, state: Tensor | None, decoding: bool) -> Any:
        return y, state

    def output_y(self, output: Any, decoding: bool) -> Tensor:
        return output[0]


class KDAScan(GatedDeltaScan):
    """``chunk_kimi_delta_attention`` and ``recurrent_kimi_delta_attention`` (Kimi Linear), called alike."""

    recurrence = "kda"
    sequence = "/chunk_kimi_delta_attention_0"
    step = "/recurrent_kimi_delta_attention_0"


class RWKV7Scan(Scan):
    """``rwkv7_scan`` of our RWKV-7, for a sequence and for one token; the recurrence calls its v x."""

    recurrence = "rwkv7"
    sequence = "/rwkv7_scan_0"
    step = "/rwkv7_scan_0"
    write_follows_state = True
    operand_names = ("x", "r", "w", "k", "a", "b")

    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Call:
        given = bind(("r", "w", "k", "v", "a", "b", "initial_state", "output_final_state"), args, kwargs)
        return Call(
            operands={"x": given["v"], **{name: given[name] for name in ("r", "w", "k", "a", "b")}},
            D=None,
            dtype=given["v"].dtype,
            initial_state=cloned(given.get("initial_state")),
            returns_state=bool(given.get("output_final_state", False)),
        )

    def pack(self, call: Call, y: Tensor, state: Tensor | None, decoding: bool) -> Any:
        return y, state if call.returns_state else None

    def output_y(self, output: Any, decoding: bool) -> Tensor:
        return output[0]
