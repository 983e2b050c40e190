"""The state after a prompt: to look at, to change, to store. (`prefix` runs prompts to their states.)"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import BadInput, SiteNotFound, VersionMismatch
from .remote import minor
from .spots import matching

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


FORMAT = "1"  # of the files
TOKENS, MASK = "input_ids", "attention_mask"


class State(Mapping):
    """What a model keeps of some prompts it has run: everything that the tokens after them depend on.

    A mapping: ``state["layers.3.ssm.state"]`` is the recurrent state, in the layout of the site without the axis of
    positions; ``ssm.conv_state`` `(b, k, channels)` the last inputs of the short convolution; ``attn.k`` and ``attn.v``
    `(b, t, kv, p)` cached keys (as they are compared, after a rotary embedding) and values. ``list(state)`` names all.

    It can be changed: ``state["layers.3.ssm.state"][:, 2] = 0`` and ``state["layers.3.ssm.state"] = tensor`` change
    this one, `edited` returns a changed copy. Two states never share memory, and no run changes the one it starts from.

    Attributes:
        input_ids: The tokens that have been run, `(b, t)`, padded on the left.
        attention_mask: 1 for a token, 0 for padding, `(b, t)`.
        about: What it was made with: model_type, config, weights, dtype, and the versions of the packages.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"],
        about: dict[str, str],
    ) -> None:
        self._tensors = tensors
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.about = about

    # What is in it ----------------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> Int[Tensor, " b"]:
        """Tokens of each prompt."""
        return self.attention_mask.sum(1)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._known(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _known(self, name: str) -> str:
        """A name, if it is one.

        Raises:
            SiteNotFound: Naming what there is.
        """
        if name in self._tensors:
            return name
        stem = name.rpartition(".")[0].rpartition(".")[0] if isinstance(name, str) else ""
        near = [known for known in self._tensors if known.startswith(f"{stem}.")] or list(self._tensors)
        raise SiteNotFound(f"This state has no {name!r}; it has {', '.join(near[:12])}{', …' * (len(near) > 12)}.")

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        tokens = self.lengths.tolist()
        size = sum(value.numel() * value.element_size() for value in self._tensors.values())
        lines = [f"State of {self.about['model_type']} after {tokens[0] if len(tokens) == 1 else tokens} tokens"]
        lines[0] += f" ({len(tokens)} prompt{'s' * (len(tokens) > 1)}, {size / 2**20:.1f} MiB)"
        lines.extend(f"  {name:<24} {tuple(value.shape)}" for name, value in self._tensors.items())
        return "\n".join(lines)

    # Changing it ------------------------------------------------------------------------------------------------------

    def __setitem__(self, name: str, value: Tensor) -> None:
        name = self._known(name)
        self._tensors[name] = matching(value, self._tensors[name], name).clone()

    def edited(self, changes: Mapping[str, Tensor | Callable[[Tensor], Tensor]]) -> State:
        """A copy with other tensors in it.

        Args:
            changes: Name -> tensor of the same shape, or function from the tensor to the new one. A ``*`` stands for
                all layers: ``{"layers.*.ssm.state": torch.zeros_like}``. Where a state has a unit (``ssm.scale``, in
                RWKV-4 and xLSTM), a tensor for it comes with the scale that belongs to it.

        Raises:
            SiteNotFound: For a name that is not there.
            BadInput: For a tensor of another shape or dtype, or a state without its unit.
        """
        copy = self.copy()
        for name, change in changes.items():
            unit = f"{name.removesuffix('.state')}.scale"
            if name.endswith(".state") and not callable(change) and unit not in changes and unit in self._tensors:
                raise BadInput(
                    f"{name} is in units of exp({unit}); give both, as they belong together (other[{unit!r}]), or a "
                    "function of the state."
                )
        for name, change in changes.items():
            names = fnmatch.filter(self._tensors, name) if "*" in name else [name]
            for found in names or [self._known(name)]:
                copy[found] = change(copy[found]) if callable(change) else change
        return copy

    def copy(self) -> State:
        """A copy that shares no memory."""
        return self.rows(range(len(self.input_ids)))

    def rows(self, rows: Sequence[int]) -> State:
        """A copy with some of the prompts, in this order, as often as they are named."""
        count = len(self.input_ids)
        given = rows.tolist() if isinstance(rows, torch.Tensor) else rows
        named = list(given) if isinstance(given, Sequence) else []
        if not named or not all(isinstance(row, int) and -count <= row < count for row in named):
            raise BadInput(
                f"rows={rows!r}; this state has prompts 0 to {count - 1}: give a list that names at least one of them."
            )
        index = torch.tensor(named, dtype=torch.long)
        tensors = {name: value[index.to(value.device)] for name, value in self._tensors.items()}
        mask = self.attention_mask[index]
        empty = int(mask.shape[1] - mask.sum(1).max())
        if empty:  # columns that are padding in all of them
            held = [mask.shape[1], *(value.shape[1] for name, value in tensors.items() if is_cached(name))]
            tensors = {
                name: value[:, -(max(held) - empty) :].clone() if is_cached(name) else value
                for name, value in tensors.items()
            }
        return State(tensors, self.input_ids[index][:, empty:], mask[:, empty:], dict(self.about))

    def repeat(self, times: int) -> State:
        """A copy with every prompt `times` times in a row, to go on from each in several ways."""
        if not isinstance(times, int) or times < 1:
            raise BadInput(f"times={times}; repeat a state a whole number of times, at least once.")
        return self.rows([row for row in range(len(self.input_ids)) for _ in range(times)])

    # Files ------------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it into a safetensors file; `load_state` reads it.

        Args:
            path: The file.
        """
        if not Path(path).absolute().parent.is_dir():
            raise BadInput(f"There is no folder {Path(path).parent} to write {Path(path).name} into; make it first.")
        tensors = {name: value.contiguous() for name, value in self._tensors.items()}
        # The names, because a file has them in an order of its own.
        metadata = {"format": FORMAT, "tokens": json.dumps(self.lengths.tolist()), "names": json.dumps(list(tensors))}
        metadata |= self.about
        save_file({**tensors, TOKENS: self.input_ids, MASK: self.attention_mask}, os.fspath(path), metadata)


def load_state(path: str | os.PathLike[str]) -> State:
    """Read what `State.save` has written.

    Raises:
        BadInput: If it is no such file.
        VersionMismatch: If it was written by a version of transformers or circuitbench that may mean something else.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"There is no file {path}; give one that State.save has written.")
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise BadInput(f"{path} is no safetensors file ({error}); give one that State.save has written.") from None
    if "circuitbench" not in about or not {TOKENS, MASK} <= tensors.keys():
        raise BadInput(f"{path} is a safetensors file, but no state; give one that State.save has written.")
    if about.pop("format") != FORMAT:
        raise VersionMismatch(
            f"{path} was written by circuitbench {about['circuitbench']}, whose states have another format than those "
            f"; install that version, or run the prefix again."
        )
    here = version("transformers")
    if minor(about["transformers"]) != minor(here):
        raise VersionMismatch(
            f"{path} was made with transformers {about['transformers']}, here is {here}, which may compute something "
            f"else; install transformers=={about['transformers']}, or run the prefix again."
        )
    about.pop("tokens")
    ordered = {name: tensors[name] for name in json.loads(about.pop("names"))}
    return State(ordered, tensors[TOKENS], tensors[MASK], about)


# Several as one -------------------------------------------------------------------------------------------------------


def in_order(states: list[State], groups: list[list[int]]) -> State:
    """States of several batches as one, the prompts where the groups say."""
    if len(states) == 1:
        whole = states[0]
    else:
        wide = max(state.input_ids.shape[1] for state in states)
        tensors = {name: torch.cat(left_padded([state[name] for state in states], name)) for name in states[0]}
        ids, mask = (
            torch.cat([torch.nn.functional.pad(value, (wide - value.shape[1], 0)) for value in values])
            for values in ([state.input_ids for state in states], [state.attention_mask for state in states])
        )
        whole = State(tensors, ids, mask, states[0].about)
    order = [row for rows in groups for row in rows]
    return whole if order == sorted(order) else whole.rows([order.index(row) for row in range(len(order))])


def is_cached(name: str) -> bool:
    """Whether a tensor has an axis of positions (keys and values), left-padded as the prompts."""
    return name.endswith((".attn.k", ".attn.v"))


def left_padded(values: list[Tensor], name: str) -> list[Tensor]:
    """Tensors of several batches that can be put together: keys and values get columns of padding in front."""
    if not is_cached(name):
        return values
    wide = max(value.shape[1] for value in values)
    return [torch.cat([v.new_zeros(v.shape[0], wide - v.shape[1], *v.shape[2:]), v], 1) for v in values]
