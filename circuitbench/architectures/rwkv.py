"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048), the one RWKV that transformers has.

Every channel keeps a weighted mean (see `recurrences.wkv4`): ``ssm.k`` are the keys, ``ssm.x`` the values, ``ssm.gate``
the receptance before its sigmoid, ``ssm.state`` numerator and denominator in units of exp(``ssm.scale``). The state is
that after a position's write; ``ssm.y`` reads the one before it. The channel mixing (``mlp``) looks one token back, and
``mlp.gate`` is its receptance before the sigmoid.

In eval mode transformers halves the residual stream after every ``rescale_every`` (6) layers, and divides the weights
of what is added to it, to keep half precision in range. The sites show the stream as it is without that: reads multiply
the power of two back, writes divide by it, both exactly.

The first layer norms the embeddings: ``embed`` is before that, ``layers.0.resid_pre`` after. Padding is not masked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import LAYER, Architecture, Part, Site
from .rnn_scans import WKV4Scan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CHANNELS = "b t d_inner"


def halvings(config: PretrainedConfig, layer: Any) -> float:
    """By what the residual stream is divided in a layer."""
    every: int = config.rescale_every
    return 2.0 ** (layer.layer_id // every) if every > 0 else 1.0


RWKV = Architecture(
    model_type="rwkv",
    layers="rwkv.blocks",
    parts={
        "ssm": Part(("attention",), "time_decay", {"d_inner": "attention_hidden_size"}, WKV4Scan()),
        "mlp": Part(("feed_forward",), dims={"d_mlp": "value.in_features"}, mixes=False),
    },
    sites={
        "resid_pre": (
            Site("pre_ln:output", base=LAYER, when="layer.pre_ln"),
            Site(":input", base=LAYER, divided=halvings),
        ),
        "ssm.gate": Site("receptance:output", CHANNELS),
        "ssm.k": Site("scan:k", CHANNELS),
        "ssm.x": Site("scan:x", CHANNELS),
        "ssm.decay": Site("scan:decay", CHANNELS),
        "ssm.write": Site("scan:write", "b t d_inner num_den"),
        "ssm.scale": Site("scan:scale", CHANNELS, writable=False),
        "ssm.state": Site("scan:state", "b t d_inner num_den", writable=False),
        "ssm.mixing": Site("scan:mixing by channel", "b channels t t", writable=False),
        "ssm.y": Site("scan:y", CHANNELS),
        "ssm.gated": Site("output:input", CHANNELS),
        "ssm.out": Site(":output", divided=halvings),
        "resid_mid": Site("ln2:input", base=LAYER, in_place=True, divided=halvings),
        "mlp.in": Site(":input"),
        "mlp.hidden": Site("value:input", "b t d_mlp"),
        "mlp.gate": Site("receptance:output"),
        "mlp.out": Site(":output", divided=halvings),
        "resid_post": Site(":output", base=LAYER, divided=halvings),
    },
    final_norm="rwkv.ln_out",
    unembed="head",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "attention_hidden_size": 32,
        "intermediate_size": 48,
        "context_length": 256,
        "rescale_every": 2,
    },
)
