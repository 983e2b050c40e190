"""Dictionaries on a live model: trained on a site from text, judged by what running on them costs, shown by examples.

Text is tokenised piece by piece, joined with an end-of-text token between pieces where the tokenizer has one, and cut
into windows of `context` tokens; the last one may be shorter, so no token is lost. Special tokens take part in the
model's run and nowhere else: dictionaries are neither trained nor judged on them, and in spliced runs they keep their
own activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import BadInput
from ..models.id_tokenizer import NAME as IDS_ONLY
from ..models.prompts import encode, tokenize
from ..tracing import capture, resolve
from ..tracing.addresses import axes_by_address
from ..tracing.forward import forward
from ..tracing.interventions import Set
from .base import Dictionary
from .evaluation import Batch, Reconstruction, Splice, reconstruction, splice
from .features import FeatureExamples, top_examples
from .training import TrainResult, train

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Bool, Float

    from ..models import Model

    Text = str | Iterable[str]


def train_sae(
    model: Model,
    site: str,
    text: Text,
    *,
    kind: str = "topk",
    k: int = 32,
    expansion: int | None = None,
    d_dict: int | None = None,
    steps: int = 1000,
    context: int = 256,
    prompts_per_forward: int = 16,
    progress: bool = True,
    **settings: Any,
) -> Dictionary:
    """Train a sparse autoencoder on what a site holds while the model reads a text.

    Args:
        model: The model.
        site: Address of a site with one vector a token, such as ``"layers.5.ssm.gated"``.
        text: A text, or several; read once. Its activations are kept in memory: 4 · d_in bytes a token.
        kind: "topk".
        k: Features that may be active on a token.
        expansion: d_dict / d_in; 8 where neither it nor `d_dict` is given.
        d_dict: Number of features.
        steps: Optimizer steps.
        context: Tokens the model reads at once.
        prompts_per_forward: Windows of that size a forward.
        progress: Show progress bars.
        **settings: Of `dictionaries.train`: batch_size, lr, seed, out, resume, …

    Returns:
        The dictionary, which knows its `site` and `model_name`. How training went: see `train_on_text`.

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: For several sites, one that has no single vector a token, a text without tokens, or settings out of
            range.
    """
    settings |= {"kind": kind, "k": k, "expansion": expansion, "d_dict": d_dict, "steps": steps, "progress": progress}
    windows = Windows(model, site, text, context, prompts_per_forward)
    return train_on_text(windows, **settings).dictionary


def train_on_text(windows: Windows, **settings: Any) -> TrainResult:
    """As `train_sae`, with everything that `dictionaries.train` returns, from text that is already `Windows`."""
    if settings.get("expansion") is None and settings.get("d_dict") is None:
        settings["expansion"] = 8
    result = train(windows.activations(settings.get("progress", True)), **settings)
    result.dictionary.site = windows.address
    result.dictionary.model_name = name_of(windows.model)
    if settings.get("out") is not None and result.finished:
        result.dictionary.save(settings["out"])  # once more, now that it knows where it belongs
    return result


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
        text: Text it was not trained on; a text, or several.
        site: Where it belongs; default: the site it was trained on.
        context: Tokens the model reads at once.
        prompts_per_forward: Windows of that size a forward.
        progress: Show progress bars.

    Returns:
        FVU, L0, dead share and density; loss clean, spliced, with the site set to zero and to its mean over this text;
        the share of the loss recovered; KL. Each is defined in `dictionaries.evaluation`.

    Raises:
        BadInput: For a dictionary without a site, or of another size than the site; a text without tokens.
    """
    windows = Windows(model, site_of(dictionary, site), text, context, prompts_per_forward)
    activations = windows.activations(progress)
    check_size(dictionary, activations.shape[-1], windows.address)
    return Evaluation(
        reconstruction(dictionary, activations),
        spliced_losses(dictionary, windows, activations.mean(0), progress),
    )


def feature_examples(
    dictionary: Dictionary,
    model: Model,
    text: Text,
    *,
    site: str | None = None,
    n: int = 10,
    before: int = 12,
    after: int = 6,
    context: int = 256,
    prompts_per_forward: int = 16,
    progress: bool = True,
) -> FeatureExamples:
    """The strongest contexts of every feature in a text, at most one a window of it.

    Args:
        dictionary: The dictionary.
        model: The model it was trained on.
        text: A text, or several.
        site: Where it belongs; default: the site it was trained on.
        n: Contexts a feature.
        before: Tokens shown before the strongest one.
        after: Tokens shown after it.
        context: Tokens the model reads at once.
        prompts_per_forward: Windows of that size a forward.
        progress: Show a progress bar.

    Raises:
        BadInput: As `evaluate`.
    """
    windows = Windows(model, site_of(dictionary, site), text, context, prompts_per_forward)
    check_size(dictionary, windows.d_site, windows.address)
    return top_examples(dictionary, windows.run(progress, "examples"), n=n, before=before, after=after)


class Windows:
    """A text as the model reads it, and what one site holds meanwhile.

    Attributes:
        model: The model.
        address: The site.
        batches: `(b, t)` token ids.
    """

    def __init__(self, model: Model, site: str, text: Text, context: int, prompts_per_forward: int) -> None:
        if context < 2 or prompts_per_forward < 1:
            raise BadInput(
                f"context={context}, prompts_per_forward={prompts_per_forward}; give at least 2 tokens and 1 window."
            )
        self.model = model
        self.address = one_site(model, site)
        ids = tokens_of(model, text)
        whole = len(ids) // context * context
        self.batches = list(ids[:whole].view(-1, context).split(prompts_per_forward)) if whole else []
        if whole < len(ids):
            self.batches.append(ids[None, whole:])
        assert model.tokenizer is not None  # `load_model` gives every model one
        no_words = model.tokenizer.name_or_path == IDS_ONLY  # there, ids are marked special for padding alone
        self.special = torch.tensor([] if no_words else model.tokenizer.all_special_ids, dtype=torch.long)

    @property
    def d_site(self) -> int:
        """Size of the site's vector."""
        probe = self.batches[0][:1, :1]
        return capture(self.model, probe, self.address)[self.address].shape[-1]

    def kept(self, ids: Tensor) -> Bool[Tensor, "b t"]:
        """Tokens that are not special."""
        return ~torch.isin(ids, self.special)

    def run(self, progress: bool, label: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(activations `(b, t, d)`, ids `(b, t)`, mask of tokens that are not special), batch by batch."""
        for ids in tqdm(self.batches, disable=not progress, desc=label, unit="batch"):
            yield capture(self.model, ids, self.address)[self.address], ids, self.kept(ids)

    def activations(self, progress: bool) -> Float[Tensor, "n d"]:
        """The site's vector at every token that is not special."""
        n = sum(int(self.kept(ids).sum()) for ids in self.batches)
        if n == 0:
            raise BadInput("The text has no tokens (special ones do not count); give some text.")
        out, filled = None, 0
        for x, _, keep in self.run(progress, "activations"):
            rows = x[keep]
            out = rows.new_empty(n, rows.shape[1], dtype=torch.float32) if out is None else out
            out[filled : filled + len(rows)] = rows
            filled += len(rows)
        assert out is not None  # n > 0
        return out


def spliced_losses(dictionary: Dictionary, windows: Windows, mean: Float[Tensor, " d"], progress: bool) -> Splice:
    """The model's losses as it is, on the reconstruction, and with the site set to zero or to its mean."""
    model, address = windows.model, windows.address
    held: dict[str, Tensor] = {}

    def clean(batch: Batch) -> Tensor:
        found = forward(model, encode(model, batch[0]), sites=[address])
        held["x"] = found[address]
        return found["logits"].cpu()

    def changed(batch: Batch, value: Tensor) -> Tensor:
        change = Set(address, value, positions=windows.kept(batch[0]))
        return forward(model, encode(model, batch[0]), change)["logits"].cpu()

    batches = tqdm(windows.batches, disable=not progress, desc="splice", unit="batch")
    return splice(
        ((ids, torch.ones_like(ids, dtype=torch.bool)) for ids in batches),
        clean=clean,
        spliced=lambda batch: changed(batch, dictionary(held["x"])),
        ablated={
            "zero": lambda batch: changed(batch, torch.zeros(())),
            "mean": lambda batch: changed(batch, mean),
        },
    )


def tokens_of(model: Model, text: Text) -> Tensor:
    """All tokens of a text, in order, `(n,)`.

    Raises:
        BadInput: For something that is not text, or text without tokens.
    """
    pieces = [text] if isinstance(text, str) else list(text)
    if not all(isinstance(piece, str) for piece in pieces):
        wrong = next(type(piece).__name__ for piece in pieces if not isinstance(piece, str))
        raise BadInput(f"Text is a string or an iterable of strings; this one holds a {wrong}.")
    tokenizer = model.tokenizer
    assert tokenizer is not None  # `load_model` gives every model one
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for piece in pieces:
        if tokenizer.name_or_path == IDS_ONLY:
            new = tokenize(model, piece)
        else:
            new = tokenizer(piece, verbose=False)["input_ids"] if piece else []  # longer than a context is no warning
        ids += [*(separator if ids and new else []), *new]
    if not ids:
        raise BadInput("The text has no tokens; give some text.")
    return torch.tensor(ids)


def one_site(model: Model, site: str) -> str:
    """The address of a single site with one vector a token."""
    found = resolve(model, site)
    if len(found) != 1:
        raise BadInput(f"{site} stands for {len(found)} sites; a dictionary belongs to one, such as {found[0]}.")
    axes = axes_by_address(model, found[0])
    if len(axes) != 3 or axes[1] != "t":
        raise BadInput(
            f"{found[0]} is ({', '.join(axes)}); a dictionary takes a site with one vector a token, (b, t, d), such as "
            f"{found[0].rsplit('.', 1)[0]}.gated or .out."
        )
    return found[0]


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


def name_of(model: Model) -> str:
    """The model's name: its Hub id, or the last part of the folder it came from."""
    name = model.hf.name_or_path or model.hf.config.model_type
    return Path(name).name if Path(name).is_dir() else name
