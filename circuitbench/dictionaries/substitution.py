"""The substitution experiment (WriteSAE, Young 2026, arXiv:2605.12770): does a feature do what it stands in for?

At one position the matrix that a step writes into its state is replaced, and the model runs on: by the strongest
feature's activation times its direction; by the dictionary's whole reconstruction; and by nothing. A feature that means
something to the model leaves its predictions nearer to what they were than the deletion does. Two controls say how much
of that any matrix would do: a random outer product as large as the feature's, and the mean write.

Replacing a write changes h_t by the difference, which later steps, those of the delta rules too, take up as they take
up any state: so it is done as an edit of the state. The same experiment on h_t itself replaces a whole state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..errors import BadInput
from ..models.prompts import encode
from ..tracing.forward import forward
from ..tracing.interventions import Add
from ..tracing.run import capture
from .states import checked_head, chosen_positions, matrix_site

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from ..models import Model
    from ..models.prompts import Prompts
    from .base import Dictionary

REPLACEMENTS = ("atom", "code", "deletion", "random", "mean")


@dataclass(frozen=True)
class Substitution:
    """How far predictions move when a write is replaced, one entry for each of `n` positions.

    A divergence is KL(clean ‖ replaced) of next-token distributions in nats, mean over the position and those after it
    (as many as `horizon` allows).

    Attributes:
        site: Address of what was replaced.
        head: Which head, where a head was.
        prompt: Number of the prompt.
        position: In the prompt.
        feature: The strongest feature there.
        activation: Its activation; 0 where no feature is active, and the atom is then the deletion.
        kl: Replacement -> divergence: "atom", "code", "deletion", "random", "mean".
    """

    site: str
    head: int | None
    prompt: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    kl: Mapping[str, Float[Tensor, " n"]]

    @property
    def kl_atom(self) -> Float[Tensor, " n"]:
        """With the strongest feature's activation · direction in the place of the write."""
        return self.kl["atom"]

    @property
    def kl_code(self) -> Float[Tensor, " n"]:
        """With the dictionary's reconstruction in its place: all active features and the decoder's bias."""
        return self.kl["code"]

    @property
    def kl_deletion(self) -> Float[Tensor, " n"]:
        """With nothing in its place."""
        return self.kl["deletion"]

    @property
    def win_rate(self) -> float:
        """Share of positions at which the atom is nearer to the clean run than the deletion; a tie is none."""
        return self.wins("atom")

    def wins(self, replacement: str) -> float:
        """Share of positions at which a replacement is nearer to the clean run than the deletion; a tie is none."""
        return (self.kl[replacement] < self.kl["deletion"]).double().mean().item()

    def ratio(self, replacement: str = "atom") -> float:
        """A replacement's divergence as a share of the deletion's, each summed over positions."""
        return (self.kl[replacement].sum() / self.kl["deletion"].sum()).item()

    def win_rate_per_feature(self) -> float:
        """The mean over features of the win rate where each is the strongest."""
        won = (self.kl["atom"] < self.kl["deletion"]).double()
        return torch.stack([won[self.feature == i].mean() for i in self.feature.unique()]).mean().item()

    def __str__(self) -> str:
        where = self.site if self.head is None else f"{self.site}, head {self.head}"
        lines = [f"{where}: {len(self.position)} positions"]
        lines.append(f"{'instead of it':14} {'KL':>9} {'ratio':>7} {'nearer':>7}")
        for name, kl in self.kl.items():
            beside = "" if name == "deletion" else f" {self.ratio(name):7.3f} {self.wins(name):7.1%}"
            lines.append(f"{name:14} {kl.mean():9.2e}{beside}")
        return "\n".join(lines)


def substitution(
    model: Model,
    dictionary: Dictionary,
    prompts: Prompts,
    *,
    site: str | None = None,
    head: int | None = None,
    positions: Sequence[int] | None = None,
    n_positions: int | None = None,
    horizon: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Substitution:
    """Replace what is written at single positions by a dictionary's features, and by nothing, and run on.

    Args:
        model: The model.
        dictionary: Of ``ssm.write`` or ``ssm.state``: of one head, of all side by side, or of S6's matrix.
        prompts: As for `capture`.
        site: Where it belongs; default: the site it was trained on.
        head: The head; default: the one it was trained on.
        positions: In every prompt, negative ones from its end.
        n_positions: Or so many of each prompt at random; neither: all of them.
        horizon: How many positions are compared, the replaced one the first of them: 1 is the next token. ``None``: to
            the prompt's end.
        batch_size: Copies of a prompt that are run together, with one replacement in each.
        seed: Of the positions and the random control.
        progress: Show a bar.

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: For a dictionary of another size than the matrix, a transcoder or a crosscoder; a position, head or
            size out of range.
    """
    place = _place(model, dictionary, site, head)
    if batch_size < 1 or (horizon is not None and horizon < 1) or (n_positions is not None and n_positions < 1):
        raise BadInput(
            f"batch_size={batch_size}, horizon={horizon}, n_positions={n_positions} were given; at least 1 each."
        )
    if positions is not None and n_positions is not None:
        raise BadInput(f"positions={list(positions)} and n_positions={n_positions} were given; give one of them.")
    batch = encode(model, prompts)
    every = [ids[ids.shape[0] - n :] for ids, n in zip(batch.input_ids, batch.lengths.tolist(), strict=True)]
    values = [_values(model, place, ids) for ids in every]
    mean = torch.cat(values).mean(0)
    chosen = [_positions(len(ids), positions, n_positions, i, seed) for i, ids in enumerate(every)]
    generator = torch.Generator().manual_seed(seed)
    kl: dict[str, list[Tensor]] = {name: [] for name in REPLACEMENTS}
    strongest: list[tuple[Tensor, Tensor]] = []
    with tqdm(disable=not progress, total=len(REPLACEMENTS) * sum(map(len, chosen)), unit="run") as bar:
        for ids, value, where in zip(every, values, chosen, strict=True):
            held = value[where]
            feature, activation, instead = replacements(dictionary, held, mean, place.shape, generator)
            strongest.append((feature, activation))
            clean = forward(model, encode(model, ids[None]))["logits"].cpu()[0]
            for name, replaced in instead.items():
                for part in torch.arange(len(where)).split(batch_size):
                    logits = _changed(model, place, ids, where[part], (replaced - held)[part])
                    for row, start in zip(logits, where[part].tolist(), strict=True):
                        kl[name].append(_divergence(clean, row, start, horizon))
                    bar.update(len(part))
    return Substitution(
        site=place.site,
        head=place.head,
        prompt=torch.cat([torch.full((len(where),), i) for i, where in enumerate(chosen)]),
        position=torch.cat(chosen),
        feature=torch.cat([feature for feature, _ in strongest]),
        activation=torch.cat([activation for _, activation in strongest]),
        kl={name: torch.stack(found) for name, found in kl.items()},
    )


def replacements(
    dictionary: Dictionary,
    held: Float[Tensor, "n d_in"],
    mean: Float[Tensor, " d_in"],
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], dict[str, Float[Tensor, "n d_in"]]]:
    """What each row is replaced by, by name; and the strongest feature of each with its activation."""
    with torch.no_grad():
        code = dictionary.encode(held)
        activation, feature = code.max(1)
        atom = activation[:, None] * dictionary.W_dec[feature]
        rows, cols = shape[-2:]
        parts = held.shape[1] // (rows * cols)  # heads side by side have an outer product each
        left, right = (torch.randn(len(held), parts, size, generator=generator) for size in (rows, cols))
        random = F.normalize(torch.einsum("npr,npc->nprc", left, right).flatten(1), dim=1)
        return (
            feature,
            activation.to(held.dtype),
            {
                "atom": atom.to(held.dtype),
                "code": dictionary.decode(code).to(held.dtype),
                "deletion": torch.zeros_like(held),
                "random": (random.to(atom) * atom.norm(dim=1, keepdim=True)).to(held.dtype),
                "mean": mean.to(held.dtype).expand_as(held),
            },
        )


class _Place(NamedTuple):
    """What is replaced: a site, the head of it, and the shape of a position there."""

    site: str
    head: int | None
    shape: tuple[int, ...]


def _place(model: Model, dictionary: Dictionary, site: str | None, head: int | None) -> _Place:
    """Where a dictionary belongs."""
    site = site or dictionary.site
    if site is None:
        raise BadInput('This dictionary does not know its site; name it, for example site="layers.2.ssm.write".')
    if dictionary.transcodes or dictionary.blocks:
        raise BadInput("A transcoder or crosscoder does not reconstruct what one site holds; give an autoencoder.")
    head = dictionary.metadata.get("head") if head is None else head
    address, n_heads = matrix_site(model, site)
    head = checked_head(address, n_heads, head, whole=True)
    shape = capture(model, [[0]], address)[address].shape[2:]
    shape = shape if head is None else shape[1:]
    if dictionary.d_in != prod(shape):
        of = address if head is None else f"head {head} of {address}"
        raise BadInput(
            f"The dictionary has d_in = {dictionary.d_in}, and {of} has {prod(shape)} numbers; give site= and head= as "
            "it was trained."
        )
    return _Place(address, head, tuple(shape))


def _values(model: Model, place: _Place, ids: Int[Tensor, " t"]) -> Float[Tensor, "t d_in"]:
    """The site's matrix at every position of a prompt, a row each."""
    found = capture(model, ids[None], place.site)[place.site][0].cpu()
    return (found if place.head is None else found[:, place.head]).flatten(1).clone()


def _positions(
    length: int, positions: Sequence[int] | None, n_positions: int | None, prompt: int, seed: int
) -> Int[Tensor, " n"]:
    """Where a prompt's writes are replaced."""
    if positions is None:
        every = torch.ones(1, length, dtype=torch.bool)
        return chosen_positions(every, torch.tensor([prompt]), n_positions, seed)[0].nonzero().squeeze(1)
    wrong = [t for t in positions if not -length <= t < length]
    if wrong or not len(positions):
        raise BadInput(f"positions={list(positions)} was given; prompt {prompt} has positions 0 to {length - 1}.")
    return torch.tensor([t % length for t in positions])


def _changed(
    model: Model, place: _Place, ids: Int[Tensor, " t"], where: Int[Tensor, " n"], difference: Float[Tensor, "n d_in"]
) -> Float[Tensor, "n t vocab"]:
    """Logits of copies of a prompt, in each of which the state is changed by a difference at one position."""
    n = len(where)
    here = torch.zeros(n, len(ids), dtype=torch.bool)
    here[torch.arange(n), where] = True
    shape = place.shape if place.head is None else (1, *place.shape)
    state = place.site.rpartition(".")[0] + ".state"
    edit = Add(state, difference.view(n, 1, *shape), positions=here, heads=place.head)
    return forward(model, encode(model, ids.expand(n, -1)), edit)["logits"].cpu()


def _divergence(
    clean: Float[Tensor, "t vocab"], changed: Float[Tensor, "t vocab"], start: int, horizon: int | None
) -> Float[Tensor, ""]:
    """KL(clean ‖ changed), mean over positions from `start` on."""
    after = slice(start, None if horizon is None else start + horizon)
    p, q = (logits[after].double().log_softmax(-1) for logits in (clean, changed))
    return (p.exp() * (p - q)).sum(-1).mean()
