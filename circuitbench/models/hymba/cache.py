"""One layer's cache: recurrent state, short convolution, and the keys and values of meta tokens and tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
)


class HymbaCacheLayer(LinearAttentionAndFullAttentionLayer):
    """As transformers' cache of a hybrid layer, which holds the meta tokens too, but does not count them.

    Who asks for its length (``generate``, to see which tokens are new) means tokens of the prompt. Layers that share
    the keys and values of an earlier one hold none. Nothing that has left a sliding window is thrown away: it is
    masked.

    Attributes:
        meta_tokens: How many of the columns held are meta tokens.
    """

    def __init__(self, meta_tokens: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.meta_tokens = meta_tokens

    @property
    def columns(self) -> int:
        """Columns held, meta tokens included."""
        return DynamicLayer.get_seq_length(self)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return max(0, self.columns - self.meta_tokens)


def layer_type(meta_tokens: int) -> str:
    """The name by which transformers makes such layers, for a model with so many meta tokens."""
    name = f"hymba with {meta_tokens} meta tokens"
    DYNAMIC_LAYER_TYPE_MAPPING.setdefault(name, partial(HymbaCacheLayer, meta_tokens=meta_tokens))
    return name
