"""AbsTopK sparse autoencoders (arXiv:2510.00404): the k pre-activations that are largest in size, with their sign.

A feature is then one axis of two directions, such as "formal" and "informal", where other kinds need two features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from circuitbench.dictionaries.building import from_weights
from circuitbench.dictionaries.selection import top_k
from circuitbench.dictionaries.sparse import SparseCode, Support
from circuitbench.dictionaries.topk import TopK

if TYPE_CHECKING:
    from jaxtyping import Float

    from circuitbench.dictionaries.base import Dictionary


class AbsTopK(TopK):
    """encode(x) = the k entries of (x − b_dec) @ W_enc + b_enc that are largest in absolute value, all others 0."""

    kind: ClassVar[str] = "abstopk"
    signed: ClassVar[bool] = True

    def encode_sparse(self, x: Float[Tensor, "n d_in"], weights: Tensor | None = None) -> SparseCode:
        """The k features of each row and their activations, differentiable once in x and the parameters.

        Args:
            weights: `(d_dict,)`, not negative; features are chosen by weight · |pre-activation|, where given.
        """
        x = self._checked(x)
        with torch.no_grad():
            scores = self.preactivations(x)
            sizes = scores.abs() if weights is None else scores.abs() * weights
            indices = top_k(sizes, self.k)[1]
            values = scores.gather(1, indices)
        support = Support.of_indices(indices, self.d_dict)
        return SparseCode(self.chosen_preactivations(x, values.flatten(), support), support)

    def two_sided(self) -> Dictionary:
        """The same function as a "topk" dictionary with 2 · d_dict features, none of which is ever negative.

        Feature i is the positive side of feature i, and feature i + d_dict the negative one, its activation with the
        sign turned and its direction too. For what looks at one direction at a time, such as feature examples.
        """
        W_enc, b_enc, W_dec = self.W_enc.detach(), self.b_enc.detach(), self.W_dec.detach()
        sides = from_weights(
            "topk",
            W_enc=torch.cat([W_enc, -W_enc], dim=1),
            b_enc=torch.cat([b_enc, -b_enc]),
            W_dec=torch.cat([W_dec, -W_dec]),
            b_dec=self.b_dec.detach(),
            W_skip=None if self.W_skip is None else self.W_skip.detach(),
            transcodes=self.transcodes,
            blocks=self.blocks,
            k=self.k,
        )
        sides.site, sides.site_out, sides.model_name = self.site, self.site_out, self.model_name
        if "block_scales" in self.metadata:
            sides.metadata["block_scales"] = list(self.metadata["block_scales"])
        return sides.requires_grad_(False).eval()
