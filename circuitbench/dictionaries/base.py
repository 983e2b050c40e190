"""What every dictionary is: an encoder, a decoder, and the sites it reads and reconstructs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitbench.dictionaries import sparse
from circuitbench.dictionaries.sparse import SparseCode, Support
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float, Int

KINDS: dict[str, type[Dictionary]] = {}

# Mixed into every seed: synthetic data whose features are drawn by `torch.randn` from the same small seed must not
# be found at initialisation.
_SEED_SALT = 0x5AE_D1C7


@dataclass
class Step:
    """What a training step tells the dictionary besides the data.

    Attributes:
        progress: share of the run that is done, 0 to 1.
        dead: features that count as dead.
        options: the kind's `training_options`, as they are at this step: sparsity weights with their schedule applied.
        decoder_norm: how the length of decoder rows is handled: "unit", "tangent" or "free".
        memory: what the kind remembers from step to step; checkpoints hold it.
        steps: of the run.
        error: what a reconstruction of the target costs, differentiable in the reconstruction; the share of variance
            that is left, where it is not given.
    """

    progress: float
    dead: Int[Tensor, " n_dead"]
    options: Mapping[str, Any]
    decoder_norm: str = "unit"
    memory: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 1000
    error: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass
class Objective:
    """What a step makes small, and what it saw.

    Attributes:
        loss: to be differentiated. Data have unit variance while training, so a squared error is a share of variance.
        reconstruction: of the target.
        code: the activations behind it.
        parts: terms of the loss by name, without their weights.
    """

    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, "n d_out"]
    code: SparseCode
    parts: dict[str, Tensor] = field(default_factory=dict)


class Dictionary(nn.Module, ABC):
    """A sparse decomposition of a site: x ≈ encode(x) @ W_dec + b_dec.

    A *transcoder* reads one site and reconstructs another: y ≈ encode(x) @ W_dec + b_dec, plus x @ W_skipᵀ where it has
    a skip. A *crosscoder* reads and reconstructs several sites at once, one after the other in one row (`blocks`).

    Attributes:
        W_enc: `(d_in, d_dict)`; in memory feature by feature, as the sparse products read it.
        b_enc: `(d_dict,)`.
        W_dec: `(d_dict, d_out)`, one direction a row.
        b_dec: `(d_out,)`; subtracted from the input as well, except in transcoders.
        W_skip: `(d_out, d_in)`, in transcoders with a skip.
        transcodes: whether what is reconstructed is another tensor than what is read.
        blocks: address -> width, in order, of a crosscoder's sites; empty in others.
        site: the address it reads, such as `layers.3.ssm.gated`, if known.
        site_out: the address it reconstructs; the same, except in transcoders.
        model_name: the model it was trained on, if known.
        metadata: what else is recorded with it: its evaluation, the text it was trained on. Saved as JSON.
    """

    kind: ClassVar[str]
    settings_names: ClassVar[tuple[str, ...]] = ()  # what `build` takes and `save` keeps besides the sizes
    # What `train` takes for this kind only, with defaults: sparsity weights, bandwidths, …
    training_options: ClassVar[Mapping[str, Any]] = {}
    # Added to x @ W_enc; the first one decides which features are active.
    encoder_biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    # Whether activations may be negative: then a feature is its direction and the opposite one, and ≠ 0 is active.
    signed: ClassVar[bool] = False
    # What stays in float32 whatever the dictionary's dtype is. In units of the activations, as the biases are.
    float32: ClassVar[tuple[str, ...]] = ()

    b_enc: nn.Parameter
    threshold: Tensor  # of the kinds that have one
    W_skip: nn.Parameter | None

    def __init__(
        self,
        *,
        d_in: int,
        d_dict: int,
        d_out: int | None = None,
        skip: bool = False,
        blocks: Mapping[str, int] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        super().__init__()
        if d_in < 1 or d_dict < 1 or (d_out is not None and d_out < 1):
            raise BadInput(f"d_in={d_in}, d_dict={d_dict}, d_out={d_out} were given; each must be at least 1.")
        if not dtype.is_floating_point:
            raise BadInput(f"dtype={dtype} was given; a dictionary needs a floating-point one, such as torch.float32.")
        self.transcodes = d_out is not None or skip
        self.blocks = dict(blocks or {})
        if self.blocks and (self.transcodes or sum(self.blocks.values()) != d_in):
            raise BadInput(
                f"blocks={self.blocks} were given with d_in={d_in}, d_out={d_out}; a crosscoder's widths add up to "
                "d_in, and it has no d_out and no skip of its own."
            )
        d_out = d_in if d_out is None else d_out
        generator = torch.Generator().manual_seed(seed ^ _SEED_SALT)
        directions = F.normalize(torch.randn(d_dict, d_in, generator=generator), dim=1).to(dtype)
        self.W_enc = nn.Parameter(directions.clone().T)
        for name in self.encoder_biases:
            self.register_parameter(name, nn.Parameter(torch.zeros(d_dict, dtype=dtype)))
        if self.transcodes:  # what is read and what is written have nothing to do with each other: not tied
            directions = F.normalize(torch.randn(d_dict, d_out, generator=generator), dim=1).to(dtype)
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(d_out, dtype=dtype))
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in, dtype=dtype)) if skip else None
        self.site: str | None = None
        self.site_out: str | None = None
        self.model_name: str | None = None
        self.metadata: dict[str, Any] = {}
        self.product_dtype: torch.dtype | None = None  # of the encoder's dense product in training; None: the weights'

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            KINDS[cls.kind] = cls

    @property
    def d_in(self) -> int:
        """Size of what is encoded."""
        return self.W_enc.shape[0]

    @property
    def d_dict(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Size of what is decoded."""
        return self.W_dec.shape[1]

    @property
    def settings(self) -> dict[str, Any]:
        """What distinguishes this dictionary from others of its kind and size, such as `{"k": 32}`."""
        return {name: getattr(self, name) for name in self.settings_names}

    @classmethod
    def default_settings(cls, d_dict: int) -> dict[str, Any]:
        """Settings that have a default, for a dictionary of this size."""
        return {}

    @classmethod
    def checked_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of training, what was left out as it is by default; BadInput where they contradict each other."""
        return {**cls.training_options, **options}

    @property
    def encoder_bias(self) -> Float[Tensor, " d_dict"]:
        """The bias of `preactivations`."""
        return getattr(self, self.encoder_biases[0])

    @property
    def b_in(self) -> Float[Tensor, " d_in"] | None:
        """What is subtracted from the input: b_dec, and nothing in transcoders."""
        return None if self.transcodes else self.b_dec

    @abstractmethod
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """The code of each row as its active features, differentiable once in x and the parameters."""

    @abstractmethod
    def objective(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], step: Step) -> Objective:
        """What training makes small on these rows, in the kind's own training form."""

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_dict"]:
        """The activation of every feature, in the dictionary's dtype."""
        rows = self._checked(x).reshape(-1, self.d_in)
        return self.encode_sparse(rows).to_dense().reshape(*x.shape[:-1], self.d_dict)

    def decode(self, features: Float[Tensor, "*batch d_dict"] | SparseCode) -> Float[Tensor, "*batch d_out"]:
        """features @ W_dec + b_dec; of a sparse code, at the cost of its non-zeros. Without a transcoder's skip."""
        if isinstance(features, SparseCode):
            return sparse.decode(features, self.W_dec) + self.b_dec
        if features.shape[-1] != self.d_dict:
            raise BadInput(
                f"decode was given shape {tuple(features.shape)}; the last axis must be d_dict = {self.d_dict}."
            )
        return features @ self.W_dec + self.b_dec

    def offset(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "*n d_out"]:
        """What is reconstructed where no feature is active: b_dec, plus the skip."""
        return self.b_dec if self.W_skip is None else torch.addmm(self.b_dec, x, self.W_skip.T)

    def reconstruct(self, x: Float[Tensor, "n d_in"], code: SparseCode) -> Float[Tensor, "n d_out"]:
        """What a code of x stands for: decode(code), plus the skip."""
        decoded = self.decode(code)
        return decoded if self.W_skip is None else decoded + x @ self.W_skip.T

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of x, or of what a transcoder makes of it, in x's dtype."""
        rows = self._checked(x).reshape(-1, self.d_in)
        return self.reconstruct(rows, self.encode_sparse(rows)).reshape(*x.shape[:-1], self.d_out).to(x.dtype)

    def preactivations(
        self, x: Float[Tensor, "n d_in"], features: Int[Tensor, " some"] | None = None
    ) -> Float[Tensor, "n some"]:
        """x @ W_enc + b_enc (x − b_dec, where that is subtracted), of all features or of those listed."""
        W_enc, bias = self.W_enc, self.encoder_bias
        if features is not None:
            W_enc, bias = W_enc.T[features].T, bias[features]
        x = self._checked(x)
        x = x if self.b_in is None else x - self.b_in
        if self.product_dtype is not None:
            return (x.to(self.product_dtype) @ W_enc.to(self.product_dtype)).to(bias) + bias
        return torch.addmm(bias, x, W_enc)

    def chosen_preactivations(
        self, x: Float[Tensor, "n d_in"], values: Float[Tensor, " nnz"], support: Support
    ) -> Float[Tensor, " nnz"]:
        """Entries that were chosen from `preactivations`, differentiable once at the cost of the entries.

        Args:
            values: what `preactivations` gave for them; computed again where its product was a rounded one.
        """
        if self.product_dtype is not None:
            with torch.no_grad():
                shifted = x if self.b_in is None else x - self.b_in
                values = support.sampled_product(shifted, self.W_enc.T) + self.encoder_bias[support.columns]
        return sparse.preactivations(x, self.W_enc, self.encoder_bias, self.b_in, values, support)

    def block_norms(self) -> Float[Tensor, "blocks d_dict"]:
        """How much of each feature's decoder direction lies in each of a crosscoder's blocks.

        Lengths of the parts, each in units of its site's activations (the root of the mean variance of a component in
        training), over their sum: a feature that both of two models have alike has 0.5 and 0.5, one that only the first
        has 1 and 0 (Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing").

        Raises:
            BadInput: for a dictionary that is no crosscoder.
        """
        if not self.blocks:
            raise BadInput(
                "block_norms belongs to a crosscoder, and this dictionary has one site; train it on several."
            )
        scales = self.metadata.get("block_scales", [1.0] * len(self.blocks))
        parts = self.W_dec.detach().split(list(self.blocks.values()), dim=1)
        norms = torch.stack([part.norm(dim=1) / scale for part, scale in zip(parts, scales, strict=True)])
        return norms / norms.sum(0).clamp_min(torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def start_at(self, mean: Float[Tensor, " d_in"], target_mean: Float[Tensor, " d_out"]) -> None:
        """Before training: b_dec is the data's mean, and a transcoder's encoder sees its input without the mean."""
        self.b_dec.copy_(target_mean)
        if self.transcodes:
            for name in self.encoder_biases:
                getattr(self, name).copy_(-(mean.to(self.W_enc) @ self.W_enc))

    @torch.no_grad()
    def begin(self, x: Float[Tensor, "n d_in"], options: Mapping[str, Any], memory: dict[str, Tensor]) -> None:
        """Before training, after `start_at`: what the kind sets from some rows, and what it remembers."""

    @torch.no_grad()
    def after_step(self, objective: Objective, step: Step) -> None:
        """After an optimizer step: what the kind keeps running, such as a threshold."""

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every row of `W_dec` to length 1."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny)

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Scale every row of `W_dec` to length 1 and its feature's activations by what it had: the same function."""
        norm = self.W_dec.norm(dim=1).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        self.W_dec /= norm[:, None]
        self._scale_activations(norm)

    @torch.no_grad()
    def fold_scale(self, scale: Float[Tensor, "*d_in"], target_scale: Float[Tensor, "*d_out"]) -> None:
        """From a dictionary of x / scale and target / target_scale, make that of x and target.

        Args:
            scale: one number, or one for each component.
            target_scale: the same for what is reconstructed. Decoder rows keep their length if it is one number.
        """
        unit = target_scale.mean().to(self.W_dec)
        if self.blocks:
            scales = [block.mean().item() for block in target_scale.expand(self.d_in).split(list(self.blocks.values()))]
            known = self.metadata.get("block_scales", [1.0] * len(scales))
            self.metadata["block_scales"] = [a * b for a, b in zip(known, scales, strict=True)]
        self.W_enc /= scale.to(self.W_enc).expand(self.d_in)[:, None]
        if self.W_skip is not None:
            self.W_skip.data *= target_scale.to(self.W_skip).expand(self.d_out)[:, None] / scale.to(self.W_skip)
        self.W_dec *= target_scale.to(self.W_dec) / unit
        self.b_dec *= target_scale.to(self.b_dec)
        self._scale_activations(unit.expand(self.d_dict))

    def _scale_activations(self, factor: Float[Tensor, " d_dict"]) -> None:
        self.W_enc *= factor
        for name in (*self.encoder_biases, *self.float32):
            getattr(self, name).mul_(factor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Dictionary:
        # `.to(torch.bfloat16)` and the like: steps of a threshold are smaller than bfloat16 can tell apart.
        before = {name: getattr(self, name).data for name in self.float32}
        super()._apply(fn, recurse)
        for name, value in before.items():
            tensor = getattr(self, name)
            if tensor.dtype != value.dtype:
                tensor.data = value.to(tensor.device)
        return self

    def travelling(self, features: list[int]) -> Any:
        """The encoder of these features alone, of plain tensors, for a run elsewhere (see `travelling.Encoder`)."""
        from circuitbench.dictionaries.travelling import encoder

        return encoder(self, features)

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `cfg.json` and `sae_weights.safetensors`, SAELens' layout, into the folder `path`, made if need be.

        Args:
            path: the folder; a dictionary already there is replaced.
            dtype: of the numbers in the file, such as torch.float16 for half the size; what is loaded computes in the
                dictionary's own.

        Raises:
            BadInput: a file is there, metadata that JSON cannot hold, or weights that are not finite in `dtype`.
        """
        from circuitbench.dictionaries import files

        files.save(self, path, dtype)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload it with a card made from its `metadata`; returns the commit's address.

        Args:
            repo_id: "org/name", made if need be.
            **options: of `dictionaries.push_to_hub`: subfolder, evaluation, private, token, message.
        """
        from circuitbench.dictionaries import hub

        return hub.push_to_hub(self, repo_id, **options)

    def extra_repr(self) -> str:
        settings = "".join(f", {name}={value}" for name, value in self.settings.items())
        d_out = f", d_out={self.d_out}" if self.transcodes else ""
        skip = ", skip=True" if self.W_skip is not None else ""
        site = f", site={self.site!r}" if self.site else ""
        site_out = f", site_out={self.site_out!r}" if self.site_out and self.transcodes else ""
        blocks = f", blocks={self.blocks}" if self.blocks else ""
        return f"d_in={self.d_in}, d_dict={self.d_dict}{d_out}{skip}{settings}{site}{site_out}{blocks}"

    def _checked(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise BadInput(f"x has dtype {x.dtype}; a dictionary encodes floating-point activations.")
        if x.shape[-1:] != (self.d_in,):
            raise BadInput(f"x has shape {tuple(x.shape)}; the last axis must be d_in = {self.d_in}.")
        return x.to(self.W_enc.dtype)
