"""What a model keeps between two forwards, by name: read out of its cache, and put into the cache of another run.

Every family keeps its past in its own way; `prefix.kind_of` finds the adapter. The names are those of the sites where
there is a site, and the tensors have its layout without the axis of positions:

    layers.3.ssm.state        the recurrent state
    layers.3.ssm.scale        the logarithm of the unit it is held in, where there is one (RWKV-4, xLSTM)
    layers.3.ssm.conv_state   the last inputs of the short convolution, (b, k, channels)
    layers.3.ssm.shift        the last input of the token shift (RWKV), (b, d_model); layers.3.mlp.shift: the other one
    layers.1.attn.k, .v       cached keys (as they are compared: after a rotary embedding) and values, (b, t, kv, p)

Travels to remote servers by value (see `events`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor


class CacheKind:
    """One way to keep the past: transformers' ``Cache``, an object a layer (most families).

    Attributes:
        argument: Name of the cache among the arguments of the model's forward, and in its output.
        made_by: Name of its class, in the code of the family.
        together: Whether several tokens may follow a cached past at once, scans apart (`Scan.continues` tells of them).
        by_row: Whether one token that follows a cached past has to come without others beside it in the batch.
        mapped: Whether the mask is to be given for each kind of layer, already made.
        parts: Name of the recurrent part of each layer.
    """

    argument = "past_key_values"
    made_by = "DynamicCache"
    together = True
    by_row = False
    mapped = False

    def __init__(self, parts: list[str]) -> None:
        self.parts = parts

    def empty(self, hf: Any, tokens: Tensor) -> Any:
        """A cache that holds nothing yet, for the prompts `tokens`."""
        return class_named(hf, self.made_by)(config=hf.config)

    def prepared(self, hf: Any, tokens: Tensor) -> Any:
        """The cache that a run from the beginning has to be given, or ``None`` where the model makes its own."""
        return None

    def of(self, output: Any) -> Any:
        """The cache in what the model's forward returned."""
        return getattr(output, self.argument)

    def read(self, hf: Any, cache: Any) -> dict[str, Tensor]:
        """What it holds, as copies."""
        found: dict[str, Tensor] = {}
        for index, layer in enumerate(cache.layers):
            part = f"layers.{index}.{self.parts[index]}"
            for number, value in getattr(layer, "recurrent_states", {}).items():
                if value is not None:
                    found[numbered(f"{part}.state", number)] = value.clone()
            for number, value in getattr(layer, "conv_states", {}).items():
                if value is not None:
                    found[numbered(f"{part}.conv_state", number)] = value.transpose(1, 2).contiguous()
            for name, value in (("k", getattr(layer, "keys", None)), ("v", getattr(layer, "values", None))):
                if value is not None and value.numel():
                    found[f"layers.{index}.attn.{name}"] = value.transpose(1, 2).contiguous()
        return found

    def write(self, hf: Any, cache: Any, tensors: dict[str, Tensor], columns: int) -> None:
        """Put tensors into a cache, in the place of what it holds under their names.

        Args:
            hf: The model.
            cache: The cache.
            tensors: By name; copied.
            columns: How many columns have gone through the model, padding included.
        """
        for name, value in tensors.items():
            index, _, site = split(name)
            while len(cache.layers) <= index:
                cache.layers.append(cache.layer_class_to_replicate())
            layer = cache.layers[index]
            kind, _, number = site.partition(":")
            number = int(number or 0)
            if kind == "k":
                pair = [tensors[f"layers.{index}.attn.{part}"].transpose(1, 2).contiguous() for part in ("k", "v")]
                layer.lazy_initialization(*pair)
                layer.keys, layer.values = pair
            elif kind == "state":
                layer.update_recurrent_state(value, number)
                layer.has_previous_state[number] = True
            elif kind == "conv_state":
                layer.has_previous_state[number] = False  # else the cache takes it for more tokens
                layer.update_conv_state(value.transpose(1, 2).contiguous(), number)
            if hasattr(layer, "cumulative_length"):  # one that cannot tell it from what it holds
                layer.cumulative_length = columns


class CacheParams(CacheKind):
    """The same under another name (Mamba, Falcon-Mamba, Mamba-2)."""

    argument = "cache_params"


class MiniMaxKind(CacheKind):
    """MiniMax: keys and values in the same way, the states of lightning attention beside them, transposed.

    Its first layer keeps no keys, and the length of that layer is what transformers counts positions and sizes masks
    by: the first are given, and so is the mask.
    """

    made_by = "MiniMaxCache"
    mapped = True

    def empty(self, hf: Any, tokens: Tensor) -> Any:
        """As in `CacheKind`."""
        return class_named(hf, self.made_by)()

    def read(self, hf: Any, cache: Any) -> dict[str, Tensor]:
        """As in `CacheKind`."""
        states = {
            f"layers.{index}.{self.parts[index]}.state": value.transpose(-1, -2).contiguous()
            for index, value in enumerate(cache.linear_cache)
            if isinstance(value, torch.Tensor)
        }
        return states | CacheKind.read(self, hf, cache)

    def write(self, hf: Any, cache: Any, tensors: dict[str, Tensor], columns: int) -> None:
        """As in `CacheKind`."""
        states = {name: value for name, value in tensors.items() if name.endswith(".state")}
        for name, value in states.items():
            cache.set_linear_cache(split(name)[0], value.transpose(-1, -2).contiguous())
        CacheKind.write(self, hf, cache, {n: v for n, v in tensors.items() if n not in states}, columns)


class RWKV7Kind(CacheKind):
    """Our RWKV-7: the last inputs of its token shifts are where others have those of a convolution."""

    def read(self, hf: Any, cache: Any) -> dict[str, Tensor]:
        """As in `CacheKind`."""
        found: dict[str, Tensor] = {}
        for name, value in CacheKind.read(self, hf, cache).items():
            index, part, site = split(name)
            if site.startswith("conv_state"):
                name = f"layers.{index}.{part if site == 'conv_state' else 'mlp'}.shift"
                value = value.squeeze(1)
            found[name] = value
        return found

    def write(self, hf: Any, cache: Any, tensors: dict[str, Tensor], columns: int) -> None:
        """As in `CacheKind`."""
        named: dict[str, Tensor] = {}
        for name, value in tensors.items():
            index, part, site = split(name)
            if site == "shift":
                name = numbered(f"layers.{index}.{self.parts[index]}.conv_state", int(part == "mlp"))
                value = value.unsqueeze(1)
            named[name] = value
        CacheKind.write(self, hf, cache, named, columns)


class XlstmCache:
    """What xLSTM's forward asks of its cache. (Its own class would come from the family's code.)"""

    def __init__(self, rnn_state: dict[int, tuple[Tensor, ...]]) -> None:
        self.rnn_state = rnn_state
        self.seqlen_offset = torch.zeros(1, dtype=torch.long)
        self.rnn_state_initial = False


class XlstmKind(CacheKind):
    """xLSTM: matrix memory, normaliser (the last column of the state here) and scale of every layer."""

    argument = "cache_params"

    def empty(self, hf: Any, tokens: Tensor) -> Any:
        """As in `CacheKind`."""
        return XlstmCache({})

    def read(self, hf: Any, cache: Any) -> dict[str, Tensor]:
        """As in `CacheKind`."""
        found: dict[str, Tensor] = {}
        for index, (memory, normaliser, scale) in cache.rnn_state.items():
            part = f"layers.{index}.{self.parts[index]}"
            found[f"{part}.state"] = torch.cat([memory, normaliser.unsqueeze(-1)], -1)
            found[f"{part}.scale"] = scale.squeeze(-1).clone()
        return found

    def write(self, hf: Any, cache: Any, tensors: dict[str, Tensor], columns: int) -> None:
        """As in `CacheKind`."""
        for name, value in tensors.items():
            index, _, site = split(name)
            memory, normaliser, scale = cache.rnn_state.get(index, (None, None, None))
            if site == "state":
                memory, normaliser = value[..., :-1].contiguous(), value[..., -1].contiguous()
            else:
                scale = value.unsqueeze(-1).clone()
            cache.rnn_state[index] = (memory, normaliser, scale)
        cache.seqlen_offset = torch.full_like(cache.seqlen_offset, columns)


class RwkvKind(CacheKind):
    """RWKV-4: a list of five tensors, layers last: both token shifts, numerator, denominator and scale.

    transformers multiplies the shift of one token, which has no axis of positions, with its input, which has one: with
    several prompts in a batch they spread over each other.
    """

    argument = "state"
    by_row = True

    def empty(self, hf: Any, tokens: Tensor) -> Any:
        """As in `CacheKind`: what its forward begins with."""
        weight = hf.get_input_embeddings().weight
        width = getattr(hf.config, "attention_hidden_size", None) or hf.config.hidden_size
        widths = (hf.config.hidden_size, hf.config.hidden_size, width, width, width)
        cache = [
            torch.zeros(len(tokens), size, hf.config.num_hidden_layers, device=weight.device, dtype=torch.float32)
            for size in widths
        ]
        cache[:2] = [shift.to(weight.dtype) for shift in cache[:2]]
        cache[4] -= 1e30
        return cache

    def read(self, hf: Any, cache: Any) -> dict[str, Tensor]:
        """As in `CacheKind`."""
        found: dict[str, Tensor] = {}
        for index, part in enumerate(self.parts):
            after, before, numerator, denominator, scale = (value[:, :, index] for value in cache)
            found[f"layers.{index}.mlp.shift"] = after.contiguous()
            found[f"layers.{index}.{part}.shift"] = before.contiguous()
            found[f"layers.{index}.{part}.state"] = torch.stack([numerator, denominator], -1)
            found[f"layers.{index}.{part}.scale"] = scale.contiguous()
        return found

    def write(self, hf: Any, cache: Any, tensors: dict[str, Tensor], columns: int) -> None:
        """As in `CacheKind`."""
        for name, value in tensors.items():
            index, part, site = split(name)
            if site == "state":
                cache[2][:, :, index], cache[3][:, :, index] = value.unbind(-1)
            else:
                cache[4 if site == "scale" else 0 if part == "mlp" else 1][:, :, index] = value


class RecurrentGemmaKind(CacheKind):
    """RecurrentGemma: keys and values in a cache that its output lacks, everything recurrent on the modules themselves.

    After a cached past its convolution starts again from zeros when several tokens come at once.
    """

    together = False

    def prepared(self, hf: Any, tokens: Tensor) -> Any:
        """As in `CacheKind`: nothing of another run is left on the modules."""
        for block in blocks_of(hf).values():
            block.conv1d_state = block.rg_lru.recurrent_states = None
        return self.empty(hf, tokens)

    def of(self, output: Any) -> Any:
        """As in `CacheKind`: it is not there, so whoever needs it has to keep what it gave."""
        return None

    def read(self, hf: Any, cache: Any) -> dict[str, Tensor]:
        """As in `CacheKind`."""
        found = CacheKind.read(self, hf, cache)
        for index, block in blocks_of(hf).items():
            part = f"layers.{index}.{self.parts[index]}"
            found[f"{part}.state"] = block.rg_lru.recurrent_states.clone()
            found[f"{part}.conv_state"] = block.conv1d_state.transpose(1, 2).contiguous()
        return found

    def write(self, hf: Any, cache: Any, tensors: dict[str, Tensor], columns: int) -> None:
        """As in `CacheKind`."""
        blocks, rest = blocks_of(hf), {}
        for name, value in tensors.items():
            index, part, site = split(name)
            if site == "state":
                blocks[index].rg_lru.recurrent_states = value.clone()
            elif site == "conv_state":
                blocks[index].conv1d_state = value.transpose(1, 2).contiguous()
            else:
                rest[name] = value
        CacheKind.write(self, hf, cache, rest, columns)


def blocks_of(hf: Any) -> dict[int, Any]:
    """RecurrentGemma's recurrent blocks, by layer."""
    blocks = {index: layer.temporal_block for index, layer in enumerate(hf.model.layers)}
    return {index: block for index, block in blocks.items() if hasattr(block, "rg_lru")}


def class_named(hf: Any, name: str) -> Any:
    """A class that the code of a model's family knows by this name; the server has it, whatever travels."""
    for owner in type(hf).__mro__:
        for member in vars(owner).values():
            found = getattr(member, "__globals__", {}).get(name)
            if found is not None:
                return found
    raise UnsupportedModel(f"The code of {type(hf).__name__} knows no {name}, which holds its state between forwards.")


def split(name: str) -> tuple[int, str, str]:
    """Layer, part and site of a name."""
    _, index, part, site = name.split(".")
    return int(index), part, site


def numbered(name: str, number: int) -> str:
    """The name of one of several states of a layer."""
    return name if number == 0 else f"{name}:{number}"
