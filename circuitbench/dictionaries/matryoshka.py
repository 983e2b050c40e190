"""Matryoshka BatchTopK (Bussmann et al. 2025, arXiv:2503.17547): the first features alone have to reconstruct, too.

A dictionary in a dictionary in a dictionary: the loss is the mean over `prefixes` of the error of the reconstruction by
the features before that index. General features come first, and are not absorbed into their special cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from circuitbench.dictionaries import losses, sparse
from circuitbench.dictionaries.base import Objective, Step
from circuitbench.dictionaries.batchtopk import BatchTopK
from circuitbench.dictionaries.sparse import SparseCode, Support
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float

_HALVINGS = 4


class Matryoshka(BatchTopK):
    """As `BatchTopK`; only training differs.

    Attributes:
        prefixes: sizes of the nested dictionaries, ascending; the last is d_dict. By default d_dict / 16, / 8, / 4,
            / 2 and d_dict.
    """

    kind: ClassVar[str] = "matryoshka"
    settings_names: ClassVar[tuple[str, ...]] = ("k", "prefixes")

    def __init__(self, *, k: int, prefixes: Sequence[int], **sizes: Any):
        super().__init__(k=k, **sizes)
        self.prefixes = tuple(prefixes)
        ascending = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes, strict=False))
        if not ascending or self.prefixes[-1:] != (self.d_dict,):
            raise BadInput(
                f"prefixes={self.prefixes} were given; they are sizes in ascending order, the last one d_dict = "
                f"{self.d_dict}."
            )

    @classmethod
    def default_settings(cls, d_dict: int) -> dict[str, Any]:
        """Each prefix half of the next one."""
        halves = {d_dict // 2**power for power in range(_HALVINGS + 1)} - {0}
        return {"prefixes": tuple(sorted(halves))}

    def nested_reconstructions(self, x: Float[Tensor, "n d_in"], code: SparseCode) -> Float[Tensor, "n prefixes d_out"]:
        """The reconstruction by each prefix of the features, at the cost of one."""
        n, levels = code.n, len(self.prefixes)
        ends = torch.tensor(self.prefixes, device=code.columns.device)
        # Columns ascend in a row, so the entries between two prefixes lie together: a row of their own.
        rows = code.rows * levels + torch.bucketize(code.columns, ends, right=True)
        counts = torch.bincount(rows, minlength=n * levels)
        support = Support(code.columns, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), self.d_dict)
        parts = sparse.decode(SparseCode(code.values, support), self.W_dec).view(n, levels, self.d_out)
        offset = self.offset(x)
        return parts.cumsum(1) + (offset if offset.ndim == 1 else offset[:, None])

    def objective(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], step: Step) -> Objective:
        """The mean of the errors of all prefixes, and AuxK for the dead features."""
        weights = self.W_dec.detach().norm(dim=1) if step.decoder_norm == "free" else None
        code = self.encode_batch(x, weights)
        nested = self.nested_reconstructions(x, code).unbind(1)
        loss = torch.stack([losses.error(self, target, one, step) for one in nested]).mean()
        return losses.with_auxk(self, x, target, code, nested[-1], loss, step)
