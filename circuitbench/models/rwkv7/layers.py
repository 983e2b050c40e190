"""The layers: a mixer with a matrix state for each head, then a feed-forward; both see the token before."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, no_type_check

import torch
import torch.nn.functional as F
from torch import nn

from ...recurrences import rwkv7
from .cache import CHANNEL_MIX, TIME_MIX
from .configuration import RWKV7Config

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformers.cache_utils import Cache


def rwkv7_scan(
    r: Float[Tensor, "b t h dk"],
    w: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    v: Float[Tensor, "b t h dv"],
    a: Float[Tensor, "b t h dk"],
    b: Float[Tensor, "b t h dk"],
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h dk dv"] | None]:
    """The recurrence over a sequence or one token: `recurrences.rwkv7`, its arguments by the published kernels' names.

    Returns:
        (y, final state or ``None``).
    """
    if initial_state is not None and torch.is_grad_enabled():
        initial_state = initial_state.clone()  # the cache is about to overwrite it, and the backward needs it
    y, state = rwkv7.forward(v, r, w, k, a, b, initial_state=initial_state)
    return y, state if output_final_state else None


def token_shift(
    hidden: Float[Tensor, "b t d"], last: Float[Tensor, "b d"] | None, padding: Bool[Tensor, "b t"] | None
) -> Float[Tensor, "b t d"]:
    """What stood at the token before, across padding.

    Args:
        hidden: What stands at each token.
        last: What stood at the last token before them; ``None``: zeros.
        padding: Where a column is padding; ``None``: nowhere.
    """
    before, latest = tokens_before(hidden, last, padding)
    if latest is None:
        return before[:, :-1]
    index = F.pad(latest[:, :-1], (1, 0))
    return before.gather(1, index[..., None].expand_as(hidden))


def last_token(
    hidden: Float[Tensor, "b t d"], last: Float[Tensor, "b d"] | None, padding: Bool[Tensor, "b t"] | None
) -> Float[Tensor, "b d 1"]:
    """What stands at the last token that is not padding; arguments as in `token_shift`."""
    before, latest = tokens_before(hidden, last, padding)
    if latest is None:
        return before[:, -1, :, None]
    return before.gather(1, latest[:, -1:, None].expand_as(hidden[:, :1])).mT


def tokens_before(
    hidden: Float[Tensor, "b t d"], last: Float[Tensor, "b d"] | None, padding: Bool[Tensor, "b t"] | None
) -> tuple[Float[Tensor, "b t+1 d"], Int[Tensor, "b t"] | None]:
    """All tokens with the one before them, and where in that the latest real token up to each is."""
    before = torch.zeros_like(hidden[:, :1]) if last is None else last[:, None].to(hidden)
    before = torch.cat((before, hidden), 1)
    if padding is None:
        return before, None
    column = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    return before, torch.where(padding, 0, column).cummax(1).values


def carry(values: Float[Tensor, "b t d_inner"]) -> Float[Tensor, "b t d_inner"]:
    """The first layer's values, as it hands them on and as a later layer gets them: each a tensor of its own."""
    return values.clone()


def log_decay(w: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    """The logarithm of the decay, between −e^−½ and 0; at least single precision."""
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    return -math.exp(-0.5) * w.sigmoid()


def bonus(
    r: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    v: Float[Tensor, "b t h dv"],
    r_k: Float[Tensor, "h dk"],
) -> Float[Tensor, "b t h dv"]:
    """What a token reads of its own value, past the state."""
    return (r * k * r_k).sum(-1, keepdim=True) * v


class RWKV7LowRank(nn.Module):
    """A map of low rank, with an activation in the middle and a bias at the end."""

    def __init__(self, size: int, rank: int, out: int, activation: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.lora = nn.Sequential(nn.Linear(size, rank, bias=False), activation, nn.Linear(rank, out, bias=bias))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t out"]:
        """The map."""
        return self.lora(x)


class RWKV7Attention(nn.Module):
    """The mixer (the paper's time mixing)."""

    def __init__(self, config: RWKV7Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.key_heads
        self.head_dim = config.hidden_size // config.key_heads
        self.value_dim = config.values
        self.head_v_dim = self.value_dim // self.num_heads
        size = config.hidden_size
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, size)))
        self.k_k = nn.Parameter(torch.zeros(size))
        self.k_a = nn.Parameter(torch.zeros(size))
        self.r_k = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        self.r_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, self.value_dim, bias=False)
        self.o_proj = nn.Linear(self.value_dim, size, bias=False)
        self.w_lora = RWKV7LowRank(size, config.decay_low_rank_dim or 0, size, nn.Tanh())
        if layer_idx > 0:
            self.v_lora = RWKV7LowRank(size, config.v_low_rank_dim or 0, self.value_dim, nn.Identity())
        self.a_lora = RWKV7LowRank(size, config.a_low_rank_dim or 0, size, nn.Identity())
        self.g_lora = RWKV7LowRank(size, config.gate_low_rank_dim or 0, self.value_dim, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(self.num_heads, self.value_dim, eps=self.head_dim * config.norm_eps)

    @no_type_check  # nnsight reads this function's source: no check may be wrapped around it
    def forward(
        self,
        hidden_states: Float[Tensor, "b t d"],
        v_first: Float[Tensor, "b t d_inner"] | None,
        past_key_values: Cache | None,
        padding: Bool[Tensor, "b t"] | None,
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d_inner"]]:
        """What the mixer adds to the residual stream, and the first layer's values.

        Args:
            hidden_states: The normed residual stream.
            v_first: The first layer's values; ``None`` in the first layer.
            past_key_values: The cache.
            padding: Where a column is padding; ``None``: nowhere.
        """
        heads, values = (self.num_heads, self.head_dim), (self.num_heads, self.head_v_dim)
        last = state = None
        if past_key_values is not None:
            last = past_key_values.get_conv_state(self.layer_idx, TIME_MIX)
            last = None if last is None else last[..., 0]
            state = past_key_values.get_recurrent_state(self.layer_idx)

        # 1. Six inputs, each with its own share of the token before
        shifted = token_shift(hidden_states, last, padding)
        delta = shifted - hidden_states
        r = self.r_proj(hidden_states + delta * self.x_r)
        w = log_decay(self.w_lora(hidden_states + delta * self.x_w))
        k = self.k_proj(hidden_states + delta * self.x_k)
        x_v = hidden_states + delta * self.x_v
        v = self.v_proj(x_v)
        first = carry(v if v_first is None else v_first)
        if v_first is not None:
            v = torch.lerp(v, first, self.v_lora(x_v).sigmoid())
        rate = self.a_lora(hidden_states + delta * self.x_a).sigmoid()
        gate = self.g_lora(hidden_states + delta * self.x_g)

        # 2. The state: removed where `removal` points, as much of it as `rate` says, and written where k does
        removal = F.normalize((k * self.k_k).unflatten(-1, heads), dim=-1)
        k = k * (1 + (rate - 1) * self.k_a)
        r, w, k, rate = (tensor.unflatten(-1, heads) for tensor in (r, w, k, rate))
        v, put = v.unflatten(-1, values), removal * rate
        if padding is not None:
            hidden = padding[..., None, None]
            w, k, put = (tensor.masked_fill(hidden, 0.0) for tensor in (w, k, put))
        y, state = rwkv7_scan(
            r, w, k, v, -removal, put, initial_state=state, output_final_state=past_key_values is not None
        )
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
            past_key_values.update_conv_state(
                last_token(hidden_states, last, padding), self.layer_idx, TIME_MIX, tokens=hidden_states.shape[1]
            )

        # 3. Each head is normed, its own token added, the gate applied
        normed = self.g_norm(y.flatten(2).flatten(0, 1)).view(y.shape)
        own = bonus(r, k, v, self.r_k)
        out = self.o_proj((normed + own).flatten(2) * gate)
        return out, first if v_first is None else v_first


class RWKV7FeedForward(nn.Module):
    """The feed-forward (the paper's channel mixing), with a token shift of its own."""

    def __init__(self, config: RWKV7Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.x_k = nn.Parameter(torch.zeros(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size or 0, bias=False)
        self.value = nn.Linear(config.intermediate_size or 0, config.hidden_size, bias=False)

    @no_type_check  # as above
    def forward(
        self,
        hidden_states: Float[Tensor, "b t d"],
        past_key_values: Cache | None,
        padding: Bool[Tensor, "b t"] | None,
    ) -> Float[Tensor, "b t d"]:
        """What the feed-forward adds to the residual stream; arguments as in `RWKV7Attention`."""
        last = None
        if past_key_values is not None:
            last = past_key_values.get_conv_state(self.layer_idx, CHANNEL_MIX)
            last = None if last is None else last[..., 0]
        shifted = token_shift(hidden_states, last, padding)
        if past_key_values is not None:
            past_key_values.update_conv_state(last_token(hidden_states, last, padding), self.layer_idx, CHANNEL_MIX)
        hidden = self.key(hidden_states + (shifted - hidden_states) * self.x_k)
        return self.value(hidden.relu().square())


class RWKV7Block(nn.Module):
    """Mixer and feed-forward, each after a norm and added to the residual stream; the first layer norms its input."""

    def __init__(self, config: RWKV7Config, layer_idx: int) -> None:
        super().__init__()

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

        if config.norm_first and layer_idx == 0:
            self.pre_norm = norm()
        self.attn_norm = norm()
        self.attn = RWKV7Attention(config, layer_idx)
        self.ffn_norm = norm()
        self.ffn = RWKV7FeedForward(config, layer_idx)

    @no_type_check  # as above
    def forward(
        self, hidden_states: Float[Tensor, "b t d"], v_first: Float[Tensor, "b t d_inner"] | None, **given: Any
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d_inner"]]:
        """The residual stream after the layer, and the first layer's values; arguments as in `RWKV7Attention`."""
        if hasattr(self, "pre_norm"):
            hidden_states = self.pre_norm(hidden_states)
        mixed, v_first = self.attn(self.attn_norm(hidden_states), v_first=v_first, **given)
        hidden_states = hidden_states + mixed
        return hidden_states + self.ffn(self.ffn_norm(hidden_states), **given), v_first
