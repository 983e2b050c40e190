"""The encoder that travels computes what the dictionary's own does, for every kind there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuitbench import dictionaries
from circuitbench.dictionaries.base import KINDS
from circuitbench.errors import BadInput

SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"k": 5},
    "abstopk": {"k": 5},
    "rank1": {"k": 5, "shape": (4, 4)},
    "batchtopk": {"k": 5},
    "matryoshka": {"k": 5, "prefixes": (8, 16, 48)},
}


@pytest.mark.parametrize("sizes", [{}, {"d_out": 9}], ids=["autoencoder", "transcoder"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_some_features_are_encoded_as_among_all(kind: str, sizes: dict[str, int]) -> None:
    if sizes and kind in ("rank1", "matching_pursuit"):
        pytest.skip("is no transcoder")
    dictionary = dictionaries.build(kind, d_in=16, d_dict=48, **sizes, **SETTINGS.get(kind, {}))
    with torch.no_grad():
        for name, value in dictionary.state_dict().items():
            value.copy_(torch.randn_like(value) * (1 if name.endswith("_enc") and value.dim() > 1 else 0.4))
    x = torch.randn(3, 7, 16)
    features = [40, 2, 3, 17]
    encoder = dictionary.travelling(features)
    expected = dictionary.encode(x)
    assert 0.02 < (expected != 0).float().mean() < 0.9
    torch.testing.assert_close(encoder.encode(x), expected[..., features], rtol=1e-5, atol=1e-6)
    every = dictionary.travelling(list(range(48))).encode(x)
    torch.testing.assert_close(every, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(BadInput, match="last axis must be d_in = 16"):
        encoder.encode(torch.randn(3, 15))


def test_only_what_is_needed_travels() -> None:
    def size(encoder: Any) -> int:
        return sum(value.untyped_storage().nbytes() for value in encoder.weights.values())

    few = dictionaries.build("batchtopk", d_in=64, d_dict=1000, k=5).travelling([3])
    assert size(few) == 4 * (64 + 1 + 1 + 64)


def test_it_is_differentiable_in_its_input() -> None:
    dictionary = dictionaries.build("topk", d_in=16, d_dict=48, k=5)
    x = torch.randn(4, 16, dtype=torch.float32)
    slopes = []
    for encode in (dictionary.encode, dictionary.travelling(list(range(48))).encode):
        x = x.detach().requires_grad_()
        slopes.append(torch.autograd.grad(encode(x).square().sum(), x)[0])
    assert slopes[0].abs().max() > 0.1
    torch.testing.assert_close(*slopes)


def test_a_kind_without_a_rule_says_so() -> None:
    dictionary = dictionaries.build("topk", d_in=16, d_dict=48, k=5)
    dictionary.kind = "handmade"
    with pytest.raises(BadInput, match=r"'handmade' has no encoder that travels.*travelling\(features\)"):
        dictionary.travelling([1])
