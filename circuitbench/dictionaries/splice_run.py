"""A run of the model on a dictionary's reconstruction of a site, with or without what the dictionary leaves over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitbench.dictionaries.base import Dictionary
from circuitbench.errors import BadInput
from circuitbench.tracing import Set, capture, intervene, resolve
from circuitbench.tracing.features import site_of, write_site_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from circuitbench.models import Model
    from circuitbench.models.prompts import Prompts
    from circuitbench.tracing.selection import Positions


@dataclass(frozen=True)
class Spliced:
    """A run on a reconstruction; past the end of a shorter prompt there is NaN.

    Attributes:
        logits: `(b, t, vocab)`, of the spliced run.
        clean_logits: `(b, t, vocab)`, of the model as it is.
        features: `(b, t, d_dict)`, what the encoder makes of the clean run, before any edit.
        error: `(b, t, d_out)`, what the reconstruction leaves over there: site − reconstruction.
        lengths: real tokens of each prompt.
    """

    logits: Float[Tensor, "b t vocab"]
    clean_logits: Float[Tensor, "b t vocab"]
    features: Float[Tensor, "b t d_dict"]
    error: Float[Tensor, "b t d_out"]
    lengths: Int[Tensor, " b"]


@torch.no_grad()
def splice(
    model: Model,
    dictionary: Dictionary,
    prompts: Prompts,
    *,
    keep_error: bool = True,
    edit: Callable[[Tensor], Tensor] | None = None,
    positions: Positions = None,
    site: str | None = None,
    site_out: str | None = None,
) -> Spliced:
    """Run prompts with a site replaced by its reconstruction from (edited) features.

    The site becomes decode(f') + error, where f' = edit(f). With the error kept and no edit the model's logits stay
    what they are; with an edit the site moves by (f' − f)·W_dec. `evaluate` measures the run without the error. To edit
    a few features by name, also while generating, use `cb.Feature` in an intervention.

    Args:
        model: the model.
        dictionary: the dictionary; a transcoder's reconstruction goes to the site it writes, a crosscoder's to all its
            sites at once.
        prompts: what to run (see `prompts.encode`).
        keep_error: whether what the reconstruction leaves over in the clean run is added.
        edit: from the features of all real tokens `(n, d_dict)` to others of the same shape.
        positions: where the site is replaced; default: everywhere.
        site: where the dictionary reads; default: the site it was trained on.
        site_out: where a transcoder writes; default: the site it was trained on.

    Raises:
        BadInput: a dictionary without a site or of another size, or an edit that changes the shape.
    """
    reads, writes = places(model, dictionary, site, site_out)
    found = capture(model, prompts, [*dict.fromkeys([*reads, *writes]), "logits"])
    lengths = found.lengths
    real = torch.arange(found["logits"].shape[1]) < lengths[:, None]
    x, target = (rows_at(found, addresses, real) for addresses in (reads, writes))
    check_widths(dictionary, x.shape[1], target.shape[1], reads, writes)
    x = x.to(dictionary.W_enc)
    code = dictionary.encode_sparse(x)
    features, estimate = code.to_dense(), dictionary.reconstruct(x, code)
    error = target.to(estimate) - estimate
    value = estimate
    if edit is not None:
        edited = edit(features.clone())
        if edited.shape != features.shape:
            raise BadInput(
                f"edit was given features of shape {tuple(features.shape)} and returned {tuple(edited.shape)}; "
                "it must return the same shape."
            )
        value = estimate + (edited.to(features) - features) @ dictionary.W_dec
    if keep_error:
        value = value + error

    def laid_out(rows: Tensor) -> Tensor:
        out = rows.new_full((*real.shape, rows.shape[1]), torch.nan)
        out[real.to(rows.device)] = rows
        return out

    whole = laid_out(value)
    widths = [found[address][0, 0].numel() for address in writes]
    changes = [
        Set(address, part.reshape(found[address].shape).to(found[address]), positions=positions)
        for address, part in zip(writes, whole.split(widths, dim=2), strict=True)
    ]
    spliced = intervene(model, prompts, changes)
    return Spliced(spliced.logits, found["logits"], laid_out(features), laid_out(error), lengths)


def places(model: Model, dictionary: Dictionary, site: str | None, site_out: str | None) -> tuple[list[str], list[str]]:
    """The addresses that a dictionary reads, and those that it reconstructs.

    Raises:
        BadInput: for a dictionary that does not know them, or where a name stands for several.
    """
    if dictionary.blocks:
        if site is not None or site_out is not None:
            raise BadInput(f"a crosscoder's sites are {', '.join(dictionary.blocks)}; leave out site and site_out.")
        return list(dictionary.blocks), list(dictionary.blocks)
    return sites_read(model, dictionary, site), [_one(model, write_site_of(dictionary, site, site_out))]


def sites_read(model: Model, dictionary: Dictionary, site: str | None) -> list[str]:
    """The addresses that a dictionary reads.

    Raises:
        BadInput: for a dictionary that does not know them, or where a name stands for several.
    """
    if dictionary.blocks and site is None:
        return list(dictionary.blocks)
    return [_one(model, site_of(dictionary, site))]


def _one(model: Model, site: str) -> str:
    addresses = resolve(model, site)
    if len(addresses) != 1:
        raise BadInput(
            f"{site} stands for {len(addresses)} sites; a dictionary belongs to one, such as {addresses[0]}."
        )
    return addresses[0]


def rows_at(found: dict[str, Tensor], addresses: list[str], real: Tensor) -> Tensor:
    """What some sites hold at the real tokens, one after the other in a row."""
    return torch.cat([found[address].flatten(2)[real.to(found[address].device)] for address in addresses], dim=1)


def check_widths(dictionary: Dictionary, d_read: int, d_written: int, reads: list[str], writes: list[str]) -> None:
    """Refuse a dictionary of other sizes than its sites."""
    if (dictionary.d_in, dictionary.d_out) != (d_read, d_written):
        written = "" if reads == writes else f", {', '.join(writes)} has {d_written}"
        raise BadInput(
            f"The dictionary is from {dictionary.d_in} to {dictionary.d_out}, and {', '.join(reads)} has {d_read} "
            f"components{written}; give the model and site it was trained on."
        )
