"""Dictionaries judged on a model: what they leave unexplained, what running on them costs.

Held-out text is read as training text is (`ActivationStream`). Special tokens take part in the model's run and nowhere
else: dictionaries are not judged on them, and in spliced runs they keep their own activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..activations import ActivationStream
from ..activations.stream import NO_TOKENS
from ..errors import BadInput
from ..models.prompts import encode
from ..tracing.forward import forward
from ..tracing.interventions import Set
from .base import Dictionary
from .evaluation import Batch, Reconstruction, Splice, reconstruction, splice
from .on_model import one_site

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from ..activations.text import Text
    from ..models import Model


@dataclass(frozen=True)
class Evaluation:
    """How good a dictionary is on held-out text.

    Attributes:
        reconstruction: What it leaves unexplained of the activations: FVU, L0, dead share, density, …
        splice: What running on the reconstruction costs the model: losses and KL.
    """

    reconstruction: Reconstruction
    splice: Splice

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
        return self.reconstruction.fvu

    @property
    def l0(self) -> float:
        """Features active on a token, the mean."""
        return self.reconstruction.l0

    @property
    def dead_share(self) -> float:
        """Share of the features that are active on no token of this text."""
        return self.reconstruction.dead_share

    @property
    def density(self) -> Float[Tensor, " d_dict"]:
        """Share of tokens on which each feature is active."""
        return self.reconstruction.density

    @property
    def ce_clean(self) -> float:
        """The model's mean loss a token, in nats."""
        return self.splice.ce_clean

    @property
    def ce_spliced(self) -> float:
        """The loss with the site replaced by its reconstruction."""
        return self.splice.ce_spliced

    @property
    def ce_ablated(self) -> Mapping[str, float]:
        """The loss with the site replaced by "zero", and by its "mean" over this text."""
        return self.splice.ce_ablated

    def ce_recovered(self, ablation: str = "zero") -> float:
        """(CE ablated − CE spliced) / (CE ablated − CE clean): 1 if the reconstruction costs nothing.

        Raises:
            BadInput: If the ablation does not make the model worse: a share of nothing is not defined.
        """
        return self.splice.recovered(ablation)

    @property
    def kl(self) -> float:
        """KL(clean ‖ spliced) of next-token distributions, in nats, mean over tokens."""
        return self.splice.kl

    def __str__(self) -> str:
        ablated = ", ".join(f"{name} {loss:.3f}" for name, loss in self.ce_ablated.items())
        return (
            f"FVU {self.fvu:.3f}, L0 {self.l0:.1f}, dead {self.dead_share:.1%}; "
            f"CE clean {self.ce_clean:.3f}, spliced {self.ce_spliced:.3f}, {ablated} nats; KL {self.kl:.3f}"
        )


def evaluate(
    dictionary: Dictionary,
    model: Model,
    text: Text,
    *,
    site: str | None = None,
    context: int = 256,
    prompts_per_forward: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Judge a dictionary on held-out text: how well it reconstructs, and what the model loses by running on it.

    Args:
        dictionary: The dictionary.
        model: The model it was trained on.
        text: Text it was not trained on, as for `ActivationStream`; it is kept in memory as token ids, its activations
            are not.
        site: Where it belongs; default: the site it was trained on.
        context: Tokens the model reads at once.
        prompts_per_forward: Sequences of that size a forward.
        progress: Show progress bars.

    Returns:
        FVU, L0, dead share and density; loss clean, spliced, with the site set to zero and to its mean over this text;
        the share of the loss recovered; KL. Each is defined in `dictionaries.evaluation`.

    Raises:
        BadInput: For a dictionary without a site, or of another size than the site; a text without tokens.
    """
    reading = HeldOut(dictionary, model, text, site, context, prompts_per_forward)
    rows = reading.rows(progress)
    measured = reconstruction(dictionary, rows)
    return Evaluation(measured, spliced_losses(dictionary, reading, rows.mean, progress))


class HeldOut:
    """A text to judge a dictionary on, as the model reads it: token ids, of which activations are made as needed.

    Attributes:
        stream: Where activations come from.
        address: The site.
        batches: `(b, t)` token ids, one a forward.

    Raises:
        BadInput: For a dictionary without a site or of another size, or a text without tokens.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        model: Model,
        text: Text,
        site: str | None,
        context: int,
        prompts_per_forward: int,
    ) -> None:
        address = one_site(model, site_of(dictionary, site))
        self.stream = ActivationStream(model, address, text, context=context, sequences_per_forward=prompts_per_forward)
        self.address = address
        check_size(dictionary, self.stream.widths()[address], address)
        self.batches = [ids for ids, _ in self.stream.forwards()]
        if not any(self.stream.kept(ids).any() for ids in self.batches):
            raise BadInput(NO_TOKENS)

    def activations(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """What the site holds for a batch, one row a token."""
        return self.stream.read(ids)[self.address]

    def rows(self, progress: bool) -> RowsOf:
        """The site at every token that is not special."""
        return RowsOf(self, progress)


class RowsOf:
    """Activations, batch by batch, whose mean is known when they have been read."""

    def __init__(self, text: HeldOut, progress: bool) -> None:
        self.text = text
        self.progress = progress
        self.n = 0
        self.total: Tensor | None = None

    def __iter__(self) -> Iterator[Float[Tensor, "n d"]]:
        self.n, self.total = 0, None
        for ids in tqdm(self.text.batches, disable=not self.progress, desc="activations", unit="batch"):
            rows = self.text.activations(ids)[self.text.stream.kept(ids)]
            summed = rows.sum(0, dtype=torch.float64)
            self.total = summed if self.total is None else self.total + summed
            self.n += len(rows)
            yield rows

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Of the rows that have been read."""
        assert self.total is not None  # they have been
        return (self.total / self.n).float()


def spliced_losses(dictionary: Dictionary, text: HeldOut, mean: Float[Tensor, " d"], progress: bool) -> Splice:
    """The model's losses as it is, on the reconstruction, and with the site set to zero or to its mean."""
    model, address = text.stream.model, text.address
    held: dict[str, Tensor] = {}

    def clean(batch: Batch) -> Tensor:
        found = forward(model, encode(model, batch[0]), sites=[address])
        held["x"] = found[address]
        return found["logits"].cpu()

    def changed(batch: Batch, value: Tensor) -> Tensor:
        change = Set(address, value, positions=text.stream.kept(batch[0]))
        return forward(model, encode(model, batch[0]), change)["logits"].cpu()

    def reconstructed(x: Tensor) -> Tensor:
        # A site with several axes is to a dictionary one row a token.
        return dictionary(x.flatten(2)).reshape(x.shape)

    batches = tqdm(text.batches, disable=not progress, desc="splice", unit="batch")
    return splice(
        ((ids, torch.ones_like(ids, dtype=torch.bool)) for ids in batches),
        clean=clean,
        spliced=lambda batch: changed(batch, reconstructed(held["x"])),
        ablated={
            "zero": lambda batch: changed(batch, torch.zeros(())),
            "mean": lambda batch: changed(batch, mean.reshape(held["x"].shape[2:])),
        },
    )


def site_of(dictionary: Dictionary, site: str | None) -> str:
    """Where a dictionary belongs."""
    site = site or dictionary.site
    if site is None:
        raise BadInput('This dictionary does not know its site; name it, for example site="layers.3.ssm.gated".')
    return site


def check_size(dictionary: Dictionary, d_site: int, address: str) -> None:
    """A dictionary replaces a site by something of the same size."""
    if dictionary.d_in != d_site or dictionary.d_out != d_site:
        raise BadInput(
            f"The dictionary is from {dictionary.d_in} to {dictionary.d_out}, and {address} has {d_site} components; "
            "give the model and site it was trained on."
        )
