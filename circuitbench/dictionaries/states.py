"""Dictionaries of recurrent states: of h_t, or of what a step writes into it, as vectors or as rank-1 matrix atoms.

A token's state is a matrix: (head_dim, n) of each head in SSD, (d_k, d_v) in the delta rules, (d_inner, n) of all
channels together in S6, which has no heads. That matrix is a row of the training data. What a step writes is an outer
product in all three: of dt·x and B over the head's channels (SSD) or over all of them (S6), of k and β(v − …).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..activations import ActivationStream, name_of
from ..errors import BadInput
from ..tracing.addresses import axes_by_address, resolve
from ..tracing.run import capture
from .training import TrainResult, train

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from ..activations.text import Text
    from ..models import Model
    from .base import Dictionary

GIB = 2**30


@dataclass(frozen=True)
class StateRows:
    """The matrices of some tokens of a text.

    Attributes:
        rows: One matrix a row, flattened.
        shape: Of the matrices; with the heads before it where a row has those of all heads.
        site: Address.
        head: Which head, where there are heads and a row has one of them.
        sequence: Number of each row's sequence in the text.
        position: Of each row in its sequence.
    """

    rows: Float[Tensor, "n d_in"]
    shape: tuple[int, ...]
    site: str
    head: int | None
    sequence: Int[Tensor, " n"]
    position: Int[Tensor, " n"]


def train_state_sae(
    model: Model,
    site: str,
    text: Text,
    *,
    atoms: Literal["vector", "rank1"] = "rank1",
    head: int | None = None,
    positions_per_sequence: int | None = None,
    context: int = 256,
    sequences_per_forward: int = 4,
    max_sequences: int | None = None,
    memory_gib: float = 2.0,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Dictionary:
    """Train a dictionary of a recurrent state, or of what is written into it.

    Args:
        model: The model.
        site: Address of a state or of its writes, such as ``"layers.2.ssm.write"``.
        text: As for `ActivationStream`: a string, a file, token ids, a data set, …
        atoms: ``"rank1"``: features are outer products over one head's matrix (WriteSAE, arXiv:2605.12770), in S6 over
            the layer's; k of them make up a row. ``"vector"``: any directions, of any `kind`.
        head: Which head, in scans with heads. ``None``: the heads of a token side by side in one row, as vectors only.
        positions_per_sequence: So many random positions of each sequence; ``None``: all. States are large:
            head_dim · n numbers for every head and token.
        context: Tokens of a sequence.
        sequences_per_forward: Sequences that are run together.
        max_sequences: Stop after so many.
        memory_gib: GiB of rows that may be held; more is an error.
        seed: Of the positions, the order of rows and the dictionary.
        progress: Show progress bars.
        **settings: Of `dictionaries.train`: d_dict or expansion, k, steps, batch_size, lr, …; for vectors also `kind`,
            for rank-1 atoms `unit_rows`: whether small writes count as much as large ones, which substitution asks for.

    Returns:
        The dictionary, which knows its `site` and `model_name`; its `metadata` have `head` and `state_shape`. For how
        training went, call `state_rows` and `dictionaries.train`, which this does.

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: For a site that holds no matrix a token, a head that is missing or not there, a text without tokens,
            rows that do not fit into the memory, or settings out of range.
    """
    if atoms not in ("vector", "rank1"):
        raise BadInput(f'atoms={atoms!r} was given; it is "rank1" or "vector".')
    if atoms == "rank1" and "kind" in settings:
        raise BadInput(f'kind={settings["kind"]!r} goes with atoms="vector"; rank-1 atoms have one kind, TopK.')
    address, n_heads = matrix_site(model, site)
    checked_head(address, n_heads, head, whole=atoms == "vector")
    found = state_rows(
        model,
        address,
        text,
        head=head,
        positions_per_sequence=positions_per_sequence,
        context=context,
        sequences_per_forward=sequences_per_forward,
        max_sequences=max_sequences,
        memory_gib=memory_gib,
        seed=seed,
        progress=progress,
    )
    return train_on_rows(model, found, atoms=atoms, seed=seed, progress=progress, **settings).dictionary


def train_on_rows(
    model: Model, found: StateRows, *, atoms: Literal["vector", "rank1"] = "rank1", **settings: Any
) -> TrainResult:
    """As `train_state_sae`, with everything that `dictionaries.train` returns, on rows that are there already."""
    form = {"kind": "rank1", "shape": found.shape} if atoms == "rank1" else {}
    result = train(found.rows, **form, **settings)
    result.dictionary.site, result.dictionary.model_name = found.site, name_of(model)
    result.dictionary.metadata |= {"head": found.head, "state_shape": list(found.shape)}
    if settings.get("out") is not None and result.finished:
        result.dictionary.save(settings["out"])  # once more, now that it knows where it belongs
    return result


def state_rows(
    model: Model,
    site: str,
    text: Text,
    *,
    head: int | None = None,
    positions_per_sequence: int | None = None,
    context: int = 256,
    sequences_per_forward: int = 4,
    max_sequences: int | None = None,
    memory_gib: float = 2.0,
    seed: int = 0,
    progress: bool = False,
) -> StateRows:
    """The matrices that a state, or its writes, hold while the model reads a text; arguments as in `train_state_sae`.

    Special tokens have no row. Which positions of a sequence are taken depends on `seed` and the sequence's number
    alone; a sequence that has fewer gives all it has.

    Raises:
        SiteNotFound, BadInput: As `train_state_sae`.
    """
    address, n_heads = matrix_site(model, site)
    head = checked_head(address, n_heads, head, whole=True)
    if positions_per_sequence is not None and positions_per_sequence < 1:
        raise BadInput(f"positions_per_sequence={positions_per_sequence} was given; it must be at least 1.")
    stream = ActivationStream(
        model,
        address,
        text,
        context=context,
        sequences_per_forward=sequences_per_forward,
        max_sequences=max_sequences,
    )
    shape = stream.shapes()[address] if head is None else stream.shapes()[address][1:]
    rows: list[Tensor] = []
    sequence: list[Tensor] = []
    position: list[Tensor] = []
    held = 0
    with tqdm(disable=not progress, desc="states", unit="row", unit_scale=True) as bar:
        for ids, numbers in stream.forwards():
            chosen = chosen_positions(stream.kept(ids), numbers, positions_per_sequence, seed)
            counts = chosen.sum(1)
            for count in counts.unique().tolist():
                if count == 0:
                    continue
                some = counts == count
                held += 4 * count * int(some.sum()) * prod(shape)
                if held > memory_gib * GIB:
                    raise BadInput(
                        f"The rows of {address}, {4 * prod(shape)} bytes each, do not fit into memory_gib="
                        f"{memory_gib}; give fewer positions_per_sequence or max_sequences, or more memory."
                    )
                values = capture(model, ids[some], address, positions=chosen[some], batch_size=int(some.sum()))[address]
                values = values if head is None else values[:, :, head]
                rows.append(values.reshape(-1, prod(shape)).to("cpu", torch.float32, copy=True))
                where = chosen[some].nonzero()
                sequence.append(numbers[some][where[:, 0]])
                position.append(where[:, 1])
                bar.update(len(where))
    if not rows:
        raise BadInput("The text has no tokens (special ones do not count); give some text.")
    return StateRows(torch.cat(rows), tuple(shape), address, head, torch.cat(sequence), torch.cat(position))


def chosen_positions(
    kept: Bool[Tensor, "b t"], numbers: Int[Tensor, " b"], count: int | None, seed: int
) -> Bool[Tensor, "b t"]:
    """`count` random ones of the positions that are kept in each sequence, or all that there are.

    Args:
        kept: Positions to choose from.
        numbers: Of the sequences; with `seed`, what the choice depends on.
        count: ``None``: all.
        seed: Of the choice.
    """
    if count is None:
        return kept
    chosen = torch.zeros_like(kept)
    for row, number in enumerate(numbers.tolist()):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        places = kept[row].nonzero().squeeze(1)
        chosen[row, places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return chosen


def matrix_site(model: Model, site: str) -> tuple[str, int | None]:
    """The address of a state or of its writes, and how many heads it has (``None``: it has none, as in S6).

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: For several sites, or one that holds no matrix a token.
    """
    found = resolve(model, site)
    if len(found) != 1:
        raise BadInput(f"{site} stands for {len(found)} sites; a dictionary belongs to one, such as {found[0]}.")
    address = found[0]
    axes = axes_by_address(model, address)
    if not address.endswith((".ssm.state", ".ssm.write")) or len(axes) != (5 if "h" in axes else 4):
        raise BadInput(
            f"{address} is ({', '.join(axes)}); this takes a recurrent state that is a matrix, ssm.state, or what is "
            "written into it, ssm.write. For a vector a token there is train_sae."
        )
    return address, capture(model, [[0]], address)[address].shape[2] if "h" in axes else None


def checked_head(address: str, n_heads: int | None, head: int | None, *, whole: bool) -> int | None:
    """The head, counted from 0; refused if it is not there, or if none was given where one is needed.

    Args:
        address: The site.
        n_heads: How many it has.
        head: Which was asked for.
        whole: Whether all of them may be taken together.
    """
    if n_heads is None and head is not None:
        raise BadInput(f"{address} has no heads (S6 has one matrix, over all channels); leave head={head} out.")
    if n_heads is not None and head is None and not whole:
        raise BadInput(f"{address} has {n_heads} heads with a matrix each; say which, head=0 to head={n_heads - 1}.")
    if n_heads is not None and head is not None and not -n_heads <= head < n_heads:
        raise BadInput(f"{address} has heads 0 to {n_heads - 1}; head={head} is not among them.")
    return head if head is None or n_heads is None else head % n_heads
