"""Dictionaries trained on a model: from any text, stream or store of activations to dictionaries that know their site.

There is one way from text to activations, `activations.ActivationStream`: what it says about packing, special tokens
and sites with several axes holds here. Activations that fit into memory are computed once; more than that pass through
a shuffling pool, and the model runs again in each pass (`activations.RowBatches`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..activations import ActivationStream, RowBatches, StoredActivations, name_of, source_of
from ..errors import BadInput
from ..tracing.addresses import resolve
from .base import Dictionary
from .distributed import is_first
from .formats import hook_names
from .many import folders_of, names_of
from .training import TrainResult, train_many

if TYPE_CHECKING:
    from ..activations.text import Text
    from ..models import Model

    Source = Text | ActivationStream | StoredActivations


def train_sae(
    model: Model,
    site: str,
    text: Source,
    *,
    kind: str = "topk",
    k: int | None = None,
    expansion: int | None = None,
    d_dict: int | None = None,
    steps: int = 1000,
    context: int | None = None,
    prompts_per_forward: int | None = None,
    column: str | None = None,
    memory_gib: float = 2.0,
    remote: bool | str = False,
    progress: bool = True,
    **settings: Any,
) -> Dictionary:
    """Train a sparse autoencoder on what a site holds while the model reads a text.

    Args:
        model: The model.
        site: Address, such as ``"layers.5.ssm.gated"``. Of a site with several axes (heads, a state) all numbers of a
            token are one row.
        text: A text, as for `ActivationStream`: a string, a file, token ids, an iterable of such or of a data set's
            rows; or an `ActivationStream`; or `StoredActivations`.
        kind: "topk", "batchtopk", …: see `dictionaries.build`.
        k: Features active on a token, for kinds that fix their number; 32 if not given.
        expansion: d_dict / d_in; 8 where neither it nor `d_dict` is given.
        d_dict: Number of features.
        steps: Optimizer steps.
        context: Tokens the model reads at once; 256 if not given.
        prompts_per_forward: Sequences of that size a forward; 16 if not given.
        column: Of a data set: where its text is; "text" if not given.
        memory_gib: GiB of activations that may be held at once.
        remote: As for `capture`.
        progress: Show progress bars.
        **settings: Of `dictionaries.train`: batch_size, lr, seed, out, resume, …

    Returns:
        The dictionary, which knows its `site` and `model_name`; `metadata["activations"]` says how its text was read.
        How training went: see `train_on_text`.

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: For several sites, one without a row for each token, a text without tokens, a stream or store of
            another model or without the site, or settings out of range.
    """
    settings |= {"kind": kind, "k": k, "expansion": expansion, "d_dict": d_dict, "site": site}
    reading = {"context": context, "prompts_per_forward": prompts_per_forward, "column": column}
    how: dict[str, Any] = {"steps": steps, "memory_gib": memory_gib, "remote": remote, "progress": progress}
    return train_on_text(model, text, **how, **reading, **settings).dictionary


def train_on_text(model: Model, text: Source, **settings: Any) -> TrainResult:
    """As `train_sae`, with everything that `dictionaries.train` returns; and any dictionary that `train` knows.

    Args:
        model: The model.
        text: As for `train_sae`.
        **settings: Of `train_sae`; `site` and `site_out` of a transcoder, `sites` of a crosscoder.
    """
    names = ("steps", "batch_size", "seed", "resume", "stop_after", "checkpoint_every", "progress", "loggers")
    how = {name: settings.pop(name) for name in (*names, "distributed", *READING) if name in settings}
    out = settings.pop("out", None)
    return train_many_on_text(model, text, [settings], out=None if out is None else [out], **how)[0]


READING = ("context", "prompts_per_forward", "column", "memory_gib", "remote")


def train_many_on_text(
    model: Model,
    text: Source,
    recipes: Sequence[Mapping[str, Any]],
    *,
    context: int | None = None,
    prompts_per_forward: int | None = None,
    column: str | None = None,
    memory_gib: float = 2.0,
    remote: bool | str = False,
    batch_size: int = 1024,
    seed: int = 0,
    out: Sequence[str | Path] | str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> list[TrainResult]:
    """Train many dictionaries, of any sites and kinds, while the model reads a text once.

    Args:
        model: The model.
        text: As for `train_sae`.
        recipes: For each dictionary, what `train` takes for one: `site` (and `site_out`) or `sites`, `kind`, k, …;
            `expansion` is 8 where neither it nor `d_dict` is given.
        context: As for `train_sae`, and so are
        prompts_per_forward: this,
        column: this,
        memory_gib: this: of the activations of all sites together,
        remote: this.
        batch_size: Rows a step.
        seed: Of the order of rows, and of the dictionaries whose recipe has none.
        out: A folder for each dictionary, or one for all.
        progress: Show progress bars.
        **settings: Of `dictionaries.train_many`: steps, resume, …

    Returns:
        One result for each recipe.

    Raises:
        SiteNotFound, BadInput: As `train_sae`.
    """
    addressed = [with_addresses(model, recipe) for recipe in recipes]
    sites = resolve(model, [address for recipe in addressed for address in sites_of(recipe)])
    reading = {
        "context": context,
        "sequences_per_forward": prompts_per_forward,
        "column": column,
        "remote": remote or None,
        "progress": progress,
    }
    batches = RowBatches(
        source_of(model, sites, text, **reading), batch_size=batch_size, seed=seed, memory_gib=memory_gib
    )
    results = train_many(batches, addressed, batch_size=batch_size, seed=seed, out=out, progress=progress, **settings)
    folders = folders_of(names_of(addressed), out).values()
    for recipe, result, folder in zip(addressed, results, folders, strict=True):
        result.dictionary.model_name = name_of(model)
        result.dictionary.metadata["activations"] = about(batches, sites_of(recipe))
        hook_names.record(result.dictionary, model)
        if folder is not None and result.finished and is_first():
            result.dictionary.save(folder)  # once more, now that it knows where it belongs
    return results


def with_addresses(model: Model, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose sites are addresses of the model, with a size."""
    found = dict(recipe)
    if found.get("site") is None and found.get("sites") is None:
        raise BadInput('A recipe names what its dictionary reads: site="layers.3.ssm.gated", or sites=[…] of several.')
    for name in ("site", "site_out"):
        if found.get(name) is not None:
            found[name] = one_site(model, found[name])
    if found.get("sites") is not None:
        found["sites"] = tuple(one_site(model, site) for site in found["sites"])
    if found.get("expansion") is None and found.get("d_dict") is None:
        found["expansion"] = 8
    return found


def sites_of(recipe: Mapping[str, Any]) -> list[str]:
    """What a recipe needs."""
    return [site for site in (recipe.get("site"), recipe.get("site_out"), *(recipe.get("sites") or ())) if site]


def about(batches: RowBatches, sites: Sequence[str]) -> dict[str, Any]:
    """What is recorded of the activations a dictionary was trained on."""
    source = batches.source
    record = source.record if isinstance(source, StoredActivations) else vars(source)
    shapes = {address: list(batches.shapes[address]) for address in sites}
    return {"context": record["context"], "keep_special": record["keep_special"], "shapes": shapes}


def one_site(model: Model, site: str) -> str:
    """The address of a single site."""
    found = resolve(model, site)
    if len(found) != 1:
        raise BadInput(f"{site} stands for {len(found)} sites; a dictionary belongs to one, such as {found[0]}.")
    return found[0]
