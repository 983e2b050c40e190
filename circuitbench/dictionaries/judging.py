"""Dictionaries judged on a model: what they leave unexplained, what running on them costs.

Held-out text is read as training text is (`ActivationStream`). Special tokens take part in the model's run and nowhere
else: dictionaries are not judged on them, and in spliced runs they keep their own activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import tee
from typing import TYPE_CHECKING, Any

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
from .reporting import to_dict, to_saebench
from .splice_run import check_widths, places

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

    def to_dict(self) -> dict[str, Any]:
        """Every number by its name, as JSON takes it; what is not defined is None."""
        return to_dict(self.reconstruction, self.splice)

    def to_saebench(self) -> dict[str, dict[str, float | int]]:
        """The core measures under SAEBench's names and in its groups; see `reporting.to_saebench`.

        Raises:
            BadInput: If replacing the site by zeros does not make the model worse.
        """
        return to_saebench(self.reconstruction, self.splice)

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
    site_out: str | None = None,
    context: int = 256,
    prompts_per_forward: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Judge a dictionary on held-out text: how well it reconstructs, and what the model loses by running on it.

    A transcoder is judged by the site it reconstructs, a crosscoder by all its sites, replaced at once.

    Args:
        dictionary: The dictionary.
        model: The model it was trained on.
        text: Text it was not trained on, as for `ActivationStream`; it is kept in memory as token ids, its activations
            are not.
        site: Where it belongs; default: the site it was trained on.
        site_out: Where a transcoder writes; default: the site it was trained on.
        context: Tokens the model reads at once.
        prompts_per_forward: Sequences of that size a forward.
        progress: Show progress bars.

    Returns:
        FVU, L0, dead share and density; loss clean, spliced, with the site set to zero and to its mean over this text;
        the share of the loss recovered; KL. Each is defined in `dictionaries.evaluation`.

    Raises:
        BadInput: For a dictionary without a site, or of another size than the site; a text without tokens.
    """
    reading = HeldOut(dictionary, model, text, site, site_out, context, prompts_per_forward)
    rows = RowsOf(reading, progress)
    read, wanted = tee(rows)  # read side by side, so that one batch is held
    targets = (target for _, target in wanted) if dictionary.transcodes else None
    measured = reconstruction(dictionary, (x for x, _ in read), targets)
    return Evaluation(measured, spliced_losses(dictionary, reading, rows.mean, progress))


class HeldOut:
    """A text to judge a dictionary on, as the model reads it: token ids, of which activations are made as needed.

    Attributes:
        stream: Where activations come from.
        reads: The sites that the dictionary reads.
        writes: The sites that it reconstructs.
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
        site_out: str | None,
        context: int,
        prompts_per_forward: int,
    ) -> None:
        self.reads, self.writes = places(model, dictionary, site, site_out)
        sites = list(dict.fromkeys([*self.reads, *self.writes]))
        self.stream = ActivationStream(model, sites, text, context=context, sequences_per_forward=prompts_per_forward)
        widths = self.stream.widths()
        d_read, d_written = (sum(widths[site] for site in sites) for sites in (self.reads, self.writes))
        check_widths(dictionary, d_read, d_written, self.reads, self.writes)
        self.batches = [ids for ids, _ in self.stream.forwards()]
        if not any(self.stream.kept(ids).any() for ids in self.batches):
            raise BadInput(NO_TOKENS)

    def activations(self, ids: Int[Tensor, "b t"]) -> tuple[Float[Tensor, "b t d_in"], Float[Tensor, "b t d_out"]]:
        """What is read and what is reconstructed, for a batch, one row a token."""
        found = self.stream.read(ids)
        x, target = (torch.cat([found[site] for site in sites], 2) for sites in (self.reads, self.writes))
        return x, target

    def changes(self, values: Float[Tensor, "*bt d_out"], ids: Int[Tensor, "b t"]) -> list[Set]:
        """The reconstructed sites set to some values at all tokens that are not special."""
        shapes = [self.stream.shapes()[site] for site in self.writes]
        parts = values.split([self.stream.widths()[site] for site in self.writes], dim=-1)
        keep = self.stream.kept(ids)
        return [
            Set(site, part.unflatten(-1, shape) if len(shape) > 1 else part, positions=keep)
            for site, part, shape in zip(self.writes, parts, shapes, strict=True)
        ]


class RowsOf:
    """(rows that are read, rows that are reconstructed), batch by batch, at tokens that are not special.

    Attributes:
        n: Rows that have been read.
        total: Sum of what is reconstructed.
    """

    def __init__(self, text: HeldOut, progress: bool) -> None:
        self.text = text
        self.progress = progress
        self.n = 0
        self.total: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]]:
        self.n, self.total = 0, None
        for ids in tqdm(self.text.batches, disable=not self.progress, desc="activations", unit="batch"):
            keep = self.text.stream.kept(ids)
            x, target = (part[keep] for part in self.text.activations(ids))
            summed = target.sum(0, dtype=torch.float64)
            self.total = summed if self.total is None else self.total + summed
            self.n += len(x)
            yield x, target

    @property
    def mean(self) -> Float[Tensor, " d_out"]:
        """Of the rows that have been reconstructed."""
        assert self.total is not None  # they have been
        return (self.total / self.n).float()


def spliced_losses(dictionary: Dictionary, text: HeldOut, mean: Float[Tensor, " d_out"], progress: bool) -> Splice:
    """The model's losses as it is, on the reconstruction, and with what is reconstructed set to zero or its mean."""
    model = text.stream.model
    held: dict[str, Tensor] = {}

    def clean(batch: Batch) -> Tensor:
        found = forward(model, encode(model, batch[0]), sites=text.reads)
        # A site with several axes is to a dictionary one row a token.
        held["x"] = torch.cat([found[site].flatten(2) for site in text.reads], 2)
        return found["logits"].cpu()

    def changed(batch: Batch, values: Tensor) -> Tensor:
        return forward(model, encode(model, batch[0]), text.changes(values, batch[0]))["logits"].cpu()

    batches = tqdm(text.batches, disable=not progress, desc="splice", unit="batch")
    return splice(
        ((ids, torch.ones_like(ids, dtype=torch.bool)) for ids in batches),
        clean=clean,
        spliced=lambda batch: changed(batch, dictionary(held["x"])),
        ablated={
            "zero": lambda batch: changed(batch, torch.zeros_like(mean)),
            "mean": lambda batch: changed(batch, mean),
        },
    )
