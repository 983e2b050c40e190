"""TopK sparse autoencoders (Gao et al. 2024, arXiv:2406.04093): the k largest pre-activations, after a ReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from circuitbench.dictionaries import sparse
from circuitbench.dictionaries.base import Dictionary
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class TopK(Dictionary):
    """encode(x) = relu(the k largest entries of (x − b_dec) @ W_enc + b_enc), all others 0."""

    kind: ClassVar[str] = "topk"
    settings_names: ClassVar[tuple[str, ...]] = ("k",)

    def __init__(self, *, d_in: int, d_dict: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__(d_in=d_in, d_dict=d_dict, dtype=dtype, seed=seed)
        if not 1 <= k <= d_dict:
            raise BadInput(f"k={k} was given; it must lie between 1 and d_dict = {d_dict}.")
        self.k = k

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> sparse.SparseCode:
        """The code of each row as its k features and their activations, differentiable once in x and the parameters."""
        return sparse.encode_top_k(self._checked(x), self.W_enc, self.b_enc, self.b_dec, self.k)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_dict"]:
        """The activation of every feature, in the dictionary's dtype."""
        rows = self._checked(x).reshape(-1, self.d_in)
        return self.encode_sparse(rows).to_dense().reshape(*x.shape[:-1], self.d_dict)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of x, in x's dtype."""
        rows = self._checked(x).reshape(-1, self.d_in)
        return self.decode(self.encode_sparse(rows)).reshape(*x.shape[:-1], self.d_out).to(x.dtype)

    def preactivations(
        self, x: Float[Tensor, "n d_in"], features: Int[Tensor, " some"] | None = None
    ) -> Float[Tensor, "n some"]:
        """(x − b_dec) @ W_enc + b_enc, of all features or of those listed."""
        W_enc, b_enc = (
            (self.W_enc, self.b_enc) if features is None else (self.W_enc.T[features].T, self.b_enc[features])
        )
        return torch.addmm(b_enc, self._checked(x) - self.b_dec, W_enc)
