"""The state after a prompt: run a prefix once, look at what is left of it, change it, store it, go on from it."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import inspect
import json
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import BadInput, SiteNotFound, UnsupportedModel, VersionMismatch
from .caches import CacheKind, CacheParams, MiniMaxKind, RecurrentGemmaKind, RWKV7Kind, RwkvKind, XlstmKind
from .jobs import check_place
from .lock import lock_of
from .prompts import encode, padding_leak, takes_position_ids
from .remote import minor
from .spots import matching
from .starting import Start, start_run, taken
from .views import SSMView

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from .model import Model
    from .prompts import Batch, Prompts

FORMAT = "1"  # of the files
KINDS = {
    "minimax": MiniMaxKind,
    "xlstm": XlstmKind,
    "recurrent_gemma": RecurrentGemmaKind,
    "rwkv": RwkvKind,
    "rwkv7": RWKV7Kind,
}
NOT_THE_FUNCTION = ("transformers_version", "architectures", "dtype", "use_cache", "max_inference_chunksize")
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


# Running --------------------------------------------------------------------------------------------------------------


def run_prefix(model: Model, prompt: Prompts, *, remote: bool | str = False) -> State:
    """Run prompts, and keep what the tokens after them depend on.

    Args:
        model: The model.
        prompt: A prompt, or several (see `prompts.encode`); `continue_from` goes on with each of them.
        remote: ``True``, ``"local"`` or a server's address: where to run.

    Returns:
        The state after the last token.

    Raises:
        UnsupportedModel: For a model that keeps its state where circuitbench does not know.
        BadInput: For prompts that do not fit.
    """
    check_place(model, remote)
    kind = kind_of(model)
    batch = encode(model, prompt)
    # Where padding would leak into a prompt's first tokens, prompts of one length run together.
    groups = [list(range(len(batch.input_ids)))]
    if batch.padded and padding_leak(model):
        groups = by_length(batch.lengths)
    if by_row(model):
        groups = apart(groups, batch.lengths)
    states = [prefix(model, kind, picked(batch, rows), remote) for rows in groups]
    return in_order(states, groups)


def prefix(model: Model, kind: CacheKind, batch: Batch, remote: bool | str) -> State:
    """`run_prefix`, of one batch."""
    start = Start(kind, None, batch.attention_mask, batch.input_ids.shape[1], False, False, [], [])
    with lock_of(model), torch.no_grad(), started(model, start):
        with model.trace(**batch.inputs(model), use_cache=True, remote=remote):
            found = nnsight.save(taken(model, start))
    return State(found, batch.input_ids, batch.attention_mask, about(model))


def advanced(model: Model, state: State, batch: Batch, rows: list[int], remote: bool | str) -> State:
    """The state after some more tokens of some of its prompts (those `rows`); the others stay where they are."""
    groups = by_length(batch.lengths)
    if by_row(model):
        groups = apart(groups, batch.lengths)
    states, order = [], []
    for group in groups:
        part, before = picked(batch, group), state.rows([rows[row] for row in group])
        start = starting_from(model, before, part.input_ids.shape[1])
        with lock_of(model), torch.no_grad(), started(model, start):
            with model.trace(input_ids=part.input_ids, use_cache=True, remote=remote):
                found = nnsight.save(taken(model, start))
        states.append(followed(before, part, found))
        order.append([rows[row] for row in group])
    rest = [row for row in range(len(state.input_ids)) if row not in rows]
    if rest:
        states.append(state.rows(rest))
        order.append(rest)
    return in_order(states, order)


def followed(state: State, batch: Batch, tensors: dict[str, Tensor]) -> State:
    """The state of what a state's prompts and a batch of suffixes make together."""
    ids = torch.cat([state.input_ids, batch.input_ids], 1)
    mask = torch.cat([state.attention_mask, batch.attention_mask], 1)
    return State(tensors, ids, mask, dict(state.about))


@contextlib.contextmanager
def started(model: Model, start: Start) -> Iterator[None]:
    """Let the runs inside the block start from a state, before every other block of theirs."""
    with lock_of(model):
        edits = len(model.nn._edits)
        with model.nn.edit(inplace=True):
            start_run(model, start)
        ours = model.nn._edits.pop(edits)
        model.nn._edits.insert(0, ours)
    try:
        with warnings.catch_warnings():
            # The edit waits for a next forward when the last one is over; that is how it ends, and not worth a warning.
            warnings.filterwarnings("ignore", message=f"'{re.escape(model.nn.path)}.input.* was never reached")
            yield
    finally:
        model.nn._edits.remove(ours)


def starting_from(model: Model, state: State, length: int) -> Start:
    """What a run needs that goes on from a state with `length` tokens of each prompt."""
    kind = kind_of(model)
    scans = [
        (layer.index, name, part)
        for layer in model.layers
        for name, part in layer._parts.items()
        if isinstance(part, SSMView)
    ]
    restarted = [(layer, name) for layer, name, part in scans if not part._scan.continues]
    return Start(
        kind,
        dict(state._tensors),
        state.attention_mask,
        length,
        takes_position_ids(model),
        any(name.endswith(".attn.k") for name in state),
        restarted,
        limits(model),
    )


def limits(model: Model) -> list[tuple[int, str, float, float]]:
    """(layer, part, low, high) of scans whose dt has limits; transformers does not apply them to single steps."""
    found = []
    for layer in model.layers:
        for name, part in layer._parts.items():
            if isinstance(part, SSMView) and "dt" in part.sites:
                low, high = getattr(part._envoy._module, "time_step_limit", None) or (0.0, torch.inf)
                if low > 0 or high < torch.inf:
                    found.append((layer.index, name, float(low), float(high)))
    return found


def by_row(model: Model) -> bool:
    """Whether one token that follows a cached past has to come without others beside it in the batch."""
    return KINDS.get(model.hf.config.model_type, CacheKind).by_row


def kind_of(model: Model) -> CacheKind:
    """The adapter for a model's cache.

    Raises:
        UnsupportedModel: For a model whose forward takes no cache that is known.
    """
    parts = []
    for layer in model.layers:
        recurrent = [name for name in layer._parts if name not in ("attn", "mlp", "moe")]
        parts.append(recurrent[0] if recurrent else "ssm")
    hf: Any = model.hf
    if hf.config.model_type in KINDS:
        return KINDS[hf.config.model_type](parts)
    arguments = inspect.signature(type(hf).forward).parameters
    for kind in (CacheKind, CacheParams):
        if kind.argument in arguments:
            return kind(parts)
    raise UnsupportedModel(
        f"{type(hf).__name__}.forward takes neither past_key_values nor cache_params, so circuitbench does not know "
        "where it keeps its state between two forwards; run the whole sequence at once."
    )


def fitted(state: State, count: int) -> State:
    """A state for this number of suffixes.

    Raises:
        BadInput: If it is of another number of prompts, and not of one.
    """
    rows = len(state.input_ids)
    if rows == count:
        return state
    if rows == 1:
        return state.repeat(count)
    raise BadInput(
        f"The state is of {rows} prompts, and there {'is 1 suffix' if count == 1 else f'are {count} suffixes'}; give "
        f"{rows}, one for each, or a state of one prompt (state.rows([0])), which all suffixes follow."
    )


# Batches --------------------------------------------------------------------------------------------------------------


def by_length(lengths: Int[Tensor, " b"]) -> list[list[int]]:
    """Which prompts are of one length."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths.tolist()):
        groups.setdefault(length, []).append(row)
    return list(groups.values())


def apart(groups: list[list[int]], lengths: Int[Tensor, " b"]) -> list[list[int]]:
    """The same groups, but that prompts of one token run alone."""
    return [one for rows in groups for one in ([[row] for row in rows] if lengths[rows[0]] == 1 else [rows])]


def picked(batch: Batch, rows: list[int]) -> Batch:
    """Some prompts of a batch, without columns that are padding in all of them."""
    return type(batch)(batch.input_ids[rows], batch.attention_mask[rows]).rows(0, len(rows))


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


# Which model it is of -------------------------------------------------------------------------------------------------


def about(model: Model) -> dict[str, str]:
    """What a state has to fit: the model, its weights, the versions of the packages."""
    from .. import __version__  # here, because this package is imported before it has one

    return {
        "model_type": model.hf.config.model_type,
        "config": config_mark(model),
        "weights": weights_mark(model),
        "dtype": str(next(model.hf.parameters()).dtype),
        "circuitbench": __version__,
        "transformers": version("transformers"),
    }


def check_fits(model: Model, state: State) -> None:
    """Refuse a state of another model.

    Raises:
        BadInput: Saying in what they differ.
    """
    if not isinstance(state, State):
        raise BadInput(f"A state comes from run_prefix or load_state; this is a {type(state).__name__}.")
    here, there = about(model), state.about
    again = "Run the prefix on this model: run_prefix(model, prompt)."
    if there["model_type"] != here["model_type"]:
        raise BadInput(f"This state is of a {there['model_type']}, and the model is a {here['model_type']}. {again}")
    if there["config"] != here["config"]:
        raise BadInput(f"This state is of a {there['model_type']} of another configuration than the model's. {again}")
    if there["dtype"] != here["dtype"]:
        raise BadInput(f"This state is of a model in {there['dtype']}, and the model is in {here['dtype']}. {again}")
    if there["weights"] and here["weights"] and there["weights"] != here["weights"]:
        raise BadInput(f"This state is of a {there['model_type']} with other weights than the model's. {again}")


def config_mark(model: Model) -> str:
    """A short digest of the configuration, as far as it says what the model computes."""
    given = model.hf.config.to_dict()
    said = {key: value for key, value in given.items() if key not in NOT_THE_FUNCTION and not key.startswith("_")}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MARKS: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def weights_mark(model: Model) -> str:
    """A short digest of all weights; empty where they are not here.

    Of the bits of every parameter, as integers, their sum and that of every second one: exact, so that threads, device
    and order do not matter. Taken anew when a weight has changed.
    """
    hf: Any = model.hf
    if model.device.type == "meta":
        return ""
    if hf.config.model_type == "rwkv" and hf.rwkv.training == hf.rwkv.layers_are_rescaled:
        hf.rwkv._rescale_layers()  # as its next forward would
    now = [(parameter.data_ptr(), parameter._version) for parameter in hf.parameters()]
    before, mark = _MARKS.get(hf, (None, ""))
    if before != now:
        sums = []
        for parameter in hf.parameters():
            bits = parameter.detach().flatten().view(INTEGERS[parameter.element_size()])
            sums += [bits.sum(dtype=torch.int64), bits[::2].sum(dtype=torch.int64)]
        mark = hashlib.sha256(torch.stack([value.cpu() for value in sums]).numpy().tobytes()).hexdigest()[:16]
        _MARKS[hf] = (now, mark)
    return mark
