"""Training by what the model does with a reconstruction (Braun et al. 2024, arXiv:2405.12241), not by how near it is.

The model runs on the reconstruction, and the loss is the KL divergence of its next-token distributions from the clean
ones, plus the kind's own sparsity terms; and, where asked for, squared errors at the site itself (`local_weight`) or at
later sites (`downstream`). Tokens without a row (special ones) keep their own activation.

The model's gradient is taken in a trace, at the reconstruction, as a tensor; the dictionary's own graph goes on from
there. That is the chain rule, since what the dictionary reads does not depend on what it writes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..activations import ActivationStream, name_of, source_of
from ..errors import BadInput
from ..models.lock import lock_of
from ..models.prompts import encode
from ..tracing.addresses import read_site, resolve, write_site
from ..tracing.forward import forward
from .base import Dictionary
from .on_model import one_site
from .recipe import recipe
from .run import Run
from .training import TrainResult

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from ..activations.text import Text
    from ..models import Model
    from .batches import Batch

_SAMPLE = 4096  # rows that mean and variance are taken from


def train_end_to_end(
    model: Model,
    site: str,
    text: Text | ActivationStream,
    *,
    kind: str | None = None,
    site_out: str | None = None,
    start: Dictionary | None = None,
    d_dict: int | None = None,
    expansion: int | None = None,
    steps: int = 1000,
    local_weight: float = 0.0,
    downstream: str | Sequence[str] = (),
    downstream_weight: float = 1.0,
    context: int | None = None,
    prompts_per_forward: int | None = None,
    column: str | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> TrainResult:
    """Train a dictionary so that the model does the same on its reconstruction. A step is one forward's tokens.

    Args:
        model: The model. Its weights stay as they are.
        site: What is read.
        text: As for `train_sae`, but no store. Its token ids are kept in memory.
        kind: "topk", …; "topk" if not given, and that of `start` where there is one.
        site_out: What a transcoder replaces; not before `site` in the model.
        start: A dictionary trained on the site before, to go on from; its kind, sizes and settings hold.
        d_dict: Number of features; or give
        expansion: d_dict / d_in; 8 where neither is given.
        steps: Optimizer steps.
        local_weight: Of the squared error at the site, as a share of its variance.
        downstream: Later sites where the squared error counts as well, each as a share of its variance.
        downstream_weight: Of their mean.
        context: As for `train_sae`.
        prompts_per_forward: As for `train_sae`.
        column: As for `train_sae`.
        seed: Of the order of forwards and the initial directions.
        progress: Show a bar.
        **settings: Of `dictionaries.train`, such as k, l0, lr; not those of files and checkpoints.

    Returns:
        As `dictionaries.train`; `loss` in its history is that of all terms, with the KL in nats a token.

    Raises:
        SiteNotFound: For a site that is not there.
        BadInput: For a text without tokens, sites in another order than the model's, a `start` that does not fit.
    """
    written = site if site_out is None else site_out
    through = Through(model, one_site(model, site), one_site(model, written), downstream, downstream_weight)
    reading = {"context": context, "sequences_per_forward": prompts_per_forward, "column": column}
    stream = source_of(model, through.sites, text, **reading)
    if not isinstance(stream, ActivationStream):
        raise BadInput("stored activations were given; end-to-end training runs the model on text: give the text.")
    forwards = [ids for ids, _ in stream.forwards() if stream.kept(ids).any()]
    if not forwards:
        raise BadInput("The text has no tokens (special ones do not count); give some text.")

    sample = through.sample(forwards, stream)
    if start is not None:
        if kind is not None or d_dict is not None or expansion is not None:
            raise BadInput("start= settles kind and size; leave kind=, d_dict= and expansion= out.")
        kind, d_dict = start.kind, start.d_dict
        settings = {**start.settings, "skip": start.W_skip is not None, **settings}
    elif d_dict is None and expansion is None:
        expansion = 8
    shapes = {address: rows.shape[1] for address, rows in sample.items()}
    named = {"site": through.read, "site_out": through.write if site_out is not None else None}
    made = recipe(
        shapes, kind=kind or "topk", **named, d_dict=d_dict, expansion=expansion, steps=steps, seed=seed,
        batch_size=max(int(stream.kept(ids).sum()) for ids in forwards), **settings,
    )  # fmt: skip
    run = Run(made, sample)
    if start is not None:
        begin_with(run, start)

    started = time.perf_counter()
    rows = 0
    order = in_order(forwards, seed)
    for _ in tqdm(range(steps), disable=not progress, unit="step", desc=f"training {made.kind} end to end"):
        ids = next(order)
        kept = stream.kept(ids)
        batch = through.clean(ids, kept)
        rows += int(kept.sum())

        def error(target: Tensor, reconstruction: Tensor) -> Float[Tensor, ""]:
            loss = through.loss(reconstruction * run.target_scale)
            return loss + local_weight * (target - reconstruction).pow(2).mean() if local_weight else loss

        run.train_on(batch, error)
    result = run.finished()
    result.model_name = name_of(model)
    result.metadata["end_to_end"] = {"local_weight": local_weight, "downstream": through.later}
    seconds = time.perf_counter() - started
    return TrainResult(result, run.history, run.step, True, rows / seconds, made.to_dict(), run.diagnostics)


def begin_with(run: Run, start: Dictionary) -> None:
    """Put a finished dictionary into a run, in the run's units."""
    own, given = run.dictionary.state_dict(), start.state_dict()
    sizes = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (own, given))
    if len({tuple(sorted(found.items())) for found in sizes}) != 1 or start.transcodes != run.dictionary.transcodes:
        raise BadInput(
            f"start reads {start.d_in} and writes {start.d_out} numbers, and these sites have {run.dictionary.d_in} "
            f"and {run.dictionary.d_out}; give the sites it was trained on."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])
    run.dictionary.fold_scale(1 / run.scale, 1 / run.target_scale)


def in_order(forwards: list[Tensor], seed: int) -> Iterator[Tensor]:
    """Every forward once in random order, then in another, …"""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(forwards), generator=generator).tolist():
            yield forwards[index]


class Through:
    """One forward at a time: what it does clean, and what a replacement of a site costs, with the gradient.

    Attributes:
        read: The address a dictionary reads.
        write: The one that is replaced.
        later: Addresses where the error counts as well.
        sites: All that are needed of a clean run.
    """

    def __init__(
        self, model: Model, read: str, write: str, downstream: str | Sequence[str], downstream_weight: float
    ) -> None:
        self.model, self.read, self.write = model, read, write
        self.later = resolve(model, downstream) if downstream else []
        self.downstream_weight = downstream_weight
        self.sites = list(dict.fromkeys([read, write]))
        asked = [read, write, *self.later]
        if asked != sorted(asked, key=model.sites.index) or write in self.later:
            raise BadInput(
                f"site={read}, site_out={write}, downstream={self.later} are not in the model's order; what is read "
                "comes first, then what is replaced, then where it is judged."
            )
        self.found: dict[str, Tensor] = {}
        self.ids, self.kept = torch.zeros(0, 0), torch.zeros(0, 0)

    def sample(self, forwards: list[Tensor], stream: ActivationStream) -> Batch:
        """Rows that mean and variance are taken from: those of the first forwards."""
        parts: list[dict[str, Tensor]] = []
        for ids in forwards:
            parts.append(self.clean(ids, stream.kept(ids)))
            if sum(len(part[self.read]) for part in parts) >= _SAMPLE:
                break
        return {address: torch.cat([part[address] for part in parts]) for address in self.sites}

    def clean(self, ids: Int[Tensor, "b t"], kept: Bool[Tensor, "b t"]) -> dict[str, Tensor]:
        """Run the model as it is, and hold what it did; the rows of `sites`."""
        self.ids, self.kept = ids, kept
        self.found = forward(self.model, encode(self.model, ids), sites=[*self.sites, *self.later])
        return {address: precise(self.found[address].flatten(2)[kept]) for address in self.sites}

    def loss(self, rows: Float[Tensor, "n d_out"]) -> Float[Tensor, ""]:
        """What it costs to put these rows where the clean ones were, differentiable once."""
        return _Loss.apply(rows, self)

    def loss_and_gradient(self, rows: Float[Tensor, "n d_out"]) -> tuple[Tensor, Tensor]:
        """The same, with its gradient."""
        model, address, later, kept = self.model, self.write, self.later, self.kept
        inputs = encode(model, self.ids).inputs(model)
        own = self.found[address]
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            flat = own.flatten(2)
            replaced = flat.index_put(kept.to(own.device).nonzero(as_tuple=True), rows.to(own)).view(own.shape)
            with lock_of(model):
                with model.trace(**inputs):
                    found = nnsight.save({})
                    write_site(model, address, replaced)
                    for name in later:
                        found[name] = read_site(model, name)
                    found["logits"] = model.logits
            loss = kl(self.found["logits"], found["logits"])
            if later:
                errors = [share_of_variance(self.found[name], found[name]) for name in later]
                loss = loss + self.downstream_weight * torch.stack(errors).mean()
            return loss.detach(), torch.autograd.grad(loss, rows)[0]


class _Loss(torch.autograd.Function):
    """The model's loss on replaced rows; its gradient is taken at once, while the trace is there."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, through: Through) -> Tensor:
        loss, gradient = through.loss_and_gradient(rows)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.saved_tensors[0], None


def kl(clean: Float[Tensor, "b t vocab"], other: Float[Tensor, "b t vocab"]) -> Float[Tensor, ""]:
    """KL(clean ‖ other) of the next-token distributions, in nats, mean over tokens."""
    p, q = (precise(logits.flatten(0, 1)).log_softmax(-1) for logits in (clean, other))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def share_of_variance(clean: Tensor, other: Tensor) -> Float[Tensor, ""]:
    """The squared error over the variance around the mean token."""
    rows = precise(clean.flatten(2).flatten(0, 1))
    error = (rows - other.flatten(2).flatten(0, 1)).pow(2).sum()
    return error / (rows - rows.mean(0)).pow(2).sum()


def precise(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32 at least."""
    return values if values.dtype == torch.float64 else values.float()
