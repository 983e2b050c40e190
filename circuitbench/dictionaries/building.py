"""Building a dictionary by its kind, from random directions or from weights that are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitbench.dictionaries.base import KINDS, Dictionary
from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from jaxtyping import Float


def build(
    kind: str,
    *,
    d_in: int,
    d_dict: int,
    d_out: int | None = None,
    skip: bool = False,
    blocks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **settings: Any,
) -> Dictionary:
    """A new dictionary with unit-length random directions and biases 0; an autoencoder's encoder and decoder are tied.

    Args:
        kind: "topk", "batchtopk", …; an unknown one is answered with the list.
        d_in: size of the activations.
        d_dict: number of features.
        d_out: of a transcoder: size of what it reconstructs.
        skip: of a transcoder: whether it has a linear path beside the features.
        blocks: of a crosscoder: address -> width of the sites that are read and reconstructed together.
        dtype: of the parameters.
        seed: of the directions.
        **settings: what the kind asks for; "topk", "batchtopk", "matryoshka": `k`, the number of features active on a
            row; "matryoshka": `prefixes`, which has a default.

    Raises:
        BadInput: unknown kind, a setting it lacks or does not have, or a value out of range.
    """
    cls = kind_of(kind)
    settings = {**cls.default_settings(d_dict), **settings}
    if set(settings) != set(cls.settings_names):
        raise BadInput(
            f"a dictionary of kind {kind!r} takes the settings {', '.join(cls.settings_names) or 'none'}; "
            f"given: {', '.join(settings) or 'none'}."
        )
    return cls(d_in=d_in, d_dict=d_dict, d_out=d_out, skip=skip, blocks=blocks, dtype=dtype, seed=seed, **settings)


def kind_of(kind: str) -> type[Dictionary]:
    """The class of a kind; BadInput with the list of kinds if there is none."""
    if kind not in KINDS:
        raise BadInput(f"kind={kind!r} is not a kind of dictionary; there are: {', '.join(map(repr, sorted(KINDS)))}.")
    return KINDS[kind]


def from_weights(
    kind: str,
    *,
    W_enc: Float[Tensor, "d_in d_dict"],
    W_dec: Float[Tensor, "d_dict d_out"],
    b_enc: Float[Tensor, " d_dict"] | None = None,
    b_dec: Float[Tensor, " d_out"] | None = None,
    W_skip: Float[Tensor, "d_out d_in"] | None = None,
    transcodes: bool | None = None,
    blocks: Mapping[str, int] | None = None,
    **settings: Any,
) -> Dictionary:
    """A dictionary that holds copies of these weights; biases left out are 0.

    Args:
        transcodes: whether b_dec is left in the input; True if not given and d_out ≠ d_in or there is a skip.
        **settings: the kind's settings, and its other tensors by name, such as `threshold`.

    Raises:
        BadInput: a shape does not fit, or a tensor the kind does not have.
    """
    d_in, d_dict = W_enc.shape
    d_out = W_dec.shape[1]
    if transcodes is None:
        transcodes = d_in != d_out or W_skip is not None
    tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "W_skip": W_skip}
    tensors |= {name: value for name, value in settings.items() if isinstance(value, torch.Tensor)}
    dictionary = build(
        kind,
        d_in=d_in,
        d_dict=d_dict,
        d_out=d_out if transcodes else None,
        skip=W_skip is not None,
        blocks=blocks,
        dtype=W_enc.dtype,
        **{name: value for name, value in settings.items() if name not in tensors},
    )
    own = dictionary.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if name not in own:
                raise BadInput(f"a dictionary of kind {kind!r} has no {name}; it has {', '.join(own)}.")
            if tensor.shape != own[name].shape:
                raise BadInput(
                    f"{name} has shape {tuple(tensor.shape)}; "
                    f"with W_enc {tuple(W_enc.shape)} it must be {tuple(own[name].shape)}."
                )
            own[name].copy_(tensor)
    return dictionary.to(W_enc.device)
