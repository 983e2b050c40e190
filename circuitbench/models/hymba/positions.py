"""Where meta tokens stand, which position a column has, and what it may attend to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from .configuration import HymbaConfig


class Columns:
    """What the columns of the layers hold in one forward: a prompt's padding, the meta tokens, its own tokens.

    The meta tokens come right before a prompt's first token, so that nothing stands between them and it, for the
    recurrence least of all. Column c of the prompt is column `meta` + c of the layers, wherever there is a token.

    Attributes:
        meta: Number of meta tokens.
        before: Columns that a cache holds, meta tokens included.
        length: Columns of this forward, meta tokens included if it begins with them.
        starts: Padding of each prompt, `(b,)`, or ``None`` where there is none.
        real: Columns held and new that are no padding, `(b, before + length)`, or ``None`` if all are.
    """

    def __init__(self, meta: int, before: int, tokens: int, attention_mask: Int[Tensor, "b keys"] | None) -> None:
        """
        Args:
            meta: Number of meta tokens.
            before: Columns that a cache holds, meta tokens included.
            tokens: Tokens of this forward.
            attention_mask: 1 for a token, 0 for padding; of the tokens that the cache holds, and of the new ones.

        Raises:
            BadInput: For a mask of another shape, or padding between tokens that the recurrence has gone through.
        """
        self.meta = meta
        self.before = before
        self.length = tokens + (0 if before else meta)
        self.starts = self.real = None
        if attention_mask is None:
            return
        total = before + self.length - meta
        if attention_mask.dim() != 2 or attention_mask.shape[1] != total:
            raise BadInput(
                f"attention_mask is (b, {total}) here: 1 for a token, 0 for padding, for the {total - tokens} tokens "
                f"that the cache holds and the {tokens} new ones, meta tokens left out; this one is "
                f"{tuple(attention_mask.shape)}."
            )
        mask = attention_mask.bool()
        if mask.all():
            return
        past = mask[:, : total - tokens]
        if before and (past[:, :-1] & ~past[:, 1:]).any():
            raise BadInput(
                "attention_mask has padding after a token that the cache holds, and a recurrent state has gone through "
                "it; pad on the left."
            )
        self.starts = (mask.cumsum(1) == 0).sum(1)
        self.real = self.inserted(mask, torch.ones(meta, dtype=torch.bool, device=mask.device))

    def check_begun(self) -> None:
        """Refuse to leave meta tokens in a cache before more padding: a recurrent state would go through it.

        Raises:
            BadInput: If the forward begins a prompt without any of its tokens.
        """
        if self.meta and not self.before and self.starts is not None and (self.starts + self.meta == self.length).any():
            raise BadInput(
                f"A prompt is padding alone in the first {self.length - self.meta} columns, and a cache is to go on "
                "from there; begin with so many that each prompt has a token."
            )

    def inserted(self, values: Tensor, meta: Tensor) -> Tensor:
        """The prompts' `values` `(b, t, ...)` with `meta` `(m, ...)` put before each prompt's first token."""
        rows = meta.expand(len(values), *meta.shape)
        both = torch.cat([rows, values], 1)
        if self.starts is None:
            return both
        column = torch.arange(both.shape[1], device=both.device)[None]
        starts = self.starts[:, None]
        source = torch.where(column < starts, column + self.meta, column)
        source = torch.where((column >= starts) & (column < starts + self.meta), column - starts, source)
        return both[torch.arange(len(both), device=both.device)[:, None], source]

    def positions(self, device: torch.device, position_ids: Int[Tensor, "#b t"] | None) -> Int[Tensor, "#b columns"]:
        """The position of every column of this forward: the meta tokens' from 0, then the tokens'.

        Args:
            device: Where.
            position_ids: The tokens' positions, counted from 0 without meta tokens; ``None``: as they come.
        """
        if position_ids is None:
            if self.real is None:
                return torch.arange(self.before, self.before + self.length, device=device)[None]
            return (self.real.cumsum(1) - 1).clamp(min=0)[:, self.before :]
        if self.before:
            return position_ids + self.meta
        if self.starts is not None:
            position_ids = position_ids.expand(len(self.starts), -1)
        return self.inserted(position_ids + self.meta, torch.arange(self.meta, device=position_ids.device))

    def visible(self, device: torch.device, window: int | None) -> Bool[Tensor, "#b 1 t keys"]:
        """Which keys, held or new, every column of this forward attends to.

        Those up to itself; with a window, of those the last `window` before it, itself, and the meta tokens.
        """
        keys = torch.arange(self.before + self.length, device=device)
        queries = keys[self.before :, None]
        seen = (keys <= queries)[None]
        if window is not None:
            starts = torch.zeros(1, dtype=torch.long, device=device) if self.starts is None else self.starts
            offset = keys - starts[:, None]
            is_meta = (offset >= 0) & (offset < self.meta)
            seen = seen & ((queries - keys <= window)[None] | is_meta[:, None])
        if self.real is not None:
            seen = seen & self.real[:, None]
        return seen[:, None]

    @property
    def padding(self) -> Bool[Tensor, "b t"] | None:
        """Columns of this forward that are no padding, or ``None`` if all are."""
        return None if self.real is None else self.real[:, self.before :]


def rotations(
    config: HymbaConfig, positions: Int[Tensor, "#b t"], dtype: torch.dtype
) -> tuple[Float[Tensor, "#b 1 t p"], Float[Tensor, "#b 1 t p"]]:
    """Cosine and sine of the rotary embedding (Su et al. 2021, arXiv:2104.09864), in float32 and then cast."""
    width, base = config.head_dim, config.rope_theta
    if config.rope_type == "ntk":
        assert config.orig_max_position_embeddings is not None  # the configuration has checked it
        longer = 2 * config.max_position_embeddings / config.orig_max_position_embeddings - 1
        base = base * longer ** (width / (width - 2))
    even = torch.arange(0, width, 2, dtype=torch.int64, device=positions.device).float()
    angles = positions[:, None, :, None].float() * (1.0 / base ** (even / width))
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Float[Tensor, "b h t p"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b h t p"]:
    """Queries or keys turned by their position: number i of the first half of a head with number i of the second."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
