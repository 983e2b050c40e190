"""Transcoders, from one site of a model to another; crosscoders, over several sites of one model or of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..activations import ActivationStream, StoredActivations, name_of, source_of
from ..errors import BadInput
from .base import Dictionary
from .on_model import one_site, train_on_text
from .training import train

if TYPE_CHECKING:
    from ..activations.text import Text
    from ..models import Model

    Source = Text | ActivationStream | StoredActivations


def train_transcoder(
    model: Model, site: str, site_out: str, text: Source, *, kind: str = "topk", skip: bool = False, **settings: Any
) -> Dictionary:
    """Train a transcoder: sparse features of one site that reconstruct what another holds at the same token.

    Args:
        model: The model.
        site: What is read, such as ``"layers.5.mlp.in"``.
        site_out: What is reconstructed, such as ``"layers.5.mlp.out"``; of any width.
        text: As for `train_sae`.
        kind: "topk", "jumprelu", …: see `dictionaries.build`.
        skip: Whether there is a linear path beside the features (Paulo et al. 2025, arXiv:2501.18823).
        **settings: Of `train_sae`.

    Raises:
        SiteNotFound, BadInput: As `train_sae`; a `site_out` that is `site`.
    """
    if one_site(model, site) == one_site(model, site_out):
        raise BadInput(
            f"site and site_out are both {one_site(model, site)}; a transcoder has two, train_sae takes one."
        )
    return train_on_text(model, text, site=site, site_out=site_out, kind=kind, skip=skip, **settings).dictionary


def train_crosscoder(
    sites: Sequence[tuple[Model, str]],
    text: Text,
    *,
    kind: str = "topk",
    expansion: int | None = None,
    d_dict: int | None = None,
    context: int | None = None,
    prompts_per_forward: int | None = None,
    column: str | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Dictionary:
    """Train a crosscoder: one set of sparse features for several sites, of one model or of several, at the same tokens.

    How much of a feature lies at which site says `Dictionary.block_norms`. Activations are kept in memory.

    Args:
        sites: (model, site) of each block. Models must cut text into the same tokens.
        text: As for `train_sae`, but read once for each model: no iterator, where there are several.
        kind: "topk", "batchtopk", …: see `dictionaries.build`.
        expansion: d_dict / d_in, where d_in is that of all sites together; 8 where neither it nor `d_dict` is given.
        d_dict: Number of features.
        context: As for `train_sae`.
        prompts_per_forward: As for `train_sae`.
        column: As for `train_sae`.
        seed: Of the initial directions and the order of rows.
        progress: Show progress bars.
        **settings: Of `dictionaries.train`: steps, batch_size, k, l0, lr, …

    Returns:
        The dictionary. Its `blocks` are addresses; with several models, each is "name: address", the names numbered
        where two models have the same.

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: Fewer than two sites, models that see different tokens, an iterator for several models.
    """
    if len(sites) < 2:
        raise BadInput(f"{len(sites)} sites were given; a crosscoder has two or more: [(model, site), (model, site)].")
    models = list({id(model): model for model, _ in sites}.values())
    if len(models) > 1 and isinstance(text, Iterator):
        raise BadInput("an iterator can be read once, and each model reads the text; give a list.")
    labels = {id(model): label for model, label in zip(models, labels_of(models), strict=True)}
    reading = {"context": context, "sequences_per_forward": prompts_per_forward, "column": column, "progress": progress}
    blocks: dict[tuple[int, str], Tensor] = {}
    ids: Tensor | None = None
    for model in models:
        own = list(dict.fromkeys(one_site(model, site) for other, site in sites if other is model))
        parts = list(source_of(model, own, text, **reading))
        read = torch.cat([rows.token_ids for rows in parts])
        if ids is not None and not torch.equal(ids, read):
            raise BadInput(
                f"{labels[id(model)]} sees other tokens than {labels[id(models[0])]} in the same text; a crosscoder "
                "needs models with one tokenizer."
            )
        ids = read
        blocks |= {(id(model), address): torch.cat([rows[address] for rows in parts]).float() for address in own}
    wanted = list(dict.fromkeys((id(model), one_site(model, site)) for model, site in sites))
    if len(wanted) != len(sites):
        raise BadInput("a site was given twice; a crosscoder's sites are different ones.")
    named = {
        (f"{labels[key]}: {address}" if len(models) > 1 else address): blocks[key, address] for key, address in wanted
    }
    if d_dict is None and expansion is None:
        expansion = 8
    result = train(
        named,
        sites=list(named),
        kind=kind,
        expansion=expansion,
        d_dict=d_dict,
        seed=seed,
        progress=progress,
        **settings,
    )
    result.dictionary.model_name = " + ".join(labels.values())
    return result.dictionary


def labels_of(models: Sequence[Model]) -> list[str]:
    """The models' names, numbered where they are not different."""
    names = [name_of(model) for model in models]
    return names if len(set(names)) == len(names) else [f"{name} {i}" for i, name in enumerate(names, 1)]
