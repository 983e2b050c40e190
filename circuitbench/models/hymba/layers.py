"""Norm, attention and MLP of a Hymba layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, no_type_check

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .positions import rotated

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import Cache

    from .configuration import HymbaConfig

KeysAndValues = tuple[Any, Any]


def widened(x: Tensor) -> Tensor:
    """x in float32, or in what it is in if that is more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class HymbaRMSNorm(nn.Module):
    """x divided by its root mean square over the last axis, in float32 at least, times a weight."""

    def __init__(self, shape: int | tuple[int, ...], eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Norm the last axis; the weight may have axes before it."""
        wide = widened(x)
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: Float[Tensor, "b h t p"],
    key: Float[Tensor, "b kv keys p"],
    value: Float[Tensor, "b kv keys v"],
    attention_mask: Float[Tensor, "#b 1 t keys"],
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h t keys"]]:
    """Attention written out, so that its pattern is a tensor."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    pattern = F.softmax(widened(scores), dim=-1).to(query.dtype)
    pattern = F.dropout(pattern, p=dropout, training=module.training)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


class HymbaAttention(nn.Module):
    """The attention branch, between the projection that it shares with the state-space branch and its norm.

    Attributes:
        reuse_kv: Whether keys and values are those of an earlier layer, `producer`.
    """

    def __init__(self, config: HymbaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.producer = config.producer_of(layer_idx)
        self.reuse_kv = self.producer != layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.key_value_heads
        self.head_dim = config.head_dim
        self.value_dim = config.value_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.k_norm = self.q_norm = None
        if config.kq_norm == "rms":
            self.k_norm, self.q_norm = HymbaRMSNorm(self.head_dim), HymbaRMSNorm(self.head_dim)
        elif config.kq_norm == "perhead-rms":
            self.k_norm, self.q_norm = (
                HymbaRMSNorm((1, heads, 1, self.head_dim)) for heads in (config.key_value_heads, self.num_heads)
            )

    @no_type_check  # nnsight reads this function's source: no check may be wrapped around it
    def forward(
        self,
        query: Float[Tensor, "b t q"],
        key: Float[Tensor, "b t k"] | None,
        value: Float[Tensor, "b t v"] | None,
        attention_mask: Float[Tensor, "#b 1 t keys"],
        rotation: tuple[Tensor, Tensor] | None,
        past_key_values: Cache | None,
        shared: dict[int, KeysAndValues],
    ) -> tuple[Float[Tensor, "b t z"], Float[Tensor, "b h t keys"] | None]:
        """What the heads put out, side by side, and the pattern where it is computed.

        Args:
            query, key, value: As the projection puts them out; no keys and values in a layer that reuses them.
            attention_mask: What is added to the scores.
            rotation: Cosine and sine of the columns' positions.
            past_key_values: The cache.
            shared: Layer -> keys (turned) and values of this forward, those in the cache included; added to here.
        """
        batch, length, _ = query.shape
        queries = query.view(batch, length, -1, self.head_dim).transpose(1, 2)
        queries = self.turned(queries, self.q_norm, rotation)
        if self.reuse_kv:
            keys, values = shared[self.producer]
        else:
            assert key is not None and value is not None
            keys = key.view(batch, length, -1, self.head_dim).transpose(1, 2)
            keys = self.turned(keys, self.k_norm, rotation)
            values = value.view(batch, length, -1, self.value_dim).transpose(1, 2)
            if past_key_values is not None:
                keys, values = past_key_values.update(keys, values, self.layer_idx)
            shared[self.layer_idx] = (keys, values)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention
        )
        z, pattern = attention_interface(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return z.reshape(batch, length, -1), pattern

    def turned(self, heads: Tensor, norm: HymbaRMSNorm | None, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries or keys, normed and turned where the configuration says so."""
        heads = heads if norm is None else norm(heads)
        return heads if rotation is None else rotated(heads, *rotation)


class HymbaMLP(nn.Module):
    """A gated MLP; without a gate for squared ReLU."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.act_fn = ACT2FN[config.mlp_hidden_act]
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, hidden, bias=False) if config.mlp_hidden_act == "silu" else None
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """What is added to the residual stream."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class HymbaExperts(nn.Module):
    """The published code's mixture of experts, of which every model has exactly one."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList([HymbaMLP(config)])

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """What the one expert puts out."""
        return self.experts[0](x)
