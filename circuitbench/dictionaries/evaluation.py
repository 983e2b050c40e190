"""How good a dictionary is: what it leaves unexplained of held-out activations, and what running on it costs the model.

Definitions, over the rows x of held-out activations with mean x̄ and reconstructions x̂:

* FVU, fraction of variance unexplained: Σ‖x − x̂‖² / Σ‖x − x̄‖². Explained variance is 1 − FVU.
* MSE: the mean of (x − x̂)² over rows and components.
* L0: active features a row, the mean; a feature is active where its activation is greater than 0. L1: the sum of a
  row's activations, the mean.
* Density of a feature: the share of rows on which it is active. Dead share: the share of features active on none.
* CE: the model's mean loss a token, in nats. CE recovered: (CE ablated − CE spliced) / (CE ablated − CE clean): 1 if
  running on the reconstruction costs nothing, 0 if it costs as much as replacing the site by zeros (or by its mean).
* KL: of the model's next-token distributions, clean from spliced, in nats, mean over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitbench.dictionaries.base import Dictionary
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Reconstruction:
    """How well a dictionary reconstructs held-out activations; the module's docstring defines every number.

    Attributes:
        n_rows: rows they were measured on.
        density: `(d_dict,)`, of every feature.
    """

    n_rows: int
    fvu: float
    mse: float
    l0: float
    l1: float
    dead_share: float
    density: Float[Tensor, " d_dict"]

    @property
    def explained_variance(self) -> float:
        """1 − FVU."""
        return 1.0 - self.fvu


@torch.no_grad()
def reconstruction(
    dictionary: Dictionary, activations: Tensor | Iterable[Tensor], *, batch_size: int = 4096
) -> Reconstruction:
    """Measure a dictionary on held-out activations: a tensor `(n, d_in)` or an iterable of them.

    Raises:
        BadInput: no rows, the wrong size, values that are not finite, or no variance to explain.
    """
    n_rows = 0
    error = l0 = l1 = 0.0
    device = dictionary.W_enc.device
    total, squares = torch.zeros(2, dictionary.d_in, dtype=torch.float64, device=device)
    fired = torch.zeros(dictionary.d_dict, dtype=torch.int64, device=device)
    for tensor in [activations] if isinstance(activations, Tensor) else activations:
        if tensor.ndim != 2:
            raise BadInput(
                f"activations have shape {tuple(tensor.shape)}; give rows (n, d_in), as `.flatten(0, -2)` makes them."
            )
        for rows in tensor.split(batch_size):
            x = rows.to(dictionary.W_enc)
            features = dictionary.encode(x)
            active = features > 0
            error += (x - dictionary.decode(features)).double().pow(2).sum().item()
            l0 += active.sum().item()
            l1 += features.double().sum().item()
            fired += active.sum(0)
            total += x.sum(0, dtype=torch.float64)
            squares += x.double().pow(2).sum(0)
            n_rows += len(x)
    if n_rows == 0:
        raise BadInput("there are no held-out activations; an iterator may have been read before.")
    variance = (squares - total**2 / n_rows).sum().item()
    if not variance > 0 or not error < float("inf"):
        raise BadInput("the held-out activations are all the same row, or not finite; nothing can be measured on them.")
    return Reconstruction(
        n_rows=n_rows,
        fvu=error / variance,
        mse=error / (n_rows * dictionary.d_in),
        l0=l0 / n_rows,
        l1=l1 / n_rows,
        dead_share=(fired == 0).double().mean().item(),
        density=(fired / n_rows).cpu(),
    )


@dataclass(frozen=True)
class Splice:
    """What it costs the model to run on a reconstruction of a site; the module's docstring defines every number.

    Attributes:
        n_tokens: predicted tokens they were measured on.
        ce_ablated: the loss with the site replaced, by the name of the replacement.
    """

    n_tokens: int
    ce_clean: float
    ce_spliced: float
    ce_ablated: Mapping[str, float]
    kl: float

    def recovered(self, ablation: str) -> float:
        """CE recovered against this ablation; BadInput if it was not measured or does not make the model worse."""
        if ablation not in self.ce_ablated:
            raise BadInput(
                f"ablation {ablation!r} was not measured; there are: {', '.join(map(repr, self.ce_ablated))}."
            )
        return recovered(self.ce_clean, self.ce_spliced, self.ce_ablated[ablation])


def recovered(ce_clean: float, ce_spliced: float, ce_ablated: float) -> float:
    """(CE ablated − CE spliced) / (CE ablated − CE clean); BadInput unless the ablation makes the model worse."""
    if not ce_ablated > ce_clean:
        raise BadInput(
            f"the ablation's loss {ce_ablated:.4f} is not above the clean one {ce_clean:.4f}: "
            "the site does not matter on this text, and a share of its loss is not defined."
        )
    return (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)


Batch = tuple[Tensor, Tensor]
"""Token ids and mask, both `(b, t)`; the mask is true at real tokens."""


@torch.no_grad()
def splice(
    batches: Iterable[Batch],
    *,
    clean: Callable[[Batch], Tensor],
    spliced: Callable[[Batch], Tensor],
    ablated: Mapping[str, Callable[[Batch], Tensor]],
) -> Splice:
    """Compare runs of a model; each is given as a function from a batch to logits `(b, t, vocab)`.

    Args:
        batches: held-out text.
        clean: the model as it is.
        spliced: with the site replaced by its reconstruction.
        ablated: by name, with the site replaced by something that carries no information, such as "zero" and "mean".

    Raises:
        BadInput: no batch has two real tokens in a row.
    """
    n_tokens, kl = 0, 0.0
    losses: dict[str, float] = dict.fromkeys(["clean", "spliced", *(f"ablated {name}" for name in ablated)], 0.0)
    for batch in batches:
        ids, mask = batch
        reference = clean(batch)
        n_tokens += int(_predicted(mask).sum())
        losses["clean"] += summed_cross_entropy(reference, ids, mask)
        logits = spliced(batch)
        losses["spliced"] += summed_cross_entropy(logits, ids, mask)
        kl += summed_kl(reference, logits, mask)
        for name, run in ablated.items():
            losses[f"ablated {name}"] += summed_cross_entropy(run(batch), ids, mask)
    if n_tokens == 0:
        raise BadInput("the held-out text has no token to predict; give at least one prompt of two tokens.")
    ce = {name: value / n_tokens for name, value in losses.items()}
    return Splice(
        n_tokens, ce["clean"], ce["spliced"], {name: ce[f"ablated {name}"] for name in ablated}, kl / n_tokens
    )


def _predicted(mask: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t-1"]:
    """Where both the token and the one it is predicted from are real."""
    return mask[:, 1:].bool() & mask[:, :-1].bool()


def summed_cross_entropy(
    logits: Float[Tensor, "b t vocab"], ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> float:
    """−log p(token | tokens before), summed over the real tokens but the first of each prompt, in nats."""
    keep = _predicted(mask)
    return F.cross_entropy(logits[:, :-1][keep].double(), ids[:, 1:][keep], reduction="sum").item()


def summed_kl(clean: Float[Tensor, "b t vocab"], other: Float[Tensor, "b t vocab"], mask: Bool[Tensor, "b t"]) -> float:
    """KL(clean ‖ other) of the next-token distributions, summed over the tokens that count in the loss, in nats."""
    keep = _predicted(mask)
    p, q = (logits[:, :-1][keep].double().log_softmax(-1) for logits in (clean, other))
    return F.kl_div(q, p, reduction="sum", log_target=True).item()
