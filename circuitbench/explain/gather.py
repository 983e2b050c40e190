"""Feature examples of a dictionary on a live model, in one streaming pass over a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..activations import Documents, name_of, packed
from ..dictionaries import Dictionary
from ..errors import BadInput
from ..models.id_tokenizer import NAME as IDS_ONLY
from ..tracing import capture, resolve
from ..tracing.features import site_of, write_site_of
from .examples import NO_TOKEN, FeatureExamples
from .logits import logit_effects, strongest

if TYPE_CHECKING:
    from ..activations.text import Text
    from ..models import Model


def feature_examples(
    dictionary: Dictionary,
    model: Model,
    text: Text,
    *,
    site: str | None = None,
    n: int = 10,
    per_interval: int = 2,
    before: int = 12,
    after: int = 6,
    logit_tokens: int = 10,
    about: str = "",
    column: str = "text",
    context: int = 256,
    prompts_per_forward: int = 16,
    progress: bool = True,
) -> FeatureExamples:
    """What every feature responds to in a text, and what it says about the next token.

    Args:
        dictionary: The dictionary.
        model: The model it was trained on.
        text: Anything that `ActivationStream` reads; read once. Nothing of it but the examples is kept.
        site: Where the dictionary reads; default: the site it was trained on.
        n: Strongest contexts a feature, at most one a sequence.
        per_interval: Further examples a feature in each eighth of its range of activations.
        before: Tokens shown before the one an example is about.
        after: Tokens shown after it.
        logit_tokens: Promoted and suppressed tokens a feature (see `logits.logit_effects`); 0: none.
        about: What the text is, for those who look at the page.
        column: Where a row of a data set has its text.
        context: Tokens the model reads at once.
        prompts_per_forward: Sequences of that size a forward.
        progress: Show a progress bar.

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: For a dictionary without a site or of another size than it, a crosscoder, a text without tokens, or
            (unless ``logit_tokens=0``) a site from which no fixed linear map leads to the logits.
    """
    address = one_site(model, dictionary, site)
    if context < 2 or prompts_per_forward < 1 or logit_tokens < 0:
        raise BadInput(
            f"context={context}, prompts_per_forward={prompts_per_forward}, logit_tokens={logit_tokens}; give at least "
            "2 tokens, 1 sequence and 0 tokens."
        )
    examples = FeatureExamples(dictionary.d_dict, n=n, before=before, after=after, per_interval=per_interval)
    if logit_tokens:
        written = write_site_of(dictionary, address, None) if dictionary.transcodes else address
        effects = logit_effects(model, written, dictionary.W_dec.detach())
        found = [strongest(some, logit_tokens) for some in effects]
        up, up_by, down, down_by = (torch.cat(part) for part in zip(*found, strict=True))
        examples.promoted, examples.suppressed = (up, up_by), (down, down_by)
    sequences = bar(packed(Documents(model, text, column), context, separator_of(model)), progress)
    gather(dictionary, captured(model, address, sequences, prompts_per_forward, dictionary.d_in), examples, False)
    if not examples.n_tokens:
        raise BadInput("The text has no tokens (special ones do not count); give some text.")
    examples.words = words_of(model, examples)
    examples.about = {
        "model": name_of(model),
        "site": address,
        "kind": dictionary.kind,
        "settings": {
            name: value for name, value in dictionary.settings.items() if isinstance(value, (int, float, str))
        },
        "d_in": dictionary.d_in,
        "text": about,
        "context": context,
    }
    return examples


@torch.no_grad()
def gather(
    dictionary: Dictionary,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    examples: FeatureExamples,
    padded: bool = True,
) -> FeatureExamples:
    """Examples from batches of activations that are there.

    Args:
        dictionary: The dictionary.
        batches: (activations `(b, t, d_in)` of the dictionary's site, token ids `(b, t)`, mask `(b, t)`, true at real
            tokens).
        examples: What they are added to.
        padded: Whether what the mask leaves out may be padding; else it is special tokens, which are shown.
    """
    for activations, token_ids, mask in batches:
        # A few sequences at a time: the code of a whole batch, zeros included, may be larger than everything else.
        at_once = max(1, 2**24 // (activations.shape[1] * dictionary.d_dict))
        for x, ids, real in zip(activations.split(at_once), token_ids.split(at_once), mask.split(at_once), strict=True):
            examples.add(dictionary.encode(x), ids, real, real if padded else torch.ones_like(real))
    return examples


def one_site(model: Model, dictionary: Dictionary, site: str | None) -> str:
    """The address a dictionary reads."""
    if dictionary.blocks:
        raise BadInput(
            f"This dictionary reads {', '.join(dictionary.blocks)} together; examples are gathered for dictionaries of "
            "one site."
        )
    site = site_of(dictionary, site)
    found = resolve(model, site)
    if len(found) != 1:
        raise BadInput(f"{site} stands for {len(found)} sites; a dictionary belongs to one, such as {found[0]}.")
    return found[0]


def captured(
    model: Model, address: str, sequences: Iterator[list[int]], at_once: int, d_in: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(activations `(b, t, d)`, ids `(b, t)`, mask of tokens that are not special), some sequences at a time."""
    assert model.tokenizer is not None  # `load_model` gives every model one
    no_words = model.tokenizer.name_or_path == IDS_ONLY  # there, ids are marked special for padding alone
    special = torch.tensor([] if no_words else model.tokenizer.all_special_ids, dtype=torch.long)
    waiting: list[list[int]] = []
    while group := waiting or list(islice(sequences, at_once)):
        same = [ids for ids in group if len(ids) == len(group[0])]
        waiting = [ids for ids in group if len(ids) != len(group[0])]  # the text's last, which may be shorter
        ids = torch.tensor(same)
        x = capture(model, ids, address)[address].flatten(2)
        if x.shape[-1] != d_in:
            raise BadInput(
                f"{address} has {x.shape[-1]} components a token, and the dictionary encodes {d_in}; give the model "
                "and site it was trained on."
            )
        yield x, ids, ~torch.isin(ids, special)


def bar(sequences: Iterator[list[int]], progress: bool) -> Iterator[list[int]]:
    """The sequences, counted."""
    return iter(tqdm(sequences, disable=not progress, desc="examples", unit="sequence"))


def separator_of(model: Model) -> int | None:
    """The token between two documents."""
    assert model.tokenizer is not None  # `load_model` gives every model one
    token = model.tokenizer.eos_token_id
    return token if isinstance(token, int) else None


def words_of(model: Model, examples: FeatureExamples) -> dict[int, str]:
    """The text of every token that occurs."""
    tables = (examples.top.tokens, examples.spread.tokens, examples.promoted[0], examples.suppressed[0])
    ids = torch.cat([table.flatten() for table in tables]).unique().tolist()
    assert model.tokenizer is not None  # `load_model` gives every model one
    return {i: str(model.tokenizer.decode([i])) for i in ids if i != NO_TOKEN}
