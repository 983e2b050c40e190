"""One layer's cache: the matrix state, and the last input of either token shift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from ...errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

TIME_MIX, CHANNEL_MIX = 0, 1  # which shift: the mixer's, the feed-forward's


class RWKV7CacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """As transformers' cache of a linear attention layer, which counts the tokens it has seen.

    ``recurrent_states[0]`` is the state `(b, h, dk, dv)`; ``conv_states[0]`` and ``[1]``, `(b, d_model, 1)`, are what
    the mixer and the feed-forward were last given. Who asks for its length is ``generate``, to see which tokens are
    new.

    Attributes:
        cumulative_length: Tokens seen, padding included; ``None`` if the states were put in from elsewhere.
    """

    _layer_type = "rwkv7"  # transformers then makes it for `RWKV7Config.layer_types`
    is_compileable = False

    def __init__(self, **kwargs: Any) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=2)
        self.cumulative_length: int | None = 0

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, tokens: int | None = None, **given: Any
    ) -> Any:
        """transformers' own, told how many tokens have gone by."""
        if state_idx == TIME_MIX:
            known = self.cumulative_length
            self.cumulative_length = None if tokens is None or known is None else known + tokens
        return LinearAttentionLayer.update_conv_state(self, conv_states, state_idx, **given)

    def get_seq_length(self) -> int:
        """Tokens seen.

        Raises:
            BadInput: If the states were put in from elsewhere.
        """
        if self.cumulative_length is None:
            raise BadInput(
                "This cache holds states that were put into it from elsewhere, so it does not know how many tokens "
                "they have seen; set cumulative_length of each of its layers."
            )
        return self.cumulative_length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns a mask would have, and where it would begin."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        LinearAttentionLayer.reset(self)
        self.cumulative_length = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """There are no keys and values."""
        raise BadInput("A layer of RWKV-7 caches no keys and values.")
