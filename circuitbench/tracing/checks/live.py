"""A model under check: its prompts, its logits, its own rounding noise, and what was found so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from ...architectures import ARCHITECTURES
from ...errors import BadInput, JobFailed, RemoteError, VersionMismatch
from ...models import kernels
from ...models.lock import lock_of
from ...models.prompts import encode
from ..addresses import owner_of
from .blocks import roundings, untouched
from .report import Row

if TYPE_CHECKING:
    from torch import Tensor

    from ...models import Model
    from ...models.views import LayerView

LENGTHS = (13, 8)  # odd, and of different length: the second prompt is padded
FLOAT32, HALF = 1e-5, 3e-2  # differences that mean nothing, relative to the largest entry


@dataclass(frozen=True)
class Failure:
    """What went wrong where a number was expected."""

    why: str


class Live:
    """What every check is given.

    Attributes:
        model: The model.
        addresses: Sites that are checked; those that cannot be read are taken out.
        groups: Layers that are alike.
        first: The layers that stand for all that are alike.
        mask: Which columns of the prompts are real tokens, `(b, t)`.
        base: Logits of the prompts, nothing touched.
        floor: Relative differences up to this are rounding, in the model's dtype.
        noise: How far rounding moves the logits, relative to the largest.
        tolerance: How far logits may differ that should be equal.
        rows: What was found.
    """

    def __init__(self, model: Model, addresses: list[str], remote: bool | str, every_layer: bool) -> None:
        self.model = model
        self.addresses = addresses
        self.remote = remote
        self.rows: list[Row] = []
        self.groups = alike(model)
        self.first = [index for group in self.groups for index in (group if every_layer else group[:1])]
        self.weights_here = model.device.type != "meta"
        self.dtype = next(model.hf.parameters()).dtype
        self.half = self.dtype in (torch.bfloat16, torch.float16)
        self.lengths, self.inputs = prompts(model)
        self.mask = self.inputs["attention_mask"].bool()
        self.base: Tensor = self.run(untouched)["logits"]
        self.noise = 0.0
        self.floor = self.tolerance = HALF if self.half else FLOAT32

    def measure_noise(self) -> None:
        """Monte Carlo arithmetic (Parker 1997): the spread of a run whose tensors are rounded anew, by chance.

        Within a factor of two of the distance to the same model in float64, at no memory, and on a server too.
        """
        failed = {row.site for row in self.rows if row.ok is False}
        spots = [a for a in self.model.sites if self.kind(a) == "spot" and a != "logits" and a not in failed]
        moved = self.moved(roundings, spots, torch.finfo(self.dtype).eps)
        if isinstance(moved, Failure):  # by a site that is not checked, if only some are
            moved = self.moved(roundings, [a for a in spots if a in self.addresses], torch.finfo(self.dtype).eps)
        if isinstance(moved, Failure):
            self.unverified("model", "rounding noise", f"it could not be measured ({moved.why}), and is taken to be 0")
            return
        self.noise = moved
        self.tolerance = max(self.floor, 3 * self.noise)

    @property
    def exact(self) -> float:
        """What runs without a change may differ by: no bit, where torch code alone runs, in this process.

        A kernel of S6 multiplies by the gate itself; where that is taken out to serve y, the product rounds elsewhere.
        """
        scan = getattr(kernels.modeling_module(self.model.hf), "mamba_selective_scan", None)
        plain = self.remote in (False, "local") and kernels.kernel_package(scan) is None
        return 0.0 if plain else self.tolerance

    @property
    def columns(self) -> Tensor:
        """Which columns of the layers are no padding, `(b, columns)`: the meta tokens stand before a prompt's first."""
        return torch.cat([self.mask, self.mask.new_ones(len(self.mask), self.model.meta_tokens)], 1)

    # Running ----------------------------------------------------------------------------------------------------------

    def run(
        self, block: Callable[..., dict[str, Any]], *given: Any, gradients: bool = False, **inputs: Tensor
    ) -> dict[str, Any]:
        """A block in a trace of the prompts (or of other inputs), with or without gradients."""
        model, inputs = self.model, inputs or self.inputs
        with lock_of(model), torch.set_grad_enabled(gradients):
            with model.trace(**inputs, remote=self.remote):
                found = nnsight.save(block(model, *given))
        return found

    def attempt(self, block: Callable[..., dict[str, Any]], *given: Any, **options: Any) -> dict[str, Any] | Failure:
        """`run`, or what went wrong."""
        return guarded(self.run, block, *given, **options)

    def moved(self, block: Callable[..., dict[str, Any]], *given: Any, gradients: bool = False) -> float | Failure:
        """How far a block moves the logits of real tokens."""
        found = self.attempt(block, *given, gradients=gradients)
        return found if isinstance(found, Failure) else self.distance(found["logits"], self.base)

    def distance(self, logits: Tensor, other: Tensor) -> float:
        """The largest difference of logits of real tokens, relative to the largest logit."""
        return relative(logits[self.mask], other[self.mask])

    def own_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """The model called without any trace."""
        with torch.no_grad():
            return self.model.hf(**{name: value.to(self.model.device) for name, value in inputs.items()}).logits

    # What there is ----------------------------------------------------------------------------------------------------

    def kind(self, address: str) -> str:
        """``"spot"`` (a tensor of the model), ``"scan"`` (given to or made by a scan), or ``"read only"``."""
        owner, name = owner_of(self.model, address)
        scan = vars(owner).get("_scan_sites", {}).get(name)
        if scan is not None:
            return "read only" if scan in ("state", "scale") or scan.startswith("mixing") else "scan"
        spot = vars(owner).get("_spots", vars(owner).get("_roots"))[name]
        return "spot" if getattr(spot, "writable", True) else "read only"

    @property
    def writable(self) -> list[str]:
        """Sites that can be written."""
        return [address for address in self.addresses if self.kind(address) != "read only"]

    def scans(self, layers: list[int] | None = None) -> list[tuple[int, str]]:
        """(layer, part) of every scan whose y is checked."""
        parts = ARCHITECTURES[self.model.architecture].parts
        return [
            (layer.index, name)
            for layer in self.model.layers
            for name, part in parts.items()
            if part.scan is not None and f"layers.{layer.index}.{name}.y" in self.addresses
            if layers is None or layer.index in layers
        ]

    # Findings ---------------------------------------------------------------------------------------------------------

    def note(self, site: str, check: str, measured: float | bool | Failure, bound: float | None, advice: str) -> None:
        """One finding: a number that is to be at most its bound (a fact, if there is none), or what came instead."""
        if isinstance(measured, Failure):
            self.rows.append(Row(site, check, False, None, bound, f"{measured.why}. {advice}"))
            return
        ok = bool(measured) if bound is None else measured <= bound
        self.rows.append(Row(site, check, ok, None if bound is None else measured, bound, "" if ok else advice))

    def note_movement(self, site: str, check: str, measured: float | Failure, advice: str) -> None:
        """A number that is to be more than rounding could make it."""
        bound = 0.0 if self.half else 3 * self.noise  # in half precision, effects and rounding are of one size
        if isinstance(measured, Failure):
            self.note(site, check, measured, bound, advice)
        elif measured == 0 and self.half:
            self.unverified(site, check, f"the effect is too small for {self.dtype}: check the model in float32")
        else:
            self.rows.append(Row(site, check, measured > bound, measured, bound, "" if measured > bound else advice))

    def unverified(self, site: str, check: str, why: str) -> None:
        """Something that could not be verified here."""
        self.rows.append(Row(site, check, None, advice=why))


def guarded(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What a function returns, or a `Failure`: a wrong map can break anything, and that is a finding."""
    try:
        return function(*given, **named)
    except Exception as error:
        if isinstance(error, (RemoteError, VersionMismatch)) and not isinstance(error, JobFailed):
            raise  # the server's failure, not the map's
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Failure(f"{type(error).__name__}: {lines[-1] if lines else 'no message'}".rstrip("."))


def relative(value: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest entry of `other`."""
    value, other = value.detach().double().cpu(), other.detach().double().cpu()
    difference, size = (value - other).abs().max().item(), other.abs().max().item()
    return difference / size if size > 0 else difference


def prompts(model: Model) -> tuple[tuple[int, int], dict[str, Tensor]]:
    """Two prompts of random tokens, of different length where the model masks padding."""
    vocabulary = model.hf.config.get_text_config().vocab_size
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    plain = [token for token in range(min(vocabulary, 1000)) if token not in special]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(plain), (LENGTHS[0],), generator=generator).tolist() for _ in LENGTHS]
    rows = [[plain[index] for index in row] for row in drawn]
    try:
        return LENGTHS, encode(model, [rows[0], rows[1][: LENGTHS[1]]]).inputs(model)
    except BadInput:  # padding is not inert in this model, and it is refused
        return (LENGTHS[0], LENGTHS[0]), encode(model, rows).inputs(model)


def alike(model: Model) -> list[list[int]]:
    """Layers by what they are made of, in order."""
    groups: dict[Any, list[int]] = {}
    for layer in model.layers:
        groups.setdefault(signature(layer), []).append(layer.index)
    return list(groups.values())


def signature(layer: LayerView) -> tuple:
    """What a layer is made of: its sites, their shapes, the classes of its modules."""
    modules = tuple((name, type(module).__name__) for name, module in layer.envoy._module.named_modules())
    return layer.kind, tuple(layer.shapes.items()), modules
