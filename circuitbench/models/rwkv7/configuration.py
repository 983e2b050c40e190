"""RWKV-7's configuration, by the names of flash-linear-attention's config.json."""

from __future__ import annotations

from typing import Any, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

from ...errors import UnsupportedModel


@no_type_check  # a check of shapes would be wrapped around what `strict` makes of the fields
@strict
class RWKV7Config(PretrainedConfig):
    """What an RWKV-7 is made of.

    Fields that are missing from a config.json get flash-linear-attention's defaults. What chooses its kernels
    (`attn_mode`, ``fuse_norm``, ``fuse_cross_entropy``, …) is kept and changes nothing here.

    Attributes:
        head_dim: Width of a head's keys. Given, it decides; else `num_heads` does.
        value_dim: Width of all heads' values, one number or one a layer; default: `hidden_size`.
        intermediate_size: Width of the feed-forward; default: `hidden_ratio` times `hidden_size`, rounded up to 32.
        decay_low_rank_dim, gate_low_rank_dim, a_low_rank_dim, v_low_rank_dim: Ranks of the low-rank maps that make the
            decay, the gate, the in-context learning rate and the share of the first layer's values; ``None``: a size
            that grows with the root of `hidden_size`.
        norm_first: Whether the embeddings are normed before the first layer.
        norm_eps: Of all layer norms; `head_dim` times it is that of the heads' norm.
        attn: Layers that are attention instead. There is no such published model; refused.

    Raises:
        UnsupportedModel: For settings that cannot be represented.
    """

    model_type = "rwkv7"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    head_dim: int | None = 64
    num_heads: int | None = None
    value_dim: int | list[int] | None = None
    hidden_ratio: int | float | None = 4
    intermediate_size: int | None = None
    decay_low_rank_dim: int | None = 64
    gate_low_rank_dim: int | None = 128
    a_low_rank_dim: int | None = 64
    v_low_rank_dim: int | None = 16
    hidden_act: str = "sqrelu"
    max_position_embeddings: int | None = 2048
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5
    attn: dict[str, Any] | None = None
    attn_mode: str = "chunk"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None and self.num_heads:
            self.head_dim = self.hidden_size // self.num_heads
        self.head_dim = self.head_dim or 64
        self.check_heads()
        self.num_heads = self.hidden_size // self.head_dim
        if not isinstance(self.value_dim, list):
            self.value_dim = [self.value_dim or self.hidden_size] * self.num_hidden_layers
        if self.intermediate_size is None:
            self.intermediate_size = -(-int(self.hidden_size * (self.hidden_ratio or 4)) // 32) * 32
        wider = self.head_dim / 64
        self.decay_low_rank_dim = self.decay_low_rank_dim or self.low_rank(2.5 * wider)
        self.a_low_rank_dim = self.a_low_rank_dim or self.low_rank(2.5 * wider)
        self.v_low_rank_dim = self.v_low_rank_dim or self.low_rank(1.7 * wider)
        self.gate_low_rank_dim = self.gate_low_rank_dim or self.low_rank(5)
        self.check()
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """What transformers makes a cache's layers by: ours, from `cache`."""
        return [self.model_type] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """transformers' own check knows no layer types but its own."""

    @property
    def values(self) -> int:
        """Width of all heads' values, the same in every layer."""
        return self.value_dim[0] if isinstance(self.value_dim, list) else self.value_dim or self.hidden_size

    @property
    def key_heads(self) -> int:
        """Number of heads."""
        return self.num_heads or 1

    def low_rank(self, factor: float) -> int:
        """`factor` times the root of the width, rounded to 32."""
        return max(32, round(factor * self.hidden_size**0.5 / 32) * 32)

    def check_heads(self) -> None:
        """Refuse heads that do not fill the width."""
        if not self.head_dim or self.hidden_size % self.head_dim:
            raise refused(f"hidden_size={self.hidden_size} is to be a multiple of head_dim={self.head_dim}")

    def check(self) -> None:
        """Refuse what cannot be represented."""
        widths = self.value_dim if isinstance(self.value_dim, list) else []
        wrong = {
            f"attn={self.attn!r}, layers of attention, is to be None": self.attn is not None,
            f"hidden_act={self.hidden_act!r} is to be 'sqrelu', also called 'relu2'": self.hidden_act
            not in ("sqrelu", "relu2"),
            f"value_dim={widths!r} is to hold one width, the same for each of {self.num_hidden_layers} layers (the "
            "first layer's values are mixed into the others')": len(widths) != self.num_hidden_layers
            or len(set(widths)) > 1,
            f"value_dim={widths[:1]} is to be a multiple of {self.num_heads} heads": bool(widths)
            and widths[0] % self.key_heads,
        }
        reasons = [reason for reason, broken in wrong.items() if broken]
        if reasons:
            raise refused(reasons[0])


def refused(reason: str) -> UnsupportedModel:
    """The error for a configuration."""
    return UnsupportedModel(f"This is no configuration of an RWKV-7 that circuitbench can run: {reason}.")
