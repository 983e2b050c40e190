"""RWKV-7 "Goose" (Peng et al. 2025, arXiv:2503.14456): a delta rule whose state decays channel by channel.

Six inputs of the mixer, and that of the feed-forward, are mixed with the token before's: ``ssm.shift`` and
``mlp.shift`` are what stood there. What the first layer makes as values is mixed into those of all later ones:
``ssm.v_first`` is, in the first layer, what it hands on, and in a later one what this layer is given; an edit stays in
the layers that it belongs to. ``ssm.v`` are the values after that. The scan is given the logarithm of the decay,
``ssm.w``; ``ssm.a`` asks the state, and ``ssm.b`` is where its answer is put back. Every head of y is normed; then
``ssm.bonus`` is added, what a token reads of itself past the state, and ``ssm.gate`` multiplies. The first layer norms
the embeddings: its ``resid_pre`` comes after that. The code of the model is ours (`models.rwkv7`).
"""

from __future__ import annotations

from .base import LAYER, Architecture, Part, Site
from .blocks import RECURRENT, mlp, resid_mid, resid_post, resid_pre
from .scans import RWKV7Scan

SHIFT = Site("/token_shift_0:output")
DIMS = {"h": "num_heads", "k": "head_dim", "v": "head_v_dim", "d_inner": "value_dim"}

RWKV7 = Architecture(
    model_type="rwkv7",
    layers="model.layers",
    parts={
        "ssm": Part(("attn",), "r_k", DIMS, RWKV7Scan(), cache=RECURRENT),
        "mlp": Part(("ffn",), dims={"d_mlp": "value.in_features"}, mixes=False),
    },
    sites={
        "resid_pre": (Site("pre_norm:output", base=LAYER, when="pre_norm"), resid_pre()["resid_pre"]),
        "ssm.shift": SHIFT,
        "ssm.v_first": Site("/carry_0:output", "b t (h v) -> b t h v"),
        "ssm.gate": Site("g_lora:output", "b t d_inner"),
        "ssm.r": Site("scan:r", "b t h k"),
        "ssm.w": Site("scan:w", "b t h k"),
        "ssm.k": Site("scan:k", "b t h k"),
        "ssm.v": Site("scan:x", "b t h v"),
        "ssm.a": Site("scan:a", "b t h k"),
        "ssm.b": Site("scan:b", "b t h k"),
        "ssm.decay": Site("scan:decay", "b t h k"),
        "ssm.write": Site("scan:write", "b t h k v"),
        "ssm.state": Site("scan:state", "b t h k v", writable=False),
        "ssm.mixing": Site("scan:mixing", "b h t t", writable=False),
        "ssm.y": Site("scan:y", "b t h v"),
        "ssm.bonus": Site("/bonus_0:output", "b t h v"),
        "ssm.gated": Site("o_proj:input", "b t d_inner"),
        "ssm.out": Site(":output"),
        **resid_mid("ffn_norm"),
        "mlp.in": Site(":input"),
        "mlp.shift": SHIFT,
        **{name: site for name, site in mlp("value").items() if name != "mlp.in"},
        **resid_post(),
    },
    final_norm="model.norm",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "intermediate_size": 48,
        "decay_low_rank_dim": 6,
        "gate_low_rank_dim": 6,
        "a_low_rank_dim": 6,
        "v_low_rank_dim": 4,
    },
)
