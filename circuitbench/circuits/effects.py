"""Effects, measured: what one site at one layer and position does to a metric, by running the model with it changed.

An effect is metric(changed run) − metric(unchanged run). Nothing here is a gradient estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..errors import BadInput
from ..models.prompts import Batch, encode
from ..tracing import capture, resolve
from ..tracing.addresses import axes_by_address
from ..tracing.forward import forward
from ..tracing.interventions import Set
from .effect_map import EffectMap
from .metrics import bound

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from ..models import Model
    from ..models.prompts import Prompts
    from .metrics import Metric


def patch_effects(
    model: Model,
    clean: Prompts,
    corrupt: Prompts,
    site: str = "ssm.state",
    *,
    metric: Metric,
    direction: str = "noise",
    batch_size: int = 64,
    remote: bool | str = False,
    progress: bool = False,
) -> EffectMap:
    """What the metric owes to each layer and position of a site, by putting in its value from another prompt.

    Activation patching (Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262): one run for every layer
    and position, in which the site has the other prompt's value there and all that follows is computed from it. For
    ``ssm.state`` that is h_t: y_t and every later state follow.

    Args:
        model: The model.
        clean: One prompt.
        corrupt: Another one, of as many tokens.
        site: Name of a site inside the layers, such as ``"ssm.state"``, ``"ssm.out"`` or ``"resid_post"``; or one
            layer's address.
        metric: ``cb.logit_diff(answer, wrong)``, ``cb.prob(token)``, ``cb.circuits.loss``, or any function
            ``(logits (b, t, vocab), batch) -> (b,)``.
        direction: ``"noise"`` starts from `clean` and puts in what `corrupt` has: the effect is what is lost.
            ``"denoise"`` starts from `corrupt` and puts in what `clean` has: the effect is what is regained.
        batch_size: Cells (positions of one layer) a forward.
        remote: ``True``, ``"local"`` or a server's address: where to run.
        progress: Show a bar.

    Returns:
        metric(patched) − metric(base), layers × positions.

    Raises:
        BadInput: For more than one prompt, prompts of different length, or a metric that does not fit.
        SiteNotFound: For a site that no layer has.
    """
    if direction not in ("noise", "denoise"):
        raise BadInput(f'direction is "noise" (clean to corrupt) or "denoise" (corrupt to clean), not {direction!r}.')
    base, donor = one_prompt(model, clean, "clean"), one_prompt(model, corrupt, "corrupt")
    if base.input_ids.shape != donor.input_ids.shape:
        raise BadInput(
            f"clean has {base.input_ids.shape[1]} tokens and corrupt {donor.input_ids.shape[1]}; a position is patched "
            "from the same position, so give prompts of equally many tokens."
        )
    if direction == "denoise":
        base, donor = donor, base

    def values(address: str) -> Tensor:
        found, unit = with_unit(model, donor, address, remote)
        if unit is None:
            return found
        _, own = with_unit(model, base, address, remote)
        return found * (unit - own).exp()

    effects = measured(model, base, site, metric, values, f"patch {site}", batch_size, remote, progress)
    effects.donor = score(model, donor, bound(metric, model), remote)
    return effects


def ablation_effects(
    model: Model,
    prompt: Prompts,
    site: str = "ssm.state",
    *,
    metric: Metric,
    mode: str = "zero",
    batch_size: int = 64,
    remote: bool | str = False,
    progress: bool = False,
) -> EffectMap:
    """What the metric owes to each layer and position of a site, by removing what it carries there.

    Args:
        model: The model.
        prompt: One prompt.
        site: Name of a site inside the layers, such as ``"ssm.state"``; or one layer's address.
        metric: As in `patch_effects`.
        mode: ``"zero"`` sets it to zero; ``"mean"`` to its mean over the prompt's tokens.
        batch_size: Cells (positions of one layer) a forward.
        remote: ``True``, ``"local"`` or a server's address: where to run.
        progress: Show a bar.

    Returns:
        metric(ablated) − metric(unchanged), layers × positions.

    Raises:
        BadInput: For more than one prompt, another mode, or a metric that does not fit.
        SiteNotFound: For a site that no layer has.
    """
    if mode not in ("zero", "mean"):
        raise BadInput(f'mode is "zero" or "mean", not {mode!r}.')
    base = one_prompt(model, prompt, "prompt")

    def values(address: str) -> Tensor:
        found, unit = with_unit(model, base, address, remote)
        if mode == "zero":
            return torch.zeros_like(found)
        if unit is None:
            return found.mean(0, keepdim=True).expand_as(found)
        largest = unit.amax(0, keepdim=True)
        return (found * (unit - largest).exp()).mean(0, keepdim=True) * (largest - unit).exp()

    return measured(model, base, site, metric, values, f"ablate {site}", batch_size, remote, progress)


def with_unit(model: Model, batch: Batch, address: str, remote: bool | str) -> tuple[Tensor, Any]:
    """A site in a run of one prompt, `(t, ...)`; and the logarithm of its unit, where it has one.

    The states of RWKV-4 and xLSTM are kept in units of exp(``ssm.scale``), which depends on the prompt: what is put
    from one run into another has to be converted.
    """
    scale = f"{address.removesuffix('.state')}.scale"
    if not address.endswith(".state") or scale not in model.sites:
        return capture(model, batch.input_ids, address, remote=remote)[address][0], None
    found = capture(model, batch.input_ids, [address, scale], remote=remote)
    state, unit = found[address][0], found[scale][0]
    return state, unit.reshape(*unit.shape, *[1] * (state.dim() - unit.dim()))


def measured(
    model: Model,
    base: Batch,
    site: str,
    metric: Metric,
    values: Callable[[str], Tensor],
    label: str,
    batch_size: int,
    remote: bool | str,
    progress: bool,
) -> EffectMap:
    """One changed run for every cell.

    Args:
        values: From an address to what the site becomes, `(t, ...)`.
        label: Of the progress bar.
    """
    if batch_size < 1:
        raise BadInput(f"batch_size={batch_size}; measure at least 1 cell a forward.")
    by_layer = addresses_of(model, site)
    check = bound(metric, model)
    unchanged = score(model, base, check, remote)
    n = base.input_ids.shape[1]
    effects = torch.full((len(model.layers), n), torch.nan)
    with tqdm(total=n * len(by_layer), disable=not progress, desc=label, unit="cell") as bar:
        for layer, address in by_layer.items():
            replacement = values(address)
            for cells in torch.arange(n).split(batch_size):
                rows = Batch(base.input_ids.expand(len(cells), -1), base.attention_mask.expand(len(cells), -1))
                here = torch.nn.functional.one_hot(cells, n).bool()
                change = Set(
                    address, replacement[cells][:, None], positions=here
                )  # each row its own value, at its own cell
                logits = forward(model, rows, change, remote=remote)["logits"].cpu()
                effects[layer, cells] = (scores(check, logits, rows) - unchanged).float()
                bar.update(len(cells))
    return EffectMap(effects, token_texts(model, base), site, str(metric), unchanged)


def one_prompt(model: Model, prompt: Prompts, name: str) -> Batch:
    """A batch of exactly one prompt."""
    batch = encode(model, prompt)
    if len(batch.input_ids) != 1:
        raise BadInput(f"{name} holds {len(batch.input_ids)} prompts; an effect map is of one.")
    return batch


def addresses_of(model: Model, site: str) -> dict[int, str]:
    """Layer -> address, for every layer that has the site."""
    found = resolve(model, site if site.startswith("layers.") else f"layers.*.{site}")
    for address in found:
        if axes_by_address(model, address)[1] != "t":
            raise BadInput(
                f"{address} holds a matrix over positions; effects are measured at sites with one position axis."
            )
    return {int(address.split(".")[1]): address for address in found}


def score(model: Model, batch: Batch, metric: Metric, remote: bool | str) -> float:
    """The metric of one prompt in an unchanged run."""
    return float(scores(metric, forward(model, batch, remote=remote)["logits"].cpu(), batch))


def scores(metric: Metric, logits: Float[Tensor, "b t vocab"], batch: Batch) -> Float[Tensor, " b"]:
    """The metric of every row, checked."""
    found = metric(logits, batch)
    if not isinstance(found, torch.Tensor) or found.shape != logits.shape[:1]:
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise BadInput(
            f"The metric returned {got} for {len(logits)} rows of logits; it returns one number a row: (b,)."
        )
    return found.double()  # effects are small differences of it


def token_texts(model: Model, batch: Batch) -> list[str]:
    """The tokens of a single prompt, as text."""
    assert model.tokenizer is not None  # `load_model` gives every model one
    return [str(model.tokenizer.decode([index])) for index in batch.input_ids[0].tolist()]
