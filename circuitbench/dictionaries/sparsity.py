"""How many features are active on a row, where a kind does not fix it: by a weight, or by one steered to a target L0.

`sparsity` is a weight of the kind's own penalty. With `l0` the weight follows the measured L0: its logarithm moves with
log(L0 / target), summed over steps and in proportion, so that it comes to rest where L0 is the target. It is kept in
the memory of the run, which checkpoints hold.

Training begins where features are rare: biases are set such that about `l0` of them are active on a row of a sample,
all equally often (as in Conerly et al. 2025, "Dictionary learning optimization techniques"). From half of all features
active on a row, which is what biases of 0 give, the way to the target would take most of a short run, with dense
products all the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float

    from circuitbench.dictionaries.base import Dictionary, Objective, Step

L0 = 32.0
OPTIONS: Mapping[str, Any] = {"l0": None, "sparsity": None, "sparsity_warmup": 0.1, "dead_weight": 0.0}

_MEMORY = "sparsity"  # in the memory of the run: log of the weight without and with the proportional part
_SUMMED = 0.01  # a step, at least
_SUMMED_RUN = 20.0  # over a run, at least: a short one must get there, too
_PROPORTIONAL = 1.0


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if they are in range and do not contradict each other; a target L0 where none of both is given."""
    options = {**OPTIONS, **options}
    if options["l0"] is not None and options["sparsity"] is not None:
        raise BadInput(
            f"l0={options['l0']} and sparsity={options['sparsity']} were given; give the number of active features "
            "that is wanted, or the weight of the penalty, not both."
        )
    if options["l0"] is None and options["sparsity"] is None:
        options["l0"] = L0
    if options["l0"] is not None and options["l0"] <= 0:
        raise BadInput(f"l0={options['l0']} was given; it must be more than 0.")
    for name in ("sparsity", "dead_weight"):
        if options[name] is not None and options[name] < 0:
            raise BadInput(f"{name}={options[name]} was given; it must be at least 0.")
    if not 0 <= options["sparsity_warmup"] <= 1:
        raise BadInput(f"sparsity_warmup={options['sparsity_warmup']} is a share of the run, from 0 to 1.")
    return options


def weight(step: Step) -> Float[Tensor, ""] | float:
    """Of the penalty, at this step."""
    if step.options["l0"] is not None:
        return step.memory[_MEMORY][1].exp()
    return step.options["sparsity"] * min(1.0, step.progress / max(step.options["sparsity_warmup"], 1e-9))


@torch.no_grad()
def begin(
    dictionary: Dictionary, x: Float[Tensor, "n d_in"], options: Mapping[str, Any], memory: dict[str, Tensor]
) -> None:
    """Before a run: biases such that features are active about equally often, and rarely; and a first weight."""
    wanted = L0 if options["l0"] is None else options["l0"]
    scores = dictionary.preactivations(x)
    count = min(len(x), max(1, round(len(x) * wanted / dictionary.d_dict)))
    smallest = scores.topk(count, dim=0).values[-1]
    for name in dictionary.float32:
        smallest = smallest - getattr(dictionary, name)
    dictionary.encoder_bias.sub_(smallest.clamp_min(0))
    memory[_MEMORY] = torch.zeros(2, device=x.device)


@torch.no_grad()
def follow(objective: Objective, step: Step) -> None:
    """After a step: more weight where too many features were active, less where too few were."""
    target = step.options["l0"]
    if target is None:
        return
    excess = (objective.code.l0.float() / target).clamp(0.1, 10).log()
    summed = step.memory[_MEMORY][0] + max(_SUMMED, _SUMMED_RUN / step.steps) * excess
    step.memory[_MEMORY] = torch.stack([summed, summed + _PROPORTIONAL * excess])
