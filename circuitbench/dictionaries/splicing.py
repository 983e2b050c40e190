"""What it costs a model to run on a dictionary's reconstruction; `dictionaries.evaluation` defines the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Splice:
    """What it costs the model to run on a reconstruction of a site; the module's docstring defines every number.

    Attributes:
        n_tokens: predicted tokens they were measured on.
        ce_ablated: the loss with the site replaced, by the name of the replacement.
        kl: of the clean next-token distributions from the spliced ones.
        kl_ablated: from those with the site replaced, by the name of the replacement.
    """

    n_tokens: int
    ce_clean: float
    ce_spliced: float
    ce_ablated: Mapping[str, float]
    kl: float
    kl_ablated: Mapping[str, float] = field(default_factory=dict)

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
    n_tokens = 0
    losses: dict[str, float] = dict.fromkeys(["clean", "spliced", *(f"ablated {name}" for name in ablated)], 0.0)
    kl = dict.fromkeys(list(losses)[1:], 0.0)
    for batch in batches:
        ids, mask = batch
        reference = clean(batch)
        n_tokens += int(_predicted(mask).sum())
        losses["clean"] += summed_cross_entropy(reference, ids, mask)
        for name, run in {"spliced": spliced, **{f"ablated {name}": run for name, run in ablated.items()}}.items():
            logits = run(batch)
            losses[name] += summed_cross_entropy(logits, ids, mask)
            kl[name] += summed_kl(reference, logits, mask)
    if n_tokens == 0:
        raise BadInput("the held-out text has no token to predict; give at least one prompt of two tokens.")
    losses, kl = ({name: value / n_tokens for name, value in sums.items()} for sums in (losses, kl))
    return Splice(
        n_tokens=n_tokens,
        ce_clean=losses["clean"],
        ce_spliced=losses["spliced"],
        ce_ablated={name: losses[f"ablated {name}"] for name in ablated},
        kl=kl["spliced"],
        kl_ablated={name: kl[f"ablated {name}"] for name in ablated},
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
