"""Encoders that travel: what a dictionary's encoder computes, as plain functions and tensors.

A dictionary is too much to send to a remote server: its training code, and every feature's weights where one is asked
for. Only torch here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from circuitbench.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    from circuitbench.dictionaries.base import Dictionary


class Encoder:
    """The encoder of some of a dictionary's features.

    Attributes:
        d_in: Size of what is encoded.
    """

    def __init__(self, rule: Callable[..., Tensor], weights: dict[str, Tensor], settings: dict[str, Any]) -> None:
        """
        Args:
            rule: From rows, weights and settings to activations.
            weights: The rule's.
            settings: The rule's.
        """
        self.rule = rule
        self.weights = weights
        self.settings = settings
        self.d_in = weights["W_enc"].shape[0]

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n"]:
        """The activations of these features, in the dictionary's dtype, differentiable in x."""
        if x.shape[-1] != self.d_in:
            raise BadInput(f"x has shape {tuple(x.shape)}; the last axis must be d_in = {self.d_in}.")
        self.weights = {name: value.to(x.device) for name, value in self.weights.items()}
        rows = x.reshape(-1, self.d_in).to(self.weights["W_enc"].dtype)
        code = self.rule(rows, self.weights, self.settings)
        return code.reshape(*x.shape[:-1], code.shape[-1])


def product(x: Tensor, weights: dict[str, Tensor], bias: str | None) -> Tensor:
    """x @ W_enc, with the decoder's bias subtracted from x where the kind does, and an encoder's bias added."""
    x = x - weights["b_in"] if "b_in" in weights else x
    return x @ weights["W_enc"] if bias is None else torch.addmm(weights[bias], x, weights["W_enc"])


def rectified(x: Tensor, weights: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """Positive pre-activations."""
    return product(x, weights, "b_enc").relu()


def gated(x: Tensor, weights: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """Magnitudes of the features whose gate is open."""
    shared = product(x, weights, None)
    magnitude = (shared * weights["r_mag"].exp() + weights["b_mag"]).relu()
    return torch.where(shared + weights["b_gate"] > 0, magnitude, 0)


def thresholded(x: Tensor, weights: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """Pre-activations above a threshold that is not negative."""
    scores = product(x, weights, "b_enc")
    return torch.where(scores > weights["threshold"].clamp_min(0), scores, 0)


def largest(x: Tensor, weights: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """The positive ones among the k largest pre-activations of all features; then those of `columns`."""
    scores = product(x, weights, "b_enc")
    values, indices = scores.topk(settings["k"], dim=-1)
    return torch.zeros_like(scores).scatter(1, indices, values.relu())[:, settings["columns"]]


def furthest(x: Tensor, weights: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """The k pre-activations of all features that are largest in size, sign kept; then those of `columns`."""
    scores = product(x, weights, "b_enc")
    indices = scores.abs().topk(settings["k"], dim=-1).indices
    return torch.zeros_like(scores).scatter(1, indices, scores.gather(1, indices))[:, settings["columns"]]


def pursuit(
    x: Tensor, directions: Tensor, max_iterations: int, residual_threshold: float, stop_on_duplicate_support: bool
) -> Tensor:
    """Matching pursuit (Mallat & Zhang 1993): the code of rows, one feature at a time, `(n, d_dict)`.

    In each round a row takes the feature with the largest inner product with what is left of it, if that is positive,
    and that much of the feature is subtracted. Differentiable, with the features that are taken held fixed.

    Args:
        x: `(n, d)`.
        directions: `(d_dict, d)`; of length 1, or nothing says that the rest gets smaller.
        max_iterations: Rounds.
        residual_threshold: A row is done when what is left of it is shorter than this.
        stop_on_duplicate_support: A row is done when a round gave it no new feature.
    """
    residual = x
    code = x.new_zeros(len(x), len(directions))
    done = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    for _ in range(max_iterations):
        with torch.no_grad():
            chosen = (residual @ directions.T).argmax(1, keepdim=True)
            known = code.gather(1, chosen) != 0
        direction = directions[chosen[:, 0]]
        value = (residual * direction).sum(-1, keepdim=True).relu() * ~done
        code.scatter_add_(1, chosen, value)
        residual = residual - value * direction
        if stop_on_duplicate_support:
            done = done | known | (value == 0)
        if residual_threshold > 0:
            done = done | (residual.detach().norm(dim=-1, keepdim=True) < residual_threshold)
        if bool(done.all()):
            break
    return code


def pursued(x: Tensor, weights: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """Matching pursuit with all features; then those of `columns`."""
    x = x - weights["b_in"] if "b_in" in weights else x
    stops = (settings["max_iterations"], settings["residual_threshold"], settings["stop_on_duplicate_support"])
    return pursuit(x, weights["W_enc"].T, *stops)[:, settings["columns"]]


# kind -> its rule, the tensors besides W_enc that it takes a column of, and whether it has to see every feature
RULES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...], bool]] = {
    "standard": (rectified, ("b_enc",), False),
    "gated": (gated, ("b_gate", "b_mag", "r_mag"), False),
    "topk": (largest, ("b_enc",), True),
    "rank1": (largest, ("b_enc",), True),
    "abstopk": (furthest, ("b_enc",), True),
    "batchtopk": (thresholded, ("b_enc", "threshold"), False),
    "jumprelu": (thresholded, ("b_enc", "threshold"), False),
    "matryoshka": (thresholded, ("b_enc", "threshold"), False),
    "matching_pursuit": (pursued, (), True),
}


def encoder(dictionary: Dictionary, features: list[int]) -> Any:
    """The encoder of these features of a dictionary.

    Only their weights are in it, unless they compete with the others (the k largest of all).

    Raises:
        BadInput: For a kind that has no such form.
    """
    if dictionary.kind not in RULES:
        raise BadInput(
            f"A dictionary of kind {dictionary.kind!r} has no encoder that travels; there are: "
            f"{', '.join(map(repr, RULES))}. Define `travelling(features)` on it."
        )
    rule, names, whole = RULES[dictionary.kind]
    weights = {"W_enc": dictionary.W_enc.detach()}
    weights |= {name: getattr(dictionary, name).detach() for name in names}
    if not whole:
        weights = {name: value[..., features].clone() for name, value in weights.items()}
    if not getattr(dictionary, "transcodes", False):
        weights["b_in"] = dictionary.b_dec.detach()
    return Encoder(rule, weights, {**dictionary.settings, "columns": list(features)})
