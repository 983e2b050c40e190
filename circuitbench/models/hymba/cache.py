"""One layer's cache: recurrent state, short convolution, and the keys and values of meta tokens and tokens."""

from __future__ import annotations

from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer


class HymbaCacheLayer(LinearAttentionAndFullAttentionLayer):
    """As transformers' cache of a hybrid layer, which holds the meta tokens too, but does not count them.

    Who asks for its length (``generate``, to see which tokens are new) means tokens of the prompt. Layers that share
    the keys and values of an earlier one hold none. Nothing that has left a sliding window is thrown away: it is
    masked.

    Attributes:
        meta_tokens: How many of the columns held are meta tokens.
    """

    _layer_type = "hymba"  # transformers then makes it for `HymbaConfig.layer_types`
    meta_tokens = 0

    @property
    def columns(self) -> int:
        """Columns held, meta tokens included."""
        return DynamicLayer.get_seq_length(self)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return max(0, self.columns - self.meta_tokens)
