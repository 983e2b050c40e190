"""A small dictionary of every kind, its numbers drawn at random, its records filled in."""

from __future__ import annotations

from typing import Any

import torch

from circuitbench import dictionaries
from circuitbench.dictionaries import KINDS

SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "abstopk": {"k": 3},
    "matching_pursuit": {"max_iterations": 5, "residual_threshold": 0.1, "stop_on_duplicate_support": True},
    "batchtopk": {"k": 3},
    "matryoshka": {"k": 3, "prefixes": (5, 20)},
    "rank1": {"k": 3, "shape": (2, 3)},
}
FORMS: dict[str, dict[str, Any]] = {
    "autoencoder": {},
    "transcoder": {"d_out": 4},
    "transcoder of one size": {"d_out": 6},
    "skip transcoder": {"d_out": 4, "skip": True},
    "crosscoder": {"blocks": {"layers.0.resid_post": 2, "layers.1.resid_post": 4}},
}

AUTOENCODERS_ONLY = ("matching_pursuit", "rank1")
CASES = [
    (kind, form) for kind in sorted(KINDS) for form in FORMS if form == "autoencoder" or kind not in AUTOENCODERS_ONLY
]


def example(kind: str, *, d_in: int = 6, d_dict: int = 20, seed: int = 0, **arguments: Any) -> dictionaries.Dictionary:
    dictionary = dictionaries.build(kind, d_in=d_in, d_dict=d_dict, **arguments, **SETTINGS.get(kind, {}))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in dictionary.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(0.5 + 0.1 * noise if name == "threshold" else noise)
    if kind == "matching_pursuit":
        dictionary.normalize_decoder()
    dictionary.site, dictionary.model_name = "layers.3.ssm.gated", "zoo:pylm-hybrid"
    if dictionary.transcodes:
        dictionary.site_out = "layers.3.ssm.out"
    if dictionary.blocks:
        dictionary.site = None
    dictionary.metadata = {"evaluation": {"fvu": 0.25, "l0": 3.0}, "text": "the standard library"}
    return dictionary
