"""`capture` and `intervene`: read sites, and change them, for many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import nnsight
import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..errors import BadInput, RemoteError
from ..models.jobs import Pending, check_place
from ..models.lock import lock_of
from ..models.prompts import Batch, encode
from .addresses import axes_by_address, resolve
from .apply import run_plan
from .forward import forward
from .selection import Columns, listed, select

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from ..models import Model
    from ..models.prompts import Prompts
    from .interventions import Intervention, Knockout
    from .selection import Positions


class Activations(dict):
    """Address -> tensor. `[i, j]` is token j of prompt i; past the end of a shorter prompt there is NaN.

    A matrix over positions is `[i, head, query, key]`, both counted in the prompt's own tokens.

    Attributes:
        lengths: Real tokens of each prompt, `(b,)`.
    """

    def __init__(
        self,
        values: dict[str, Tensor],
        lengths: Int[Tensor, " b"],
        position_axes: dict[str, int],
        kept: int | None = None,
    ) -> None:
        """
        Args:
            values: The tensors.
            lengths: Real tokens of each prompt.
            position_axes: Which axis of each tensor counts positions (queries).
            kept: How many positions of each prompt were kept, if not all.
        """
        super().__init__(values)
        self.lengths = lengths
        self._position_axes = position_axes
        self._kept = kept

    def tokens(self, address: str) -> Float[Tensor, " n *rest"]:
        """All real tokens of a site (all queries of a matrix over positions), in order, without padding."""
        value = self[address].movedim(self._position_axes[address], 1)
        counts = [value.shape[1]] * len(value) if self._kept is not None else self.lengths.tolist()
        return torch.cat([value[row, :count] for row, count in enumerate(counts)])


@dataclass
class Result:
    """What a run with interventions gave.

    Attributes:
        logits: `(b, t, vocab)`, NaN past the end of a shorter prompt.
        sites: The sites asked for, by address.
        delta_norm: How far the output moved: the L2 norm of the difference of logits from a run without interventions,
            over all real tokens.
        lengths: Real tokens of each prompt.
    """

    logits: Float[Tensor, "b t vocab"]
    sites: dict[str, Tensor]
    delta_norm: float
    lengths: Int[Tensor, " b"] = field(repr=False)

    def __getitem__(self, address: str) -> Tensor:
        return self.sites[address]


@overload
def capture(
    model: Model,
    prompts: Prompts,
    sites: str | Sequence[str],
    *,
    positions: Positions = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    remote: bool | str = False,
    blocking: Literal[False],
    progress: bool = False,
) -> Pending[Activations]: ...


@overload
def capture(
    model: Model,
    prompts: Prompts,
    sites: str | Sequence[str],
    *,
    positions: Positions = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    remote: bool | str = False,
    blocking: Literal[True] = True,
    progress: bool = False,
) -> Activations: ...


def capture(
    model: Model,
    prompts: Prompts,
    sites: str | Sequence[str],
    *,
    positions: Positions = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    remote: bool | str = False,
    blocking: bool = True,
    progress: bool = False,
) -> Any:
    """Read sites for some prompts. The model stops as soon as the last of them has been read.

    Args:
        model: The model.
        prompts: What to run (see `prompts.encode`).
        sites: Addresses; ``"layers.*.ssm.gated"`` stands for every layer that has it.
        positions: Keep only these of each prompt's tokens (ints, in the order given; slice, ``"last"``); default all.
            For ``ssm.state`` this bounds the memory too. At a matrix over positions they are its queries.
        batch_size: Prompts per forward.
        device: Where the results go.
        out: Write one safetensors file per batch into this folder instead of keeping the results (address -> tensor,
            and ``lengths``), which holds no such file yet; the result then holds nothing but `lengths`.
        remote: ``True``, ``"local"`` or a server's address: where to run.
        blocking: ``False`` sends all batches to the server and returns at once: a `Pending`.
        progress: Show a bar.

    Returns:
        The activations, `[i, j]` for token j of prompt i.

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: For prompts or positions that do not fit, or a folder that holds other activations.
    """
    check_place(model, remote, blocking)
    addresses = resolve(model, sites)
    if not addresses:
        raise BadInput("sites names no site; give an address, or a list of them (print(model) lists them).")
    if batch_size < 1:
        raise BadInput(f"batch_size={batch_size}; capture at least 1 prompt a forward.")
    check_readable(model, addresses)
    batch = encode(model, prompts)
    chosen = None if positions is None else kept_indices(batch, positions)
    parts = [batch.rows(start, start + batch_size) for start in range(0, len(batch.input_ids), batch_size)]
    keeps = [None] * len(parts) if chosen is None else list(chosen.split(batch_size))
    pieces: list[dict[str, Tensor]] = []
    if out is not None:
        prepare_folder(Path(out))

    def receive(number: int, found: dict[str, Tensor]) -> None:
        """Put one batch where it belongs."""
        part = parts[number]
        kept = keeps[number] is not None
        found = {a: unpadded(model, part, a, value, kept).to(device) for a, value in found.items()}
        if out is None:
            pieces.append(found)
        else:
            shard = apart({**found, "lengths": part.lengths})
            save_file(shard, Path(out) / f"{number:06d}.safetensors")

    def finish(values: list[dict[str, Any]]) -> Activations:
        """All batches together."""
        for number, found in enumerate(values):
            receive(number, found["found"])
        return collected(batch.lengths)

    def collected(lengths: Tensor) -> Activations:
        """What has been captured so far."""
        axes = {address: axes_by_address(model, address).index("t") for address in addresses}
        return Activations(joined(pieces), lengths, axes, None if chosen is None else chosen.shape[1])

    if not blocking:
        return Pending([submitted(model, p, addresses, k, remote) for p, k in zip(parts, keeps, strict=True)], finish)
    bar = tqdm(zip(parts, keeps, strict=True), total=len(parts), disable=not progress, desc="capture", unit="batch")
    for number, (part, keep) in enumerate(bar):
        try:
            receive(number, captured(model, part, addresses, keep, remote))
        except RemoteError as error:
            error.partial = collected(batch.lengths[: number * batch_size])
            raise
    return finish([])


def captured(
    model: Model, batch: Batch, addresses: list[str], keep: Int[Tensor, "b k"] | None, remote: bool | str
) -> dict[str, Tensor]:
    """One forward's sites, as padded."""
    plan, columns, inputs, keep = prepared(model, batch, addresses, keep)
    stops = not model.nn._edits  # what is held may want to reach sites that come later
    with lock_of(model), torch.no_grad():
        with model.trace(**inputs, remote=remote) as tracer:
            found = nnsight.save(run_plan(model, plan, columns, keep))
            if stops:
                tracer.stop()
    return found


def submitted(
    model: Model, batch: Batch, addresses: list[str], keep: Int[Tensor, "b k"] | None, remote: bool | str
) -> Any:
    """As `captured`, sent off without waiting: the job's backend."""
    plan, columns, inputs, keep = prepared(model, batch, addresses, keep)
    with lock_of(model), torch.no_grad():
        with model.trace(**inputs, remote=remote, blocking=False) as sent:
            found = nnsight.save(run_plan(model, plan, columns, keep))  # noqa: F841 (comes back by name)
    return sent.backend


def prepared(model: Model, batch: Batch, addresses: list[str], keep: Int[Tensor, "b k"] | None) -> tuple:
    """What a capturing block refers to."""
    plan = [(address, [], True) for address in addresses]
    if keep is not None:
        keep = keep + (batch.input_ids.shape[1] - batch.lengths)[:, None]
    return plan, Columns(batch.columns(model), batch.lengths), batch.inputs(model), keep


def unpadded(model: Model, batch: Batch, address: str, value: Tensor, kept: bool = False) -> Tensor:
    """A site's tensor with every prompt's tokens moved to the front, on each axis that counts positions.

    Args:
        kept: Whether the first of them has been reduced to some positions, and is not padded any more.
    """
    axes = [axis for axis, name in enumerate(axes_by_address(model, address)) if name == "t"]
    for axis in axes[1:] if kept else axes:
        value = batch.unpadded(value.transpose(1, axis)).transpose(1, axis)
    return value


def joined(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches of different length as one tensor a site, NaN past the end of the shorter ones."""
    if not pieces:
        return {}
    out = {}
    for address in pieces[0]:
        parts = [piece[address] for piece in pieces]
        sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].dim())]
        if any(list(part.shape[1:]) != sizes for part in parts):
            parts = [padded_to(part, sizes) for part in parts]
        out[address] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out


def padded_to(part: Tensor, sizes: list[int]) -> Tensor:
    """`part` in the corner of a tensor of NaN."""
    out = part.new_full((part.shape[0], *sizes), torch.nan)
    out[tuple(slice(size) for size in part.shape)] = part
    return out


def kept_indices(batch: Batch, positions: Positions) -> Int[Tensor, "b k"]:
    """Token indices to keep, the same number for every prompt."""
    chosen = select(positions, batch.index, batch.lengths)
    if not isinstance(positions, (str, slice)) and not (torch.is_tensor(positions) and positions.dtype == torch.bool):
        wanted = torch.tensor(listed(positions, batch.lengths))[None]  # in the order given, as often as given
        return torch.where(wanted < 0, batch.lengths[:, None] + wanted, wanted)
    counts = chosen.sum(1)
    if (counts != counts[0]).any():
        raise BadInput(
            f"positions={positions!r} selects {counts.tolist()} tokens of the prompts; capture needs the same number "
            "of each. Capture all positions and index the result instead."
        )
    return batch.index[chosen].reshape(len(chosen), -1)


def prepare_folder(out: Path) -> None:
    """A folder for activations, which must not mix with those of another run."""
    if out.is_dir() and any(out.glob("*.safetensors")):
        raise BadInput(f"{out} holds safetensors files of another run; give an empty folder, or remove them.")
    out.mkdir(parents=True, exist_ok=True)


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, which safetensors does not store."""
    seen: set[int] = set()
    out = {}
    for name, value in tensors.items():
        value = value.contiguous()
        place = value.untyped_storage().data_ptr()
        out[name] = value.clone() if place in seen else value
        seen.add(place)
    return out


def check_readable(model: Model, addresses: list[str]) -> None:
    """Some sites take arguments, and so cannot be captured by address."""
    for address in addresses:
        if "channels" in axes_by_address(model, address):
            raise BadInput(
                f"{address} is one matrix for every channel; read it in a trace with mixing(channels=[...]) instead."
            )


@overload
def intervene(
    model: Model,
    prompts: Prompts,
    interventions: Intervention | Knockout | Sequence[Intervention | Knockout],
    sites: str | Sequence[str] = (),
    *,
    blocking: Literal[False],
    remote: bool | str = False,
) -> Pending[Result]: ...


@overload
def intervene(
    model: Model,
    prompts: Prompts,
    interventions: Intervention | Knockout | Sequence[Intervention | Knockout],
    sites: str | Sequence[str] = (),
    *,
    remote: bool | str = False,
) -> Result: ...


def intervene(
    model: Model,
    prompts: Prompts,
    interventions: Intervention | Knockout | Sequence[Intervention | Knockout],
    sites: str | Sequence[str] = (),
    *,
    remote: bool | str = False,
    blocking: bool = True,
) -> Any:
    """Run prompts with interventions.

    Args:
        model: The model.
        prompts: What to run (see `prompts.encode`).
        interventions: What to change; applied in the order the model reaches the sites, at one site in the given order.
        sites: Sites to return, as they are after the interventions.
        remote: ``True``, ``"local"`` or a server's address: where to run.
        blocking: ``False`` sends the runs to the server and returns at once: a `Pending`.

    Returns:
        Logits, sites, and how far the logits moved.

    Raises:
        SiteNotFound: For a site that is not there.
        ReadOnlySite: For a site that cannot be changed that way.
        BadInput: For positions, heads or shapes that do not fit.
    """
    check_place(model, remote, blocking)
    batch = encode(model, prompts)
    asked = resolve(model, sites) if sites else []

    def finish(values: list[dict[str, Any]]) -> Result:
        """The result of the run with interventions and of the one without."""
        found, base = (value["found"] for value in values)
        logits = found["logits"]
        moved = (logits.cpu().float() - base["logits"].cpu().float())[batch.attention_mask.bool()].norm().item()
        wanted = {address: unpadded(model, batch, address, found[address]) for address in asked}
        return Result(batch.unpadded(logits), wanted, moved, batch.lengths)

    runs = [forward(model, batch, items, a, remote, blocking) for items, a in ((interventions, asked), ((), ()))]
    return finish([{"found": found} for found in runs]) if blocking else Pending(runs, finish)
