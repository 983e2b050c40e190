"""The model: layers whose attention and state-space heads read the same input, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, no_type_check

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

# `models.kernels` puts ours in the place of the scan, by its name in this module.
from transformers.models.mamba.modeling_mamba import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_selective_scan,
    mamba_selective_state_update,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...errors import BadInput
from ...recurrences import s6
from .cache import HymbaCacheLayer
from .configuration import HymbaConfig
from .layers import HymbaAttention, HymbaExperts, HymbaRMSNorm, widened
from .positions import Columns, rotations

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


def continued_selective_scan(
    hidden_states: Float[Tensor, "b d t"],
    dt: Float[Tensor, "b d t"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b n t"],
    C: Float[Tensor, "b n t"],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d t"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Float[Tensor, "b d n"] | None = None,
) -> Any:
    """transformers' ``mamba_selective_scan``, which goes on from a state where there is one.

    transformers' function (and the kernel behind it) starts from zero, whatever has gone before.
    """
    if initial_state is None:
        return mamba_selective_scan(
            hidden_states,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
            return_last_state=return_last_state,
        )
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
    dt = F.softplus(dt) if delta_softplus else dt
    y, state = s6.forward(
        hidden_states.transpose(1, 2),
        dt.transpose(1, 2),
        A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        D,
        initial_state,
    )
    y = y.transpose(1, 2)
    y = y if z is None else y * F.silu(z)
    y = y.to(hidden_states.dtype)
    return (y, state) if return_last_state else y


class HymbaBlock(nn.Module):
    """The mixer: one projection feeds state-space heads and attention heads; their normed outputs are averaged.

    Each branch is normed, and the output projection of half of either is what it adds to the residual stream: the
    published code projects their mean, which is the sum of the two.
    """

    branch_weight = 0.5

    def __init__(self, config: HymbaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.intermediate_size = config.d_inner
        self.ssm_state_size = config.mamba_d_state
        self.conv_kernel_size = config.mamba_d_conv
        self.time_step_rank = int(config.mamba_dt_rank)
        self.activation = config.hidden_act
        self.self_attn = HymbaAttention(config, layer_idx)
        heads, groups = config.num_attention_heads, config.key_value_heads
        reused = 0 if self.self_attn.reuse_kv else groups
        self.widths = [heads * config.head_dim, reused * config.head_dim, reused * config.value_dim]
        self.widths += [self.intermediate_size, self.intermediate_size]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=config.mamba_proj_bias)
        self.conv1d = nn.Conv1d(
            self.intermediate_size,
            self.intermediate_size,
            self.conv_kernel_size,
            groups=self.intermediate_size,
            padding=self.conv_kernel_size - 1,
            bias=config.mamba_conv_bias,
        )
        # Lists of one: the published code has a place for several sets of state-space heads.
        parameters = self.time_step_rank + 2 * self.ssm_state_size
        self.x_proj = nn.ModuleList([nn.Linear(self.intermediate_size, parameters, bias=False)])
        self.dt_proj = nn.ModuleList([nn.Linear(self.time_step_rank, self.intermediate_size)])
        self.A_log = nn.ParameterList([nn.Parameter(torch.zeros(self.intermediate_size, self.ssm_state_size))])
        self.D = nn.ParameterList([nn.Parameter(torch.ones(self.intermediate_size))])
        eps, inner = config.rms_norm_eps, config.mamba_inner_layernorms
        self.dt_layernorm = HymbaRMSNorm(self.time_step_rank, eps) if inner else nn.Identity()
        self.B_layernorm = HymbaRMSNorm(self.ssm_state_size, eps) if inner else nn.Identity()
        self.C_layernorm = HymbaRMSNorm(self.ssm_state_size, eps) if inner else nn.Identity()
        self.pre_avg_layernorm1 = HymbaRMSNorm(self.intermediate_size, eps)
        self.pre_avg_layernorm2 = HymbaRMSNorm(self.intermediate_size, eps)
        self.out_proj = nn.Linear(self.intermediate_size, config.hidden_size, bias=config.mamba_proj_bias)

    @no_type_check  # nnsight reads this function's source: no check may be wrapped around it
    def forward(
        self,
        hidden_states: Float[Tensor, "b t d"],
        past_key_values: Cache | None,
        padding: Float[Tensor, "b t"] | None,
        attention_mask: Float[Tensor, "#b 1 t keys"],
        rotation: tuple[Tensor, Tensor] | None,
        shared: dict[int, Any],
    ) -> Float[Tensor, "b t d"]:
        """What the mixer adds to the residual stream.

        Args:
            hidden_states: The normed residual stream.
            past_key_values: The cache.
            padding: 0 where a column is padding, else 1; ``None``: nowhere.
            attention_mask, rotation, shared: As in `HymbaAttention`.
        """
        length, dtype = hidden_states.shape[1], hidden_states.dtype
        conv_state = recurrent_state = None
        if past_key_values is not None:
            conv_state = past_key_values.get_conv_state(self.layer_idx)
            recurrent_state = past_key_values.get_recurrent_state(self.layer_idx)
        projected = self.in_proj(hidden_states)
        if padding is not None:
            projected = projected * padding[..., None]
        query, key, value, x, gate = projected.split(self.widths, -1)

        # 1. The short convolution
        x, gate = x.transpose(1, 2), gate.transpose(1, 2)
        weight = self.conv1d.weight.squeeze(1)
        if conv_state is not None and length == 1:
            x = causal_conv1d_update(x, conv_state, weight, self.conv1d.bias, activation=self.activation)
        else:
            if past_key_values is not None:
                x = past_key_values.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
            x = causal_conv1d_fn(x, weight, self.conv1d.bias, activation=self.activation)
            x = x[..., -length:]
        if padding is not None:
            x = x * padding[:, None]

        # 2. The state-space heads
        dt, B, C = self.x_proj[0](x.transpose(1, 2)).split(
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], -1
        )
        dt, B, C = self.dt_layernorm(dt), self.B_layernorm(B), self.C_layernorm(C)
        dt = self.dt_proj[0].weight @ dt.transpose(1, 2)
        dt_bias: Any = widened(self.dt_proj[0].bias)
        A = -torch.exp(widened(self.A_log[0]))
        if recurrent_state is not None and length == 1:
            y = mamba_selective_state_update(
                recurrent_state,
                x[..., 0],
                dt[..., 0],
                A,
                B[:, 0],
                C[:, 0],
                self.D[0],
                z=gate[..., 0],
                dt_bias=dt_bias,
                dt_softplus=True,
            ).unsqueeze(-1)
        else:
            y = continued_selective_scan(
                x,
                dt,
                A,
                B.transpose(1, 2),
                C.transpose(1, 2),
                D=widened(self.D[0]),
                z=gate,
                delta_bias=dt_bias,
                delta_softplus=True,
                return_last_state=past_key_values is not None,
                initial_state=recurrent_state,
            )
            if past_key_values is not None:
                y, final = y
                past_key_values.update_recurrent_state(final, self.layer_idx)
        ssm = self.pre_avg_layernorm2(y.transpose(1, 2).to(dtype))

        # 3. The attention heads
        if self.self_attn.reuse_kv:
            key = value = None
        z, _ = self.self_attn(query, key, value, attention_mask, rotation, past_key_values, shared)
        attention = self.pre_avg_layernorm1(z)

        # 4. What either adds
        ssm, attention = self.out_proj(torch.stack([ssm, attention])) * self.branch_weight
        return ssm + attention


class HymbaDecoderLayer(nn.Module):
    """Mixer and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: HymbaConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mamba = HymbaBlock(config, layer_idx)
        self.pre_moe_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = HymbaExperts(config)

    def forward(self, hidden_states: Float[Tensor, "b t d"], **given: Any) -> Float[Tensor, "b t d"]:
        """The residual stream after the layer; arguments as in `HymbaBlock`."""
        hidden_states = hidden_states + self.mamba(self.input_layernorm(hidden_states), **given)
        return hidden_states + self.moe(self.pre_moe_layernorm(hidden_states))


class HymbaPreTrainedModel(PreTrainedModel):
    """What the model and its language model have in common."""

    config: HymbaConfig
    config_class = HymbaConfig
    base_model_prefix = "model"
    _no_split_modules = ["HymbaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "shared"]
    _supports_sdpa = True
    _is_stateful = True  # its cache cannot be rolled back
    _can_record_outputs = {"hidden_states": HymbaDecoderLayer, "attentions": HymbaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HymbaBlock):
            init.copy_(module.A_log[0], torch.arange(1, module.ssm_state_size + 1).log().expand_as(module.A_log[0]))
            init.ones_(module.D[0])
        elif isinstance(module, HymbaModel) and self.config.num_memory_tokens:
            init.normal_(module.memory_tokens)


class HymbaModel(HymbaPreTrainedModel):
    """Tokens, with the meta tokens before them, through the layers; what comes back is of the tokens alone."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.num_memory_tokens:
            self.memory_tokens = nn.Parameter(torch.randn(config.num_memory_tokens, config.hidden_size))
        self.layers = nn.ModuleList([HymbaDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.final_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Int[Tensor, "b keys"] | None = None,
        position_ids: Int[Tensor, "#b t"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "b t d"] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments and output as for any of transformers' decoders; none of them counts the meta tokens.

        Only what ``output_hidden_states`` and ``output_attentions`` return has columns for them, but for the last
        hidden state.

        Raises:
            BadInput: For a mask or a cache that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise BadInput("Give either input_ids or inputs_embeds.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        tokens, meta = hidden.shape[1], self.config.num_memory_tokens
        columns = Columns(meta, held(past_key_values, meta), tokens, attention_mask)
        if past_key_values is not None:
            columns.check_begun()
        if meta and not columns.before:
            hidden = columns.inserted(hidden, self.memory_tokens.to(hidden.dtype))
        positions = columns.positions(hidden.device, position_ids)
        padding = columns.padding
        given: dict[str, Any] = {
            "past_key_values": past_key_values,
            "padding": None if padding is None else padding.to(hidden.dtype),
            "rotation": rotations(self.config, positions, hidden.dtype) if self.config.rope else None,
            "shared": {},
        }
        masks = {
            window: added(columns.visible(hidden.device, window), hidden.dtype)
            for window in {self.config.window_of(index) for index in range(len(self.layers))}
        }
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, attention_mask=masks[self.config.window_of(index)], **given)
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden)[:, -tokens:], past_key_values=past_key_values
        )


class HymbaForCausalLM(HymbaPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.model = HymbaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Int[Tensor, "b keys"] | None = None,
        position_ids: Int[Tensor, "#b t"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "b t d"] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the tokens, and the loss where there are `labels`; as for any of transformers' language models."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def held(cache: Cache | None, meta: int) -> int:
    """Columns that a cache holds, meta tokens included.

    Raises:
        BadInput: For a cache that was not made for this configuration.
    """
    if cache is None:
        return 0
    layers = [layer for layer in cache.layers if isinstance(layer, HymbaCacheLayer) and layer.meta_tokens == meta]
    if not layers or len(layers) < len(cache.layers):
        raise BadInput(
            "A Hymba's cache holds recurrent states, keys and values: transformers.DynamicCache(config=model.config), "
            f"not this {type(cache).__name__}."
        )
    return layers[0].columns


def added(visible: Bool[Tensor, "#b 1 t keys"], dtype: torch.dtype) -> Float[Tensor, "b 1 t keys"]:
    """What is added to scores: 0 where a key is visible; elsewhere so little that its weight is 0."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
