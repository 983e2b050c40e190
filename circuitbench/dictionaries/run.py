"""One dictionary in training: what changes from step to step, and so what a checkpoint holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitbench.dictionaries.base import Dictionary, Objective, Step
from circuitbench.dictionaries.batches import Batch, X, rows_of
from circuitbench.dictionaries.diagnostics import outlier_severity
from circuitbench.dictionaries.distributed import ALONE, World
from circuitbench.dictionaries.recipe import Recipe
from circuitbench.dictionaries.resampling import resample
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float

History = dict[str, list[int | float]]
HISTORY = ("step", "loss", "fvu", "l0", "dead_share")
_FEW = 4096  # rows that a kind begins with
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Run:
    """A dictionary in training.

    While training, every site has variance 1 (the mean over its components): learning rates and sparsity weights then
    mean the same whatever the scale of the activations. `finished` puts the scale back.

    Attributes:
        dictionary: of the scaled activations.
        rows_since_active: `(d_dict,)`.
        memory: what the kind remembers from step to step.
        name: what it is called among others; "" where it is alone.
        diagnostics: what the activations say before training: `gamma` (`diagnostics.outlier_severity`) of what is
            read, each site in units of its own, and `rows`, how many it was seen on.
    """

    def __init__(self, recipe: Recipe, sample: Batch, name: str = "", world: World = ALONE) -> None:
        self.recipe = recipe
        self.name = name
        self.world = world
        x, target = self._rows(sample)
        mean, self.scale = mean_and_scale(x, recipe.widths.values())
        target_mean, self.target_scale = (mean, self.scale) if target is x else mean_and_scale(target)
        # The variances of x / scale add up to d_in, however many sites there are.
        gamma = outlier_severity(mean / self.scale, torch.ones(recipe.d_in, device=x.device))
        self.diagnostics: dict[str, float] = {"gamma": gamma, "rows": len(x)}
        self.dictionary = recipe.build().to(x.device)
        if recipe.precision == "bfloat16":
            self.dictionary.product_dtype = torch.bfloat16
        self.dictionary.start_at(mean / self.scale, target_mean / self.target_scale)
        self.parameters = [parameter for parameter in self.dictionary.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=recipe.lr, betas=(0.9, 0.999), fused=True)
        self.rows_since_active = torch.zeros(recipe.d_dict, dtype=torch.int64, device=x.device)
        self.memory: dict[str, Tensor] = {}
        few = x[:: max(1, len(x) // _FEW)].to(self.dictionary.b_dec)
        self.dictionary.begin(few / self.scale.to(few), recipe.options, self.memory)
        self.step = 0
        self.history: History = {name: [] for name in HISTORY}
        self.scale, self.target_scale = (scale.to(self.dictionary.b_dec) for scale in (self.scale, self.target_scale))

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        reads = self.recipe.reads
        x = batch[reads[0]] if len(reads) == 1 else torch.cat([batch[name] for name in reads], 1)
        return x, batch[self.recipe.writes[0]] if self.recipe.writes else x

    def scaled(self, batch: Batch) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """What is read and what is to be reconstructed, each with variance 1."""
        raw_x, raw_target = self._rows(batch)
        x = raw_x.to(self.dictionary.b_dec) / self.scale
        return x, x if raw_target is raw_x else raw_target.to(self.dictionary.b_dec) / self.target_scale

    def train_on(
        self, batch: Batch, error: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> dict[str, int | float] | None:
        """One optimizer step, and its entry in the history if it is due.

        Args:
            batch: the rows.
            error: what a reconstruction costs, if not the squared error (see `Step.error`).
        """
        recipe, dictionary = self.recipe, self.dictionary
        share = self.world.share(batch)
        x, target = self.scaled(share)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(self.step)
        self._set_k(recipe.k_at(self.step))
        dead = (self.rows_since_active > recipe.dead_after).nonzero().squeeze(1)
        progress = self.step / recipe.steps
        step = Step(progress, dead, recipe.options, recipe.decoder_norm, self.memory, recipe.steps, error)
        objective = dictionary.objective(x, target, step)
        self.optimizer.zero_grad()
        # nnsight wraps `loss.backward()`, and looks for a trace in our source at every step
        torch.autograd.backward(objective.loss)
        self.world.average_(parameter.grad for parameter in self.parameters if parameter.grad is not None)
        if recipe.decoder_norm == "tangent":
            remove_radial_gradient(dictionary)
        if recipe.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, recipe.max_grad_norm)
        self.optimizer.step()
        if recipe.decoder_norm != "free":
            dictionary.normalize_decoder()
        dictionary.after_step(objective, step)
        self._count(objective, rows_of(batch))
        self.step += 1
        if recipe.resamples_after(self.step):
            self._resample(batch)
        if self.step % recipe.log_every and self.step != recipe.steps:
            return None
        return self._entry(objective, target, len(dead), batch)

    def _set_k(self, k: int | None) -> None:
        if k is not None:
            vars(self.dictionary)["k"] = k

    def _count(self, objective: Objective, n_rows: int) -> None:
        """Note which features were active, and agree with the other processes on what the kind keeps running."""
        world = self.world
        self.rows_since_active += n_rows
        if world.size == 1:
            self.rows_since_active[objective.code.active_features()] = 0
            return
        active = torch.zeros_like(self.rows_since_active, dtype=torch.bool)
        active[objective.code.active_features()] = True
        self.rows_since_active[world.any_(active)] = 0
        kept = [*self.dictionary.buffers(), *self.memory.values()]
        world.average_(tensor for tensor in kept if tensor.is_floating_point())

    def _resample(self, batch: Batch) -> None:
        """Dead features begin anew; every process sees the whole batch here, and does the same."""
        recipe = self.recipe
        dead = (self.rows_since_active > recipe.dead_after).nonzero().squeeze(1)
        if len(dead):
            fresh = recipe.build().to(dead.device)
            changed = resample(
                self.dictionary,
                fresh,
                self.optimizer,
                *self.scaled(batch),
                dead,
                seed=recipe.seed,
                step=self.step,
                scale=recipe.resample_scale,
            )
            self.rows_since_active[changed] = 0

    def _entry(self, objective: Objective, target: Tensor, n_dead: int, batch: Batch) -> dict[str, int | float]:
        """What the history says of a step; an error if the loss is not finite."""
        loss = objective.loss.detach()
        means = torch.stack([loss, (target - objective.reconstruction).pow(2).mean(), objective.code.l0.to(loss)])
        self.world.average_([means])
        mean_loss, fvu, l0 = means.tolist()
        if not math.isfinite(mean_loss):
            broken = [name for name, rows in batch.items() if not torch.isfinite(rows).all()]
            cause = "the activations of this batch are not finite" if broken else f"lr={self.recipe.lr:g} is too high"
            raise BadInput(f"the loss is {mean_loss} at step {self.step}: {cause}.")
        values = (self.step, mean_loss, fvu, l0, n_dead / self.recipe.d_dict)
        entry: dict[str, int | float] = dict(zip(HISTORY, values, strict=True))
        for name, value in entry.items():
            self.history[name].append(value)
        return entry

    def finished(self) -> Dictionary:
        """The dictionary of the activations as they come, with decoder rows of length 1; the run is left as it is."""
        recipe = self.recipe
        self._set_k(recipe.settings.get("k"))
        dictionary = copy.deepcopy(self.dictionary)
        dictionary.product_dtype = None
        if recipe.decoder_norm == "free":
            dictionary.fold_decoder_norm()
        dictionary.fold_scale(self.scale, self.target_scale)
        if recipe.reads[0] != X and len(recipe.reads) == 1:
            dictionary.site, dictionary.site_out = recipe.reads[0], (*recipe.writes, recipe.reads[0])[0]
        dictionary.metadata["training"] = {**recipe.to_dict(), "diagnostics": self.diagnostics}
        return dictionary.requires_grad_(False).eval()

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as a checkpoint holds it."""
        found = {"rows_since_active": self.rows_since_active, "scale": self.scale, "target_scale": self.target_scale}
        found |= {f"memory.{name}": value for name, value in self.memory.items()}
        found |= {f"dictionary.{name}": value for name, value in self.dictionary.state_dict().items()}
        for name, parameter in self.dictionary.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            found |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS if moment in state}
        return found

    def restore(self, tensors: dict[str, Tensor], step: int, history: History) -> None:
        """Go on from what `tensors` gave."""
        self.step, self.history = step, history
        self.rows_since_active.copy_(tensors["rows_since_active"])
        self.scale, self.target_scale = (tensors[name].to(self.scale) for name in ("scale", "target_scale"))
        self.memory = {
            name.removeprefix("memory."): value.to(self.scale.device)
            for name, value in tensors.items()
            if name.startswith("memory.")
        }
        with torch.no_grad():
            for name, own in self.dictionary.state_dict().items():
                own.copy_(tensors[f"dictionary.{name}"])
        for name, parameter in self.dictionary.named_parameters():
            if f"{_MOMENTS[0]}.{name}" in tensors:
                moments = {m: torch.zeros_like(parameter).copy_(tensors[f"{m}.{name}"]) for m in _MOMENTS}
                count = torch.tensor(float(step), device=parameter.device)
                self.optimizer.state[parameter] = {"step": count, **moments}


def remove_radial_gradient(dictionary: Dictionary) -> None:
    """Leave the part of the decoder's gradient that turns its rows; what would lengthen them is undone anyway."""
    gradient = dictionary.W_dec.grad
    if gradient is not None:
        rows = dictionary.W_dec.detach()
        gradient -= (gradient * rows).sum(1, keepdim=True) / rows.pow(2).sum(1, keepdim=True).clamp_min(1e-30) * rows


def mean_and_scale(sample: Tensor, widths: Any = None) -> tuple[Tensor, Tensor]:
    """The mean row, and the root of the mean variance of a component; of each block, where there are several.

    Raises:
        BadInput: for values that are not finite, or no variance.
    """
    mean = sample.mean(0, dtype=torch.float64 if sample.device.type != "mps" else torch.float32)
    squares = torch.stack([(rows - mean).pow(2).sum(0) for rows in sample.split(16_384)]).sum(0) / len(sample)
    widths = list(widths or [sample.shape[1]])
    variances = [block.mean() for block in squares.split(widths)]
    for variance in variances:
        if not torch.isfinite(variance):
            raise BadInput(
                "the activations hold values that are not finite; look for the layer at which the model overflows."
            )
        if variance == 0:
            raise BadInput("the activations are all the same row; there is nothing to decompose.")
    if len(widths) == 1:
        return mean, variances[0].sqrt()
    return mean, torch.cat([v.sqrt().expand(width) for v, width in zip(variances, widths, strict=True)])
