"""Changes to a model made without the package: torch's hooks, and a family's scan swapped for a plain loop.

A `Change` maps a site's short name (``"x"``, ``"dt"``, ``"decay"``, ``"write"``, ``"y"``, ...) to a function of its
canonical tensor, and ``"state"`` to a function of (position, h_t).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Change = dict[str, Callable[..., Any]]


@contextlib.contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor], side: str) -> Iterator[None]:
    """Change a module's first input or its (first) output."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        key = next(iter(kwargs))
        return args, {**kwargs, key: change(kwargs[key])}

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def patched(module: Any, **functions: Any) -> Iterator[None]:
    """Put functions in the place of a Python module's own."""
    saved = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(module, name, function)


@contextlib.contextmanager
def inside(hf: nn.Module, module: nn.Module, **functions: Callable[[Any], Any]) -> Iterator[None]:
    """While `module` runs, wrap functions of the family's code: name -> (function -> function). hf was never traced."""
    code = sys.modules[type(hf).__module__]
    here = {"inside": False}

    def only_inside(original: Any, wrapped: Any) -> Any:
        return lambda *args, **kwargs: (wrapped if here["inside"] else original)(*args, **kwargs)

    enter = module.register_forward_pre_hook(lambda *_: here.update(inside=True))
    leave = module.register_forward_hook(lambda *_: here.update(inside=False))
    found = {name: getattr(code, name) for name in functions if hasattr(code, name)}
    try:
        with patched(code, **{name: only_inside(f, functions[name](f)) for name, f in found.items()}):
            yield
    finally:
        enter.remove()
        leave.remove()


def scan_changed(
    hf: nn.Module, mixer: nn.Module, change: Change, when: str = "before_read"
) -> contextlib.AbstractContextManager[None]:
    """Run one mixer's scan as a plain loop over positions, with a change in it; all other mixers as they are."""
    for path, (name, run) in METHODS.items():
        if hasattr(mixer, path):
            home = mixer.get_submodule(path)
            return patched(home, **{name: functools.partial(run, change, when, home)})
    loops = {
        name: lambda _, run=run: lambda *args, **kwargs: run(change, when, *args, **kwargs)
        for name, run in LOOPS.items()
    }
    return inside(hf, mixer, **loops)


def applied(change: Change, name: str, value: Tensor) -> Tensor:
    return change[name](value) if name in change else value


def loop(
    decay: Tensor, write: Tensor, read: Callable[[int, Tensor], Tensor], state: Tensor, change: Change, when: str
) -> Any:
    """h_t = decay_t·h_{t-1} + write_t, and what is read from it."""
    outputs = []
    for t in range(write.shape[1]):
        state = decay[:, t] * state + write[:, t]
        unedited = state
        state = change["state"](t, state) if "state" in change else state
        outputs.append(read(t, unedited if when == "after_read" else state))
    return torch.stack(outputs, 1), state


def s6(
    change: Change, when: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Any, state: Any
) -> Any:
    x, B, C = applied(change, "x", x), applied(change, "B", B), applied(change, "C", C)
    dt = applied(change, "dt", dt)
    decay = applied(change, "decay", torch.exp(dt[..., None] * A))
    write = applied(change, "write", dt[..., None] * x[..., None] * B[:, :, None])
    state = torch.zeros_like(write[:, 0]) if state is None else state
    y, state = loop(decay, write, lambda t, h: (h * C[:, t, None]).sum(-1), state, change, when)
    y = applied(change, "y", y + D * x)
    return y * F.silu(applied(change, "gate", z)), state


def s6_sequence(
    change: Change, when: str, x, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=False, **_: Any
):
    dt = F.softplus(dt + delta_bias[:, None])
    x, dt, B, C, z = (value.transpose(1, 2) for value in (x, dt, B, C, z))
    y, state = s6(change, when, x, dt, A, B, C, D, z, None)
    return (y.transpose(1, 2), state) if return_last_state else y.transpose(1, 2)


def s6_step(change: Change, when: str, cached, x, dt, A, B, C, D, z, dt_bias, dt_softplus, **_: Any):
    x, dt, B, C, z = (value[:, None] for value in (x, F.softplus(dt + dt_bias), B, C, z))
    y, state = s6(change, when, x, dt, A, B, C, D, z, cached)
    cached.copy_(state)
    return y[:, 0]


def ssd(
    change: Change, when: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Any
) -> Any:
    x, B, C = applied(change, "x", x), applied(change, "B", B), applied(change, "C", C)
    dt = applied(change, "dt", dt)
    B, C = (value[:, :, [h * value.shape[2] // x.shape[2] for h in range(x.shape[2])]] for value in (B, C))
    decay = applied(change, "decay", torch.exp(dt * A))[..., None, None]
    write = applied(change, "write", (dt[..., None] * x)[..., None] * B[:, :, :, None])
    state = torch.zeros_like(write[:, 0]) if state is None else state
    y, state = loop(decay, write, lambda t, h: (h * C[:, t, :, None]).sum(-1), state, change, when)
    return applied(change, "y", y + D[:, None] * x), state


def ssd_sequence(
    change: Change, when: str, x, dt, A, B, C, chunk_size, D, dt_bias, dt_limit, initial_states=None,
    return_final_states=False, **_: Any,
):  # fmt: skip
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
    y, state = ssd(change, when, x, dt, A, B, C, D, initial_states)
    return (y, state) if return_final_states else y


def ssd_step(change: Change, when: str, cached, x, dt, A, B, C, D, z, dt_bias, dt_softplus, **_: Any):
    dt = F.softplus(dt[..., 0] + dt_bias[:, 0])
    x, dt, B, C = (value[:, None] for value in (x, dt, B, C))
    y, state = ssd(change, when, x, dt, A[:, 0, 0], B, C, D[:, 0], cached)
    cached.copy_(state)
    if z is not None:
        y = y * F.silu(applied(change, "gate", z.flatten(1)[:, None])).reshape(y.shape)
    return y[:, 0]


def gated_delta(
    change: Change, when: str, query, key, value, g, beta, initial_state=None, output_final_state=True, **_: Any
):  # fmt: skip
    query, key = (v * torch.rsqrt(v.square().sum(-1, keepdim=True) + 1e-6) for v in (query, key))
    heads = [h * key.shape[2] // value.shape[2] for h in range(value.shape[2])]
    x, B = applied(change, "x", value), applied(change, "B", key[:, :, heads])
    C = applied(change, "C", query[:, :, heads] / key.shape[-1] ** 0.5)
    beta, decay = applied(change, "beta", beta), applied(change, "decay", g.exp())
    decay = decay if decay.dim() == 4 else decay[..., None]  # of every channel of the keys, or of the head
    state = x.new_zeros(*x.shape[:1], *B.shape[2:], x.shape[-1]) if initial_state is None else initial_state.to(x)
    outputs = []
    for t in range(x.shape[1]):
        state = decay[:, t, ..., None] * state
        missing = x[:, t] - torch.einsum("bhkv,bhk->bhv", state, B[:, t])
        write = B[:, t, :, :, None] * (beta[:, t, :, None] * missing)[:, :, None]
        state = state + (change["write"](t, write) if "write" in change else write)
        unedited = state
        state = change["state"](t, state) if "state" in change else state
        outputs.append(torch.einsum("bhkv,bhk->bhv", unedited if when == "after_read" else state, C[:, t]))
    return applied(change, "y", torch.stack(outputs, 1)), state


def rg_lru(
    change: Change, when: str, module: Any, hidden_states, recurrent_gate, reset, recurrent_states, **_: Any
):  # fmt: skip
    x = applied(change, "x", hidden_states)
    decay, write = applied(change, "decay", recurrent_gate * ~reset), applied(change, "write", x)
    state = torch.zeros_like(x[:, 0]) if recurrent_states is None else recurrent_states.to(x)
    y, state = loop(decay, write, lambda t, h: h, state, change, when)
    return applied(change, "y", y), state


def wkv4(change: Change, when: str, time_decay, time_first, key, value, state=None, return_state=False):
    """y reads the state before the present position's write, whatever `when` says."""
    k, x, w = applied(change, "k", key), applied(change, "x", value), -torch.exp(time_decay)
    nothing = torch.zeros_like(k[:, 0])
    num, den, m = (nothing, nothing, nothing - 1e30) if state is None else (value.to(k) for value in state)
    scales = [m]
    for t in range(k.shape[1]):
        scales.append(torch.maximum(scales[-1] + w, k[:, t]))
    m = torch.stack(scales, 1)
    decay = applied(change, "decay", torch.exp(m[:, :-1] + w - m[:, 1:]))
    weight = torch.exp(k - m[:, 1:])
    write = applied(change, "write", torch.stack([weight * x, weight], -1))
    h, outputs = torch.stack([num, den], -1), []
    for t in range(k.shape[1]):
        bonus = torch.exp(time_first + k[:, t] - m[:, t])
        bonus = torch.where(bonus.isinf(), torch.ones_like(bonus), bonus)  # nothing came before
        outputs.append((h[..., 0] + bonus * x[:, t]) / (h[..., 1] + bonus))
        h = decay[:, t, :, None] * h + write[:, t]
        h = change["state"](t, h) if "state" in change else h
    return applied(change, "y", torch.stack(outputs, 1)), [*h.unbind(-1), m[:, -1]]


def mlstm(
    change: Change, when: str, module: Any, query, key, value, igate, fgate, c_initial=None, n_initial=None,
    m_initial=None, **_: Any,
):  # fmt: skip
    given = {"C": query / query.shape[-1] ** 0.5, "B": key, "x": value, "input_gate": igate, "forget_gate": fgate}
    C, B, x, i, f = (applied(change, name, tensor.transpose(1, 2)) for name, tensor in given.items())
    scales = [torch.zeros_like(i[:, 0]) if m_initial is None else m_initial.squeeze(-1).to(i)]
    for t in range(i.shape[1]):
        scales.append(torch.maximum(scales[-1] + F.logsigmoid(f[:, t]), i[:, t]))
    m = torch.stack(scales, 1)
    decay = applied(change, "decay", torch.exp(m[:, :-1] + F.logsigmoid(f) - m[:, 1:]))[..., None, None]
    columns = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    write = B[..., None] * (torch.exp(i - m[:, 1:])[..., None] * columns)[..., None, :]
    write = applied(change, "write", write)
    state = torch.zeros_like(write[:, 0])
    if c_initial is not None:
        state = torch.cat([c_initial, n_initial[..., None]], -1).to(x)

    def read(t: int, h: Tensor) -> Tensor:
        sums = (h * C[:, t, ..., None]).sum(-2)
        least = torch.maximum(sums[..., -1].abs(), torch.exp(-m[:, t + 1]))
        return sums[..., :-1] / (least + module.config.eps)[..., None]

    y, state = loop(decay, write, read, state, change, when)
    y = applied(change, "y", y).transpose(1, 2)
    return y, (state[..., :-1], state[..., -1], m[:, -1, :, None])


# Where a scan is a method of a submodule: the submodule, its method, the loop.
METHODS: dict[str, tuple[str, Callable[..., Any]]] = {
    "rg_lru": ("_rnn_scan", rg_lru),
    "mlstm_backend": ("forward", mlstm),
}
LOOPS: dict[str, Callable[..., Any]] = {
    "rwkv_linear_attention": wkv4,
    "mamba_selective_scan": s6_sequence,
    "mamba_selective_state_update": s6_step,
    "mamba2_chunk_scan": ssd_sequence,
    "mamba2_selective_state_update": ssd_step,
    "torch_chunk_gated_delta_rule": gated_delta,
    "torch_recurrent_gated_delta_rule": gated_delta,
    "chunk_kimi_delta_attention": gated_delta,
    "recurrent_kimi_delta_attention": gated_delta,
}
