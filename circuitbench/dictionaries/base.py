"""What every dictionary is: an encoder, a decoder and the site it was trained on; and how to build one by its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitbench.dictionaries import sparse
from circuitbench.dictionaries.sparse import SparseCode
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float

KINDS: dict[str, type[Dictionary]] = {}

# Mixed into every seed: synthetic data whose features are drawn by `torch.randn` from the same small seed must not
# be found at initialisation.
_SEED_SALT = 0x5AE_D1C7


class Dictionary(nn.Module, ABC):
    """A sparse decomposition of one site: x ≈ encode(x) @ W_dec + b_dec.

    Attributes:
        W_enc: `(d_in, d_dict)`; in memory feature by feature, as the sparse products read it.
        b_enc: `(d_dict,)`.
        W_dec: `(d_dict, d_out)`, one direction a row.
        b_dec: `(d_out,)`, subtracted from the input as well.
        site: the address it was trained on, such as `layers.3.ssm.gated`, if known.
        model_name: the model it was trained on, if known.
    """

    kind: ClassVar[str]
    settings_names: ClassVar[tuple[str, ...]] = ()  # what `build` takes and `save` keeps besides the sizes

    def __init__(self, *, d_in: int, d_dict: int, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        if d_in < 1 or d_dict < 1:
            raise BadInput(f"d_in={d_in} and d_dict={d_dict} were given; both must be at least 1.")
        if not dtype.is_floating_point:
            raise BadInput(f"dtype={dtype} was given; a dictionary needs a floating-point one, such as torch.float32.")
        generator = torch.Generator().manual_seed(seed ^ _SEED_SALT)
        directions = F.normalize(torch.randn(d_dict, d_in, generator=generator), dim=1).to(dtype)
        self.W_enc = nn.Parameter(directions.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_dict, dtype=dtype))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype))
        self.site: str | None = None
        self.model_name: str | None = None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
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

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_dict"]:
        """The activation of every feature, in the dictionary's dtype."""

    def decode(self, features: Float[Tensor, "*batch d_dict"] | SparseCode) -> Float[Tensor, "*batch d_out"]:
        """features @ W_dec + b_dec; of a sparse code, at the cost of its non-zeros."""
        if isinstance(features, SparseCode):
            return sparse.decode(features, self.W_dec) + self.b_dec
        if features.shape[-1] != self.d_dict:
            raise BadInput(
                f"decode was given shape {tuple(features.shape)}; the last axis must be d_dict = {self.d_dict}."
            )
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of x, in x's dtype."""
        return self.decode(self.encode(x)).to(x.dtype)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every row of `W_dec` to length 1."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny)

    def save(self, path: str | Path) -> None:
        """Write `cfg.json` and `sae_weights.safetensors`, SAELens' layout, into the folder `path`, made if need be."""
        from circuitbench.dictionaries import files

        files.save(self, path)

    def extra_repr(self) -> str:
        settings = "".join(f", {name}={value}" for name, value in self.settings.items())
        site = f", site={self.site!r}" if self.site else ""
        return f"d_in={self.d_in}, d_dict={self.d_dict}{settings}{site}"

    def _checked(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise BadInput(f"x has dtype {x.dtype}; a dictionary encodes floating-point activations.")
        if x.shape[-1:] != (self.d_in,):
            raise BadInput(f"x has shape {tuple(x.shape)}; the last axis must be d_in = {self.d_in}.")
        return x.to(self.W_enc.dtype)


def build(
    kind: str, *, d_in: int, d_dict: int, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
) -> Dictionary:
    """A new dictionary with unit-length random directions, encoder and decoder tied, biases 0.

    Args:
        kind: "topk".
        d_in: size of the activations.
        d_dict: number of features.
        dtype: of the parameters.
        seed: of the directions.
        **settings: what the kind asks for; "topk": `k`, the number of features that may be active at once.

    Raises:
        BadInput: unknown kind, a setting it lacks or does not have, or a value out of range.
    """
    if kind not in KINDS:
        raise BadInput(f"kind={kind!r} is not a kind of dictionary; there are: {', '.join(map(repr, sorted(KINDS)))}.")
    cls = KINDS[kind]
    if set(settings) != set(cls.settings_names):
        raise BadInput(
            f"a dictionary of kind {kind!r} takes the settings {', '.join(cls.settings_names) or 'none'}; "
            f"given: {', '.join(settings) or 'none'}."
        )
    return cls(d_in=d_in, d_dict=d_dict, dtype=dtype, seed=seed, **settings)


def from_weights(
    kind: str,
    *,
    W_enc: Float[Tensor, "d_in d_dict"],
    W_dec: Float[Tensor, "d_dict d_out"],
    b_enc: Float[Tensor, " d_dict"] | None = None,
    b_dec: Float[Tensor, " d_out"] | None = None,
    **settings: Any,
) -> Dictionary:
    """A dictionary that holds copies of these weights; biases left out are 0. BadInput if a shape does not fit."""
    d_in, d_dict = W_enc.shape
    dictionary = build(kind, d_in=d_in, d_dict=d_dict, dtype=W_enc.dtype, **settings)
    given = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            tensor = given[name]
            if tensor is None:
                continue
            if tensor.shape != parameter.shape:
                raise BadInput(
                    f"{name} has shape {tuple(tensor.shape)}; "
                    f"with W_enc {tuple(W_enc.shape)} it must be {tuple(parameter.shape)}."
                )
            parameter.copy_(tensor)
    return dictionary.to(W_enc.device)
