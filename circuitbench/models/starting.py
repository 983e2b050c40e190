"""A run that starts from a state: what is done to it, from the inside, so that it goes on as the whole prompt would.

An edit of nnsight (see `prefix.started`) comes before every other block of the run. It gives the model's forward a
cache that holds the state, and puts right what transformers leaves out where a run goes on from a cache: S6 scans and
RecurrentGemma's convolution that start again from zero, and limits of dt that single steps do not apply.

Travels to remote servers by value (see `events`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .caches import blocks_of
from .events import every_forward, read_whole, worker, write_whole
from .spots import instrument, visit

if TYPE_CHECKING:
    from torch import Tensor

    from .caches import CacheKind
    from .model import Model


class Start:
    """What a run starts from.

    Attributes:
        kind: How the model keeps its past.
        tensors: The state, by name; ``None``: the beginning of a prompt.
        mask: Which of the columns that have gone through the model held tokens, `(b, columns)`.
        length: Tokens that follow now.
        positions: Whether positions are an argument of the model.
        masked: Whether the model attends to what it keeps, so that it has to know which of it is padding.
        restarted: (layer, part) of scans that start from zero where several tokens follow a cached state.
        limited: (layer, part, low, high) of scans whose dt has limits that single steps do not apply.
    """

    def __init__(
        self,
        kind: CacheKind,
        tensors: dict[str, Tensor] | None,
        mask: Tensor,
        length: int,
        positions: bool,
        masked: bool,
        restarted: list[tuple[int, str]],
        limited: list[tuple[int, str, float, float]],
    ) -> None:
        self.kind = kind
        self.tensors = tensors
        self.mask = mask
        self.length = length
        self.positions = positions
        self.masked = masked
        self.restarted = restarted
        self.limited = limited


def shared(model: Model) -> dict:
    """What the blocks of one run share."""
    batcher = worker(model.nn.path).interleaver.batcher
    if not hasattr(batcher, "circuitbench"):
        batcher.circuitbench = {}
    return batcher.circuitbench


def start_run(model: Model, start: Start) -> None:
    """The body of the edit: every forward of a run that starts from a state (or from the beginning)."""
    for step in every_forward():
        location = f"{model.nn.path}.input"
        args, kwargs = read_whole(location)
        if step == 0:
            kwargs = {**kwargs, **({"input_ids": args[0]} if args else {}), "use_cache": True}
            fresh = begun(model, start, kwargs) if start.tensors is None else resumed(model, start, kwargs)
            write_whole(location, ((), fresh))
        length = start.length if step == 0 else 1
        if step == 0 and start.tensors is not None and length > 1:
            go_on(model, start)
        elif (step > 0 or start.tensors is not None) and start.limited:
            limit(model, start)
        if not start.limited:
            return


def begun(model: Model, start: Start, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward that runs a prompt from its beginning."""
    kind, hf = start.kind, model.nn._module
    cache = kind.prepared(hf, kwargs["input_ids"])
    if cache is None:
        return kwargs
    shared(model)["cache"] = cache
    return {**kwargs, kind.argument: cache}


def resumed(model: Model, start: Start, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward that goes on from the state."""
    kind, hf = start.kind, model.nn._module
    ids = kwargs["input_ids"][:, -start.length :]
    copies = len(ids) // len(start.mask)  # beams, or sequences that are generated for each prompt
    mask = start.mask.to(ids.device).repeat_interleave(copies, 0)
    tensors = {n: v.to(ids.device).repeat_interleave(copies, 0) for n, v in (start.tensors or {}).items()}
    cache = kwargs.get(kind.argument)
    cache = kind.empty(hf, ids) if cache is None else cache  # ``generate`` has made one, and keeps it
    kind.write(hf, cache, tensors, mask.shape[1] + model.meta_tokens)
    whole = torch.cat([mask, mask.new_ones(len(ids), start.length)], 1)
    shared(model)["cache"], shared(model)["before"] = cache, mask
    kwargs = {**kwargs, "input_ids": ids, kind.argument: cache}
    kwargs.pop("attention_mask", None)
    if start.masked and kind.mapped:
        kwargs["attention_mask"] = {"full_attention": visible(whole, start.length, hf), "linear_attention": None}
    elif start.masked and not bool(mask.all()):
        kwargs["attention_mask"] = whole
    if start.positions:
        kwargs["position_ids"] = (whole.cumsum(1) - 1)[:, -start.length :]
    return kwargs


def visible(mask: Tensor, length: int, hf: Any) -> Tensor:
    """What is added to the scores of the last `length` columns: 0 where a key is a token not after them."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    distance = columns[-length:, None] - columns[None]
    seen = distance >= 0
    if getattr(hf.config, "sliding_window", None) is not None:
        seen = seen & (distance < hf.config.sliding_window)
    seen = seen[None, None] & mask.bool()[:, None, None]
    dtype = hf.get_input_embeddings().weight.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)


def go_on(model: Model, start: Start) -> None:
    """Several tokens follow: what transformers starts again from zero goes on from the state."""
    tensors = start.tensors or {}
    blocks = {} if start.kind.together else blocks_of(model.nn._module)
    for layer, part in start.restarted:
        view = getattr(model.layers[layer], part)
        if layer in blocks:
            instrument(view._instrument, view._address)
            visit(view._envoy, view._address, view._continues)  # its beginning comes before the convolution
            go_on_convolving(view._envoy.path, blocks[layer], tensors[f"layers.{layer}.{part}.conv_state"])
        view._run(tensors[f"layers.{layer}.{part}.state"])


def go_on_convolving(path: str, block: Any, before: Tensor) -> None:
    """RecurrentGemma's convolution gets the inputs before these instead of zeros; its output moves along."""
    args, kwargs = read_whole(f"{path}.conv_1d.input")
    before = before.transpose(1, 2).to(args[0])
    inputs = torch.cat([before, args[0]], -1)
    write_whole(f"{path}.conv_1d.input", ((inputs,), kwargs))
    output = read_whole(f"{path}.conv_1d.output")
    write_whole(f"{path}.conv_1d.output", output[..., before.shape[-1] :])
    block.conv1d_state = inputs[..., -before.shape[-1] :]


def limit(model: Model, start: Start) -> None:
    """One token follows: dt stays within the limits it has in a sequence."""
    for layer, part, low, high in start.limited:
        view = getattr(model.layers[layer], part)
        view.dt = view.dt.clamp(low, high)


def taken(model: Model, start: Start) -> dict[str, Tensor]:
    """What the model keeps at the end of this forward, by name; asked for last."""
    output = read_whole(f"{model.nn.path}.output")
    cache = shared(model).get("cache", start.kind.of(output))
    return start.kind.read(model.nn._module, cache)
