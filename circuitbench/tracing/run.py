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

from ..errors import BadInput, ReadOnlySite, RemoteError
from ..models.jobs import Pending, check_blocking
from ..models.lock import lock_of
from ..models.prompts import Batch, encode
from .addresses import axes_by_address, resolve
from .apply import run_plan
from .interventions import Intervention, Knockout
from .selection import select

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from ..models import Model
    from ..models.prompts import Prompts
    from .selection import Positions


class Activations(dict):
    """Address -> tensor. `[i, j]` is token j of prompt i; past the end of a shorter prompt there is NaN.

    Attributes:
        lengths: Real tokens of each prompt, `(b,)`.
    """

    def __init__(self, values: dict[str, Tensor], lengths: Int[Tensor, " b"]) -> None:
        super().__init__(values)
        self.lengths = lengths

    def tokens(self, address: str) -> Float[Tensor, " n *rest"]:
        """All real tokens of a site, in order, without padding."""
        value = self[address]
        return torch.cat([value[row, : int(length)] for row, length in enumerate(self.lengths)])


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
        positions: Keep only these of each prompt's tokens (ints, slice, ``"last"``); default all. For ``ssm.state``
            this bounds the memory too.
        batch_size: Prompts per forward.
        device: Where the results go.
        out: Write one safetensors file per batch into this folder instead of keeping the results (address -> tensor,
            and ``lengths``); the result then holds nothing but `lengths`.
        remote: ``True``, ``"local"`` or a server's address: where to run.
        blocking: ``False`` sends all batches to the server and returns at once: a `Pending`.
        progress: Show a bar.

    Returns:
        The activations, `[i, j]` for token j of prompt i.

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: For prompts or positions that do not fit.
    """
    check_blocking(remote, blocking)
    addresses = resolve(model, sites)
    check_readable(model, addresses)
    batch = encode(model, prompts)
    chosen = None if positions is None else kept_indices(batch, positions)
    parts = [batch.rows(start, start + batch_size) for start in range(0, len(batch.input_ids), batch_size)]
    keeps = [None] * len(parts) if chosen is None else list(chosen.split(batch_size))
    pieces: list[dict[str, Tensor]] = []

    def receive(number: int, found: dict[str, Tensor]) -> None:
        """Put one batch where it belongs."""
        part = parts[number]
        if keeps[number] is None:
            found = {address: unpadded(model, part, address, value) for address, value in found.items()}
        found = {address: value.to(device) for address, value in found.items()}
        if out is None:
            pieces.append(found)
        else:
            Path(out).mkdir(parents=True, exist_ok=True)
            shard = {address: value.contiguous() for address, value in found.items()}
            save_file({**shard, "lengths": part.lengths}, Path(out) / f"{number:06d}.safetensors")

    def finish(values: list[dict[str, Any]]) -> Activations:
        """All batches together."""
        for number, found in enumerate(values):
            receive(number, found["found"])
        return Activations(joined(pieces), batch.lengths)

    if not blocking:
        return Pending([submitted(model, p, addresses, k, remote) for p, k in zip(parts, keeps, strict=True)], finish)
    bar = tqdm(zip(parts, keeps, strict=True), total=len(parts), disable=not progress, desc="capture", unit="batch")
    for number, (part, keep) in enumerate(bar):
        try:
            receive(number, captured(model, part, addresses, keep, remote))
        except RemoteError as error:
            error.partial = Activations(joined(pieces), batch.lengths[: number * batch_size])
            raise
    return finish([])


def captured(
    model: Model, batch: Batch, addresses: list[str], keep: Int[Tensor, "b k"] | None, remote: bool | str
) -> dict[str, Tensor]:
    """One forward's sites, as padded."""
    plan, index, lengths, inputs, columns = prepared(model, batch, addresses, keep)
    with lock_of(model), torch.no_grad():
        with model.trace(**inputs, remote=remote) as tracer:
            found = nnsight.save(run_plan(model, plan, index, lengths, False, columns))
            tracer.stop()
    return found


def submitted(
    model: Model, batch: Batch, addresses: list[str], keep: Int[Tensor, "b k"] | None, remote: bool | str
) -> Any:
    """As `captured`, sent off without waiting: the job's backend."""
    plan, index, lengths, inputs, columns = prepared(model, batch, addresses, keep)
    with lock_of(model), torch.no_grad():
        with model.trace(**inputs, remote=remote, blocking=False) as sent:
            found = nnsight.save(run_plan(model, plan, index, lengths, False, columns))  # noqa: F841 (comes back by name)
    return sent.backend


def prepared(model: Model, batch: Batch, addresses: list[str], keep: Int[Tensor, "b k"] | None) -> tuple:
    """What a capturing block refers to."""
    plan = [(address, [], True) for address in addresses]
    columns = None if keep is None else keep + (batch.input_ids.shape[1] - batch.lengths)[:, None]
    return plan, batch.index, batch.lengths, batch.inputs(model), columns


def unpadded(model: Model, batch: Batch, address: str, value: Tensor) -> Tensor:
    """A site's tensor with every prompt's tokens moved to the front, on each axis that counts positions."""
    for axis, name in enumerate(axes_by_address(model, address)):
        if name == "t":
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
    counts = chosen.sum(1)
    if (counts != counts[0]).any() or counts[0] == 0:
        raise BadInput(
            f"positions={positions!r} selects {counts.tolist()} tokens of the prompts; capture needs the same number, "
            "at least one, of each. Capture all positions and index the result instead."
        )
    return batch.index[chosen].reshape(len(chosen), -1)


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
    check_blocking(remote, blocking)
    batch = encode(model, prompts)
    plan = planned(model, interventions, resolve(model, sites) if sites else [])
    index, lengths, inputs = batch.index, batch.lengths, batch.inputs(model)

    def finish(values: list[dict[str, Any]]) -> Result:
        """The result of the run with interventions and of the one without."""
        found, base = values[0]["found"], values[1]["base"]
        logits = found["logits"]
        moved = (logits.cpu().float() - base.cpu().float())[batch.attention_mask.bool()].norm().item()
        wanted = {a: unpadded(model, batch, a, v) for a, v in found.items() if a != "logits" or "logits" in asked}
        return Result(batch.unpadded(logits), wanted, moved, lengths)

    asked = set(resolve(model, sites)) if sites else set()
    with lock_of(model), torch.no_grad():
        with model.trace(**inputs, remote=remote, blocking=blocking) as changed:
            found = nnsight.save(run_plan(model, plan, index, lengths, False))
        with model.trace(**inputs, remote=remote, blocking=blocking) as plain:
            base = nnsight.save(model.logits.detach())
    if not blocking:
        return Pending([changed.backend, plain.backend], finish)
    return finish([{"found": found}, {"base": base}])


def planned(
    model: Model, interventions: Intervention | Knockout | Sequence[Intervention | Knockout], sites: Sequence[str]
) -> list[tuple[str, list[Any], bool]]:
    """Interventions and wanted sites in the order the model reaches them; logits are always wanted."""
    items = [interventions] if isinstance(interventions, (Intervention, Knockout)) else list(interventions)
    by_address: dict[str, list[Any]] = {}
    for item in items:
        for address in targets(model, item):
            by_address.setdefault(address, []).append(item)
    wanted = {*sites, "logits"}
    return [(a, by_address.get(a, []), a in wanted) for a in model.sites if a in by_address or a in wanted]


def targets(model: Model, item: Intervention | Knockout) -> list[str]:
    """The addresses an intervention acts at.

    Raises:
        ReadOnlySite: For one that cannot be changed.
    """
    if isinstance(item, Knockout):
        stem = item.site.removesuffix(".mixing").removesuffix(".y")
        return resolve(model, f"{stem}.x")
    if not isinstance(item, Intervention):
        raise BadInput(f"An intervention is Set, Add, Scale, Ablate or Knockout, not {type(item).__name__}.")
    addresses = resolve(model, item.site)
    for address in addresses:
        if address.endswith(".ssm.mixing"):
            raise ReadOnlySite(
                f"{address} cannot be written; use Knockout(sources, destinations), or write x, B, C or decay."
            )
    return addresses
