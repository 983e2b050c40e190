"""Training in several processes, as torchrun starts them: dictionaries are divided among them, or each batch's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from circuitbench.dictionaries.batches import Batch, rows_of, taken
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Bool

WAYS = ("dictionaries", "batches")
Made = TypeVar("Made")


class World:
    """The processes among which the rows of a batch are divided. One process alone has all of them.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @staticmethod
    def initialised(distributed: str) -> World:
        """All processes; BadInput if there are none, or `distributed` is not a way to divide work."""
        if distributed not in WAYS:
            raise BadInput(f"distributed={distributed!r} was given; it is one of {', '.join(map(repr, WAYS))}.")
        if not (dist.is_available() and dist.is_initialized()):
            raise BadInput(
                f"distributed={distributed!r} needs several processes; start the script with "
                '`torchrun --nproc-per-node=2 script.py`, and call torch.distributed.init_process_group("gloo") '
                '("nccl" on GPUs) in it.'
            )
        return World(dist.get_rank(), dist.get_world_size())

    def share(self, batch: Batch) -> Batch:
        """This process's rows."""
        n = rows_of(batch) // self.size
        return batch if self.size == 1 else taken(batch, slice(self.rank * n, (self.rank + 1) * n))

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over all processes, in one message for each dtype."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for same in by_dtype.values():
            message = torch.cat([tensor.reshape(-1) for tensor in same])
            dist.all_reduce(message)
            message /= self.size
            for tensor, mean in zip(same, message.split([tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def any_(self, mask: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Where the mask is true in any process."""
        if self.size == 1:
            return mask
        counts = mask.to(torch.int32)
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        return counts.bool()

    def stops(self, wanted: bool, device: torch.device) -> bool:
        """Whether any process was asked to stop: all of them then do, after the same step."""
        return wanted if self.size == 1 else bool(self.any_(torch.tensor([wanted], device=device)).item())

    def first_does(self, work: Callable[[], None]) -> None:
        """Let the first process do something while the others wait; an error in it is raised in all."""
        if self.size == 1:
            return work()
        error = None
        if self.rank == 0:
            try:
                work()
            except BadInput as raised:
                error = raised
        said = [None if error is None else str(error)]
        dist.broadcast_object_list(said, src=0)
        if error is not None:
            raise error
        if said[0] is not None:
            raise BadInput(said[0])

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def is_first() -> bool:
    """Whether this is the process that writes what all have."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def divided(world: World, n: int, train: Callable[[list[int]], Made]) -> Made:
    """Let every process train its share of `n` dictionaries, every `size`-th one; an error in one is raised in all."""
    mine = list(range(world.rank, n, world.size))
    trained, error = None, None
    try:
        trained = train(mine)
    except BadInput as raised:
        error = raised
    said: list[Any] = [None] * world.size
    dist.all_gather_object(said, None if error is None else str(error))
    if error is not None:
        raise error
    failed = [f"process {rank}: {text}" for rank, text in enumerate(said) if text is not None]
    if failed:
        raise BadInput("; ".join(failed))
    assert trained is not None  # no error
    return trained


def check_shares(world: World, batch_size: int, distributed: str, has_out: bool) -> None:
    """Refuse what cannot be divided."""
    if distributed == "batches" and batch_size % world.size:
        raise BadInput(f"batch_size={batch_size} cannot be divided among {world.size} processes; give a multiple.")
    if distributed == "dictionaries" and not has_out:
        raise BadInput(
            "distributed='dictionaries' needs `out`, a folder for each dictionary that all processes can read."
        )
