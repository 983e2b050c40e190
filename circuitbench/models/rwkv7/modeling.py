"""The model, as any of transformers' language models: cache, generation, loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...errors import BadInput
from .cache import RWKV7CacheLayer
from .configuration import RWKV7Config
from .layers import RWKV7Attention, RWKV7Block, RWKV7FeedForward, RWKV7LowRank

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class RWKV7PreTrainedModel(PreTrainedModel):
    """What the model and its language model have in common."""

    config: RWKV7Config
    config_class = RWKV7Config
    base_model_prefix = "model"
    _no_split_modules = ["RWKV7Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True  # its cache cannot be rolled back
    _can_record_outputs = {"hidden_states": RWKV7Block}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        depth = getattr(module, "layer_idx", 0) / self.config.num_hidden_layers
        channel = torch.linspace(0, 1, self.config.hidden_size)
        if isinstance(module, RWKV7Attention):
            # Shares of the token before, decays and rates as the paper starts from; weights as transformers does.
            for name, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
                share: Any = getattr(module, f"x_{name}")
                init.copy_(share, (1 - channel ** (power * (1 - depth))).expand_as(share))
            init.copy_(module.k_k, 0.71 - 0.1 * (channel - 0.5))
            init.constant_(module.k_a, 1.02)
            init.constant_(module.r_k, -0.04)
            init.copy_(bias_of(module.w_lora), -5.5 + 6 * channel ** (1 + depth**0.3))
            init.copy_(bias_of(module.a_lora), -0.19 + 0.4 * (channel - 0.5))
            if module.layer_idx > 0:
                init.constant_(bias_of(module.v_lora), 0.73)
        elif isinstance(module, RWKV7FeedForward):
            init.copy_(module.x_k, 1 - channel ** ((1 - depth) ** 4))


class RWKV7Model(RWKV7PreTrainedModel):
    """Tokens through the layers."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([RWKV7Block(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, which transformers looks for under other names."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Int[Tensor, "b keys"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "b t d"] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments and output as for any of transformers' decoders.

        Columns that the mask hides, wherever they are, change no state and are nobody's token before.

        Raises:
            BadInput: For a mask or a cache that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise BadInput("Give either input_ids or inputs_embeds.")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        check_cache(past_key_values)
        padding = padding_in(attention_mask, hidden)
        v_first = None
        for layer in self.layers:
            hidden, v_first = layer(hidden, v_first=v_first, past_key_values=past_key_values, padding=padding)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class RWKV7ForCausalLM(RWKV7PreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.model = RWKV7Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True  # transformers goes by the name, and its own "rwkv" has another cache

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Int[Tensor, "b keys"] | None = None,
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
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


def bias_of(low_rank: RWKV7LowRank) -> Tensor:
    """The bias of a low-rank map."""
    bias: Any = low_rank.lora[2].bias
    return bias


def check_cache(cache: Cache | None) -> None:
    """Refuse a cache of other layers than ours.

    Raises:
        BadInput: Saying which cache fits.
    """
    if cache is not None and not (cache.layers and all(isinstance(layer, RWKV7CacheLayer) for layer in cache.layers)):
        raise BadInput(
            "An RWKV-7's cache holds matrix states and token shifts: transformers.DynamicCache(config=model.config), "
            f"not this {type(cache).__name__}."
        )


def padding_in(mask: Tensor | None, hidden: Tensor) -> Bool[Tensor, "b t"] | None:
    """Which of these columns are padding, ``None`` if none is. The mask may have columns for earlier tokens too.

    Raises:
        BadInput: For a mask of another shape.
    """
    if mask is None:
        return None
    batch, length = hidden.shape[:2]
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        raise BadInput(
            f"attention_mask has shape {tuple(mask.shape)}; it must be ({batch}, {length}), or have more columns for "
            "tokens before these."
        )
    padding = mask[:, -length:] == 0
    return padding if bool(padding.any()) else None
