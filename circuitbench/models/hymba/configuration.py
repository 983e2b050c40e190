"""Hymba's configuration, by the names of the published config.json."""

from __future__ import annotations

import math
from typing import Any, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

from ...errors import UnsupportedModel
from .cache import layer_type


@no_type_check  # a check of the constructor knows the fields alone, and a config.json has more
@strict
class HymbaConfig(PretrainedConfig):
    """What a Hymba is made of.

    Fields that are missing from a config.json get the published code's defaults, which are no model's.

    Attributes:
        num_memory_tokens: Learned vectors (the paper's meta tokens) that come before every prompt.
        sliding_window: How far back a token attends, in tokens, in the layers that are not in `global_attn_idx`; the
            meta tokens are always seen. Without either, every layer attends to everything.
        kv_reuse_group: Groups of layers that share the keys and values of the first one in each.
        kv_reuse_every_i_layer: Without groups: this many layers in a row share those of the first.
        rope_type: ``None`` or ``"default"``, or ``"ntk"``: another base, so that positions up to
            `max_position_embeddings` turn as those up to `orig_max_position_embeddings` did in training.
        kq_norm: ``"none"``, ``"rms"`` or ``"perhead-rms"``: whether keys and queries are normed before they are turned.
        num_experts: Kept; the published code builds one MLP a layer, whatever it says.

    Raises:
        UnsupportedModel: For settings that the published code has no consistent meaning for, or that it needs for
            training alone.
    """

    model_type = "hymba"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 65536
    tie_word_embeddings: bool = False
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    hidden_act: str = "silu"
    mlp_hidden_act: str = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    sliding_window: int | None = None
    global_attn_idx: list[int] | None = None
    max_position_embeddings: int = 262144
    orig_max_position_embeddings: int | None = None
    rope: bool = False
    rope_theta: float = 10000.0
    rope_type: str | None = None
    attention_dropout: float = 0.0
    attn_hidden_size: int = -1
    kq_head_dim: int = -1
    v_head_dim: int = -1
    kq_norm: str | None = "none"
    num_experts: int = 16
    num_experts_per_tok: int = 2
    num_mamba: int = 1
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_dt_rank: int | str = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    mamba_inner_layernorms: bool = True
    kv_reuse_group: list[list[int]] | None = None
    kv_reuse_every_i_layer: int = -1
    num_memory_tokens: int = 0
    memory_tokens_interspersed_every: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.mamba_dt_rank == "auto":
            self.mamba_dt_rank = math.ceil(self.hidden_size / 16)
        self.kq_norm = self.kq_norm or "none"
        if kwargs.get("attn_implementation") == "flex":
            kwargs.pop("attn_implementation")  # the published code's name for its own function, which is not ours
        self.check()
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """What transformers makes a cache's layers by: ours, from `cache`."""
        return [layer_type(self.num_memory_tokens)] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """transformers' own check knows no layer types but its own."""

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values, which several heads of queries share."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def d_inner(self) -> int:
        """Width of each branch."""
        return int(self.mamba_expand * self.hidden_size)

    @property
    def head_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.hidden_size // self.num_attention_heads

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.d_inner // self.num_attention_heads

    def window_of(self, layer: int) -> int | None:
        """How far back a layer attends; ``None``: to everything (as does every layer where none is named)."""
        return None if self.global_attn_idx is None or layer in self.global_attn_idx else self.sliding_window

    def producer_of(self, layer: int) -> int:
        """The layer whose keys and values this one attends to: itself, unless it shares those of an earlier one."""
        if self.kv_reuse_group is not None:
            return next((group[0] for group in self.kv_reuse_group if layer in group), layer)
        return layer - layer % self.kv_reuse_every_i_layer if self.kv_reuse_every_i_layer > 0 else layer

    def check(self) -> None:
        """Refuse what cannot be represented."""
        heads, values = self.num_attention_heads, self.key_value_heads
        groups = self.kv_reuse_group or []
        shared = [layer for group in groups for layer in group]
        wrong = {
            f"hidden_size={self.hidden_size} is to be a multiple of num_attention_heads={heads}, and that of "
            f"num_key_value_heads={values}": self.hidden_size % heads or heads % values or self.d_inner % heads,
            f"attn_hidden_size={self.attn_hidden_size} is to be hidden_size or -1": self.attn_hidden_size
            not in (-1, self.hidden_size),
            f"kq_head_dim={self.kq_head_dim} is to be {self.head_dim} or -1": self.kq_head_dim
            not in (-1, self.head_dim),
            f"v_head_dim={self.v_head_dim} is to be {self.value_dim} or -1": self.v_head_dim
            not in (-1, self.value_dim),
            f"num_mamba={self.num_mamba} is to be 1": self.num_mamba != 1,
            f"intermediate_size={self.intermediate_size} is to be above 0": self.intermediate_size < 1,
            f"memory_tokens_interspersed_every={self.memory_tokens_interspersed_every} is to be 0": (
                self.memory_tokens_interspersed_every > 0
            ),
            f"kq_norm={self.kq_norm!r} is to be 'none', 'rms' or 'perhead-rms'": self.kq_norm
            not in ("none", "rms", "perhead-rms"),
            f"mlp_hidden_act={self.mlp_hidden_act!r} is to be 'silu' or 'relu2'": self.mlp_hidden_act
            not in ("silu", "relu2"),
            f"rope_type={self.rope_type!r} is to be None, 'default' or 'ntk', the latter with "
            "orig_max_position_embeddings": self.rope_type not in (None, "default", "ntk")
            or (self.rope_type == "ntk" and self.orig_max_position_embeddings is None),
            f"kv_reuse_group={groups!r} is to hold each layer once at most, the first of a group before the others": (
                len(set(shared)) < len(shared) or any(min(group) < group[0] for group in groups)
            ),
        }
        reasons = [reason for reason, broken in wrong.items() if broken]
        if reasons:
            raise UnsupportedModel(f"This is no configuration of a Hymba that circuitbench can run: {reasons[0]}.")
