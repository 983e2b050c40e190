"""The object a user holds: one Hugging Face model, and every tensor inside it by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BadInput, SiteNotFound
from .views import Layers

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .prompts import Prompts
    from .spots import Spot
    from .views import LayerView


class Model:
    """A language model whose sites can be read and changed while it runs.

    It holds nnsight's model and hands out nnsight's own ``trace`` and ``generate``; the sites are plain views over it,
    so a with-block written with them also runs on a server that has never heard of circuitbench. Build one with
    `load_model`.

    Attributes:
        layers: The layers; ``model.layers[3].ssm.y``.
        meta_tokens: Columns that all sites but the logits have before a prompt's own tokens, in a forward that begins
            with the prompt; 0 for all families but Hymba.
    """

    nn: Any  # nnsight's model; Any, because nnsight types every attribute of an envoy as a tensor
    layers: Layers
    architecture: str
    meta_tokens: int
    _roots: dict[str, Spot]
    _shapes: dict[str, tuple[str, ...]]

    def __init__(
        self,
        nn: TransformersModel,
        layers: list[LayerView],
        roots: dict[str, Spot],
        shapes: dict[str, tuple[str, ...]],
        architecture: str,
        meta_tokens: int = 0,
    ) -> None:
        self.__dict__["nn"] = nn
        self.__dict__["layers"] = Layers(layers)
        self.__dict__["_roots"] = roots
        self.__dict__["_shapes"] = shapes
        self.__dict__["architecture"] = architecture
        self.__dict__["meta_tokens"] = meta_tokens

    @property
    def hf(self) -> PreTrainedModel:
        """The Hugging Face module."""
        return self.nn._module

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, if there is one."""
        return self.nn.tokenizer

    @property
    def device(self) -> Any:
        """Where the model's weights are."""
        return next(self.hf.parameters()).device

    @property
    def trace(self) -> Any:
        """nnsight's ``trace``: ``with model.trace(prompt): ...``; ``remote=`` works as there."""
        self._check_free()
        return self.nn.trace

    @property
    def generate(self) -> Any:
        """nnsight's ``generate``: ``with model.generate(prompt, max_new_tokens=5) as tracer: ...``."""
        self._check_free()
        return self.nn.generate

    def generate_text(self, prompts: Prompts, **settings: Any) -> Any:
        """Continue prompts, and return the text.

        Args:
            prompts: A string, a list of strings, or token ids.
            **settings: ``max_new_tokens=20``, ``temperature=0.0``, ``top_k``, ``top_p``, ``num_beams``, ``seed``,
                ``state``, ``remote``, ``blocking`` (see `models.generation.generate_text`).

        Returns:
            The continuation without the prompt; a list for a list of prompts.
        """
        from .generation import generate_text  # here, because what a model names at module level travels with it

        return generate_text(self, prompts, **settings)

    def _check_free(self) -> None:
        """One forward at a time: nnsight's workers belong to the thread that runs it."""
        if self.nn.interleaver.interleaving:
            raise BadInput(
                "This model is already running a trace (here or on another thread); finish that one first, or load the "
                "model once for each thread."
            )

    @property
    def sites(self) -> list[str]:
        """Addresses of all sites, in the order the model reaches them."""
        inside = [f"layers.{layer.index}.{name}" for layer in self.layers for name in layer.sites]
        return ["embed", *inside, "logits"]

    def __getattr__(self, name: str) -> Tensor:
        roots = self.__dict__.get("_roots", {})
        if name in roots:
            return roots[name].get()
        if name.startswith("_"):
            raise AttributeError(name)
        raise SiteNotFound(
            f"A model has no site or attribute {name!r}; it has embed, logits and layers[i] "
            f"with {', '.join(self._names())}."
        )

    def __setattr__(self, name: str, value: Tensor) -> None:
        if name not in self._roots:
            raise SiteNotFound(f"A model has no site {name!r} to write; at the top there are embed and logits.")
        self._roots[name].set(value)

    def _names(self) -> list[str]:
        """Names of the sites that any layer has."""
        return list(dict.fromkeys(name for layer in self.layers for name in layer.sites))

    def __dir__(self) -> list[str]:
        return [*object.__dir__(self), *self._roots]

    def __repr__(self) -> str:
        config = self.hf.config
        total = sum(parameter.numel() for parameter in self.hf.parameters())
        lines = [f"{type(self.hf).__name__} ({config.model_type}, {total:,} parameters, {len(self.layers)} layers)"]
        lines.append(f"  embed {_shape(self._shapes['embed'])}")
        groups: list[tuple[int, int, LayerView]] = []
        for layer in self.layers:
            if groups and (groups[-1][2].kind, groups[-1][2].sites) == (layer.kind, layer.sites):
                groups[-1] = (groups[-1][0], layer.index, groups[-1][2])
            else:
                groups.append((layer.index, layer.index, layer))
        for first, last, layer in groups:
            lines.append(f"  layers.{first}" + (f" to {last}" if last > first else "") + f": {layer.kind}")
            lines.extend(f"    {name:<16} {_shape(shape)}" for name, shape in layer.shapes.items())
        lines.append(f"  logits {_shape(self._shapes['logits'])}")
        return "\n".join(lines)


def _shape(shape: tuple[str, ...]) -> str:
    return "(" + ", ".join(shape) + ")"
