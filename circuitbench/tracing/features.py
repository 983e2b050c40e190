"""Features of a dictionary as the where of an intervention; all that the dictionary does not explain stays.

x' = x + (f' − f)·W_dec, with f what the encoder makes of x at that token and f' what the interventions make of f.
Neighbours in a list with features of one dictionary at one site are one such edit: f is read once, from x as what comes
before them in the list has left it; each changes what the one before has made of f; the difference is written at once.

`Feature` and `Together` stay on the client; a `FeatureEdit` travels, with what it needs as plain tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from .selection import Columns

AXES = ["b", "t", "f"]  # of a code; the last one counts features


class Feature:
    """One feature of a dictionary, or several: the where of `Set`, `Add`, `Scale` and `Ablate`.

    Values are activations: ``Set(Feature(sae, 42), 3.0)`` makes the feature's activation 3, ``Add`` adds to it,
    ``Scale`` multiplies it. A tensor is `(t,)` or `(b, t)` for one feature, `(n,)`, `(t, n)` or `(b, t, n)` for a list
    of n. A transcoder's features are read at its `site`, and their directions are written at its `site_out`.

    Attributes:
        dictionary: Anything with `encode` and `W_dec` `(d_dict, d_out)`.
        indices: The features.
        single: Whether one was named, not a list.
        site: Address of what is encoded.
        site_out: Address of what the directions are added to.
    """

    def __init__(self, dictionary: Any, index: Any, site: str | None = None, site_out: str | None = None) -> None:
        """
        Args:
            dictionary: The dictionary.
            index: A feature, or a list of them.
            site: Where; default: the site the dictionary was trained on.
            site_out: Where a transcoder writes; default: the site it was trained on.

        Raises:
            BadInput: For something that is no dictionary, one without a site, one of several sites (a crosscoder), or
                a feature that is not there.
        """
        if not callable(getattr(dictionary, "encode", None)) or not isinstance(
            getattr(dictionary, "W_dec", None), torch.Tensor
        ):
            raise BadInput(
                f"Feature takes a dictionary, with encode and W_dec, not {type(dictionary).__name__}; "
                "Feature(sae, 42), for example."
            )
        self.dictionary = dictionary
        self.indices = feature_indices(dictionary, index)
        self.single = isinstance(index, int)
        if getattr(dictionary, "blocks", None):
            raise BadInput(
                f"This dictionary reads {', '.join(dictionary.blocks)} together, and the first is over when the last "
                "is known, so its features cannot be edited in one run; Add a part of a row of W_dec to a site instead."
            )
        self.site = site_of(dictionary, site)
        self.site_out = write_site_of(dictionary, site, site_out)

    def __repr__(self) -> str:
        index = self.indices[0] if self.single else self.indices
        return f"Feature({type(self.dictionary).__name__}, {index}, site={self.site!r})"


def feature_indices(dictionary: Any, index: Any) -> list[int]:
    """The features that are meant, if the dictionary has them.

    Raises:
        BadInput: For none, one that is not there, or one named twice.
    """
    size = dictionary.W_dec.shape[0]
    if isinstance(index, torch.Tensor):
        index = index.tolist()
    wanted = list(index) if isinstance(index, (list, tuple, range)) else [index]
    fine = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size for i in wanted)
    if not wanted or not fine or len(set(wanted)) < len(wanted):
        raise BadInput(
            f"feature {index!r} was asked for; this dictionary has features 0 to {size - 1}: name one, or a list in "
            "which each stands once."
        )
    return wanted


def site_of(dictionary: Any, site: str | None) -> str:
    """Where a dictionary reads."""
    site = site or getattr(dictionary, "site", None)
    if site is None:
        raise BadInput('This dictionary does not know its site; name it, for example site="layers.3.ssm.gated".')
    return site


def write_site_of(dictionary: Any, site: str | None, site_out: str | None) -> str:
    """Where a dictionary's directions belong: a transcoder's in what it reconstructs."""
    if not getattr(dictionary, "transcodes", False):
        if site_out is not None:
            raise BadInput(f"site_out={site_out!r} is for transcoders; this dictionary reads and writes one site.")
        return site_of(dictionary, site)
    site_out = site_out or getattr(dictionary, "site_out", None)
    if site_out is None:
        raise BadInput(
            "This transcoder does not know the site it reconstructs; name it with site_out=, for example "
            'site_out="layers.3.mlp.out".'
        )
    return site_out


class Together:
    """Interventions on features of one dictionary that make one edit; on the client.

    Attributes:
        read: Address of what is encoded.
        write: Address of what the directions are added to.
    """

    def __init__(self, dictionary: Any, read: str, write: str) -> None:
        self.dictionary = dictionary
        self.read = read
        self.write = write
        self.items: list[Any] = []

    def joins(self, dictionary: Any, read: str, write: str) -> bool:
        """Whether an intervention on this dictionary, read and written there, can be part of it."""
        return self.dictionary is dictionary and (self.read, self.write) == (read, write)

    def part_at(self, address: str, edit: FeatureEdit) -> Any:
        """What is to be done at one of its addresses."""
        if self.read == self.write:
            return edit
        return Reading(edit) if address == self.read else Writing(edit)

    def edit(self) -> FeatureEdit:
        """The edit, with what it needs of the dictionary.

        Raises:
            BadInput: For a reference of another size, or an edit of the state that needs other tokens or another site.
        """
        if ".ssm.state" in self.read + self.write:
            if self.read != self.write:
                raise BadInput(
                    f"A transcoder from {self.read} to {self.write} cannot be edited: a state is edited while the scan "
                    "runs again, and other sites are not there then."
                )
            for item in self.items:
                if getattr(item, "pools", False):
                    raise BadInput(
                        f"{item!r}: states are edited one token at a time, so this mode needs reference= (activations "
                        "of the site, for example from capture)."
                    )
        union = list(dict.fromkeys(i for item in self.items for i in item.feature.indices))
        place = {index: column for column, index in enumerate(union)}
        encoder = travelling(self.dictionary, union)
        directions = self.dictionary.W_dec.detach()[union]
        parts = []
        for item in self.items:
            columns = [place[i] for i in item.feature.indices]
            parts.append((without_dictionary(item, encoder, columns), columns))
        names = ", ".join(map(str, union))
        return FeatureEdit(encoder, directions, parts, f"Feature {names} of the dictionary at {self.read}")


def without_dictionary(item: Any, encoder: Any, columns: list[int]) -> Any:
    """A copy of an intervention that may travel: no dictionary, its reference (if any) encoded."""
    bare = object.__new__(type(item))
    bare.__dict__.update(item.__dict__, feature=None)
    reference = getattr(item, "reference", None)
    if reference is not None:
        width = encoder.d_in
        if reference.numel() % width or reference.shape[-1] != width and reference.flatten(1).shape[1] % width:
            raise BadInput(
                f"{item!r}: the reference is {tuple(reference.shape)}; it has to be activations of the site, whose "
                f"last axis is {width}."
            )
        rows = reference.reshape(-1, width)
        rows = rows[~rows.isnan().any(1)]
        if not len(rows):
            raise BadInput(f"{item!r}: the reference holds no token without NaN.")
        with torch.no_grad():
            bare.reference = encoder.encode(rows)[:, columns]
    return bare


def travelling(dictionary: Any, indices: list[int]) -> Any:
    """The encoder of some features, of plain tensors where the dictionary can give one (`travelling(indices)`)."""
    give = getattr(dictionary, "travelling", None)
    return Sliced(dictionary, indices) if give is None else give(indices)


class Sliced:
    """Some features of anything that encodes, by encoding all of them."""

    def __init__(self, dictionary: Any, indices: list[int]) -> None:
        self.dictionary = dictionary
        self.indices = indices
        self.d_in = getattr(dictionary, "d_in", dictionary.W_dec.shape[1])

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n"]:
        """The activations of these features."""
        return self.dictionary.encode(x)[..., self.indices]


class FeatureEdit:
    """What interventions make of a site through some features of one dictionary.

    Attributes:
        parts: Each intervention, and the columns of the code it is about.
        positions: As in `Intervention`, of a single one; ``None`` for several, each of which looks for itself.
        counts: As in `Intervention`.
    """

    def __init__(
        self,
        encoder: Any,
        directions: Float[Tensor, "n d_out"],
        parts: list[tuple[Any, list[int]]],
        name: str,
    ) -> None:
        """
        Args:
            encoder: `encode(x)`, of rows of its `d_in`, gives the activations of these n features.
            directions: Their directions.
            parts: Interventions in order, and which of the n features each is about.
            name: What is edited, for errors.
        """
        self.encoder = encoder
        self.directions = directions
        self.parts = parts
        self.name = name
        self.positions = parts[0][0].positions if len(parts) == 1 else None
        self.counts = any(item.counts for item, _ in parts)
        self.waiting: Any = None  # a transcoder's difference, between its two sites

    def changed(self, value: Tensor, columns: Columns, address: str, axes: list[str]) -> Tensor:
        """`value` with the features changed where it is meant to be."""
        return self.written(value, *self.difference(value, columns, address, axes), address)

    def difference(
        self, value: Tensor, columns: Columns, address: str, axes: list[str]
    ) -> tuple[Float[Tensor, "b t d_out"], Bool[Tensor, "b t 1"]]:
        """(f' − f)·W_dec, and where it is meant to be."""
        if axes[:2] != ["b", "t"] or axes.count("t") != 1:
            raise BadInput(f"{address} is ({', '.join(axes)}); a dictionary takes a site with one vector a token.")
        rows = value.flatten(2)
        width = self.encoder.d_in
        if rows.shape[-1] != width:
            raise BadInput(
                f"{address} has {rows.shape[-1]} components a token, and the dictionary encodes {width}; name the site "
                "it was trained on, Feature(..., site=...)."
            )
        code = self.encoder.encode(rows)
        after, touched = code, torch.zeros_like(code[..., :1], dtype=torch.bool)
        for item, places in self.parts:
            mask = columns.chosen(item.positions)[..., None].to(code.device)
            old = after[..., places]
            new = torch.where(mask, item.apply(old, columns, self.name, AXES).to(old.dtype), old)
            after = after.index_copy(-1, torch.tensor(places, device=code.device), new)
            touched = touched | mask
        return (after - code) @ self.directions.to(code.device, code.dtype), touched

    def written(self, value: Tensor, delta: Tensor, touched: Tensor, address: str) -> Tensor:
        """The difference added."""
        rows = value.flatten(2)
        if rows.shape[-1] != delta.shape[-1]:
            raise BadInput(
                f"{address} has {rows.shape[-1]} components a token, and the dictionary's directions have "
                f"{delta.shape[-1]}; name the site it was trained on."
            )
        delta, touched = delta.to(value.device), touched.to(value.device)
        return torch.where(touched, (rows + delta).to(value.dtype), rows).reshape(value.shape)


class Reading:
    """The first half of a transcoder's edit: f is read, and changed, where it is encoded."""

    def __init__(self, edit: FeatureEdit) -> None:
        self.edit = edit
        self.positions = edit.positions
        self.counts = edit.counts
        self.parts = edit.parts

    def changed(self, value: Tensor, columns: Columns, address: str, axes: list[str]) -> Tensor:
        """`value` as it is."""
        self.edit.waiting = self.edit.difference(value, columns, address, axes)
        return value


class Writing:
    """The second half: the difference is added where the transcoder writes, later in the same forward."""

    def __init__(self, edit: FeatureEdit) -> None:
        self.edit = edit
        self.positions = edit.positions
        self.counts = edit.counts
        self.parts = []

    def changed(self, value: Tensor, columns: Columns, address: str, axes: list[str]) -> Tensor:
        """`value` with the features changed."""
        delta, touched = self.edit.waiting
        return self.edit.written(value, delta, touched, address)
