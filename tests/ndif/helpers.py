"""A module the server does not have: what it needs travels with the request."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def unit(x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    return x / norm(x)


def norm(x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 1"]:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


class View:
    """Reads and writes a block's output."""

    def __init__(self, block) -> None:
        self.block = block

    @property
    def normed(self) -> Float[Tensor, "b t d"]:
        return unit(self.block.output)

    @normed.setter
    def normed(self, value: Float[Tensor, "b t d"]) -> None:
        self.block.output = value


def imports_functools() -> None:
    import functools

    functools.reduce(max, [1])
