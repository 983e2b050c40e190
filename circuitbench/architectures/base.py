"""The words a map is written in: `Site`, `Part`, `Architecture`.

A map says, for one family of Hugging Face models, where each site lives. It is data: strings that name modules,
operations and axes. Nothing here runs a model; `models/` turns a bound map into views, and `circuitbench check`
verifies it.

The address of a location is written ``module.path/operation:port[index]``:

* ``out_proj:input``: the first input of the part's submodule ``out_proj``;
* ``:output``: the part's own output (the first element, when it returns a tuple);
* ``norm:input[1]``: the second positional input of ``norm``;
* ``/causal_conv1d_fn_0:output``: the output of one operation inside the part's ``forward``, by nnsight's name for it;
* ``scan:y``: something the scan is given, keeps or returns; the part's `Scan` knows how to read and change it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from transformers import PretrainedConfig

    from .scans import Scan

LAYER = ""  # the name of the part that is the layer itself


@dataclass(frozen=True)
class Site:
    """Where one site lives, and the layout it has there.

    Attributes:
        at: Location, see the module's docstring. Relative to the part that the site's name starts with.
        layout: einops pattern from the tensor as the model holds it to the site's canonical layout. Axis names in it
            are looked up in the part's ``dims``. One side only means that the two are the same.
        step: Location while decoding one token with a cache, where that is another operation. ``None``: the same.
        index: Take this element of the pattern's first axis (for fused projections: ``"b t (s d) -> s b t d"``).
        when: Attribute of the part's module that must be true for this entry to apply (``"!name"``: must be false).
        scale: Attribute by which the model multiplies the tensor afterwards; reads and writes include it.
        divided: (configuration, layer) -> by what the model has divided the tensor in eval mode, to keep it in range;
            reads multiply it back, writes divide.
        trim: The operation's output may start with cached positions; only the last ``t`` belong to this forward.
        base: Name of the part `at` is relative to, where it is not the site's own (``""``: the layer).
        in_place: Assigning copies into the model's tensor, because the model goes on with that same tensor elsewhere
            (a residual stream that is read by a norm and added later).
        copied: What is read is a copy, because the model goes on with that same tensor elsewhere, where an edit of this
            site does not belong (a branch that reads the residual stream without a norm).
        made_from: Site that this one is made anew from at every call, for cached positions too. What is written here
            would be forgotten by the next call, so it is refused where the model goes on from a cache.
        writable: Whether the site can be written.
    """

    at: str
    layout: str = "b t d_model"
    step: str | None = None
    index: int | None = None
    when: str | None = None
    scale: str | None = None
    divided: Callable[[PretrainedConfig, Any], float] | None = None
    trim: bool = False
    base: str | None = None
    in_place: bool = False
    copied: bool = False
    made_from: str = ""
    writable: bool = True

    @property
    def patterns(self) -> tuple[str, str]:
        """The layout as the model holds it, and the canonical one."""
        raw, _, canonical = self.layout.partition("->")
        return raw.strip(), (canonical or raw).strip()


@dataclass(frozen=True)
class Part:
    """One component of a layer: its mixer, its attention, its MLP.

    Attributes:
        paths: Where the module may be, relative to the layer; the first that exists and fits is taken.
        marker: Submodule or parameter that tells this part from another one at the same path; of several, any.
        dims: Axis name -> attribute of the module (or ``config.x``) that holds its size.
        scan: How to read and replay the part's recurrence, if it has one.
        mixes: Whether the part moves information between positions (it then gives the layer its kind).
        to_residual: Whether the part's ``out`` is added to the residual stream.
        cache: How to tell that a call goes on from a cached state, which other operations then serve for one token: a
            method of the cache that returns the layer's state, or the name of an argument that is then true. ``""``
            where the same operations serve both.
    """

    paths: tuple[str, ...]
    marker: str | tuple[str, ...] | None = None
    dims: Mapping[str, str] = field(default_factory=dict)
    scan: Scan | None = None
    mixes: bool = True
    to_residual: bool = True
    cache: str = ""


@dataclass(frozen=True)
class Architecture:
    """The map of one family.

    Attributes:
        model_type: Hugging Face's ``config.model_type``.
        layers: Path of the module list that holds the layers.
        parts: Part name (``"ssm"``, ``"attn"``, ``"mlp"``, ``"moe"``) -> `Part`.
        sites: Site name inside a layer -> `Site` or alternatives, **in the order the model reaches them**.
        final_norm: Path of the norm before the unembedding.
        unembed: Path of the unembedding.
        embed: Where what enters layer 0 lives, relative to the model.
        meta_tokens: Attribute (``config.x``) that holds how many columns the layers have before a prompt's own: learned
            vectors that the model puts there.
        post_norm: Whether norms stand in the residual stream itself, so that it is no sum of its branches.
        random_config: Arguments of a tiny configuration for ``load_model("random:<model_type>")``.
    """

    model_type: str
    layers: str
    parts: Mapping[str, Part]
    sites: Mapping[str, Site | tuple[Site, ...]]
    final_norm: str
    unembed: str = "lm_head"
    embed: Site = Site("{layers}.0:input")
    logits: Site = Site(":output.logits", "b t vocab")
    meta_tokens: str = ""
    post_norm: bool = False
    random_config: Mapping[str, Any] = field(default_factory=dict)


def find_module(root: Any, path: str) -> Any:
    """The submodule (or parameter) at a dotted path, or ``None`` where there is none."""
    for name in filter(None, path.split(".")):
        root = getattr(root, name, None)
        if root is None:
            return None
    return root


def find_part(layer: nn.Module, part: Part) -> str | None:
    """The path of a part inside one layer, or ``None`` if this layer does not have it."""
    markers = (part.marker,) if isinstance(part.marker, str) else part.marker
    for path in part.paths:
        module = find_module(layer, path)
        if module is not None and (
            markers is None or any(find_module(module, marker) is not None for marker in markers)
        ):
            return path
    return None
