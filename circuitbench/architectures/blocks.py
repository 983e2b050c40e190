"""Sites that many families share, as building bricks for their maps.

Each function returns ``{site name: Site}`` in the order the model reaches them; a family's map is a few of them in a
row, plus what is its own. Pass keyword overrides to change single entries.
"""

from __future__ import annotations

from .base import LAYER, Part, Site
from .scans import GatedDeltaScan, S6Scan, SSDScan

RECURRENT = "get_recurrent_state"  # of transformers' caches: None before the first token
HEADS = "b t (h p) -> b t h p"
PER_HEAD_GATE = Site("norm:input[1]", "(b t h) v -> b t (h v)")  # of the norms that see heads as rows
CONV = Site(
    "/causal_conv1d_fn_0:output",
    "b conv_dim t -> b t conv_dim",
    step="/causal_conv1d_update_0:output",
    trim=True,
)


def resid_pre() -> dict[str, Site]:
    """The residual stream before the layer."""
    return {"resid_pre": Site(":input", base=LAYER)}


def resid_post() -> dict[str, Site]:
    """The residual stream after the layer."""
    return {"resid_post": Site(":output", base=LAYER)}


def resid_mid(norm: str) -> dict[str, Site]:
    """The residual stream between the two halves of a layer: the second norm's input, which is added again later."""
    return {"resid_mid": Site(f"{norm}:input", base=LAYER, in_place=True)}


def s6(out: Site | None = None) -> dict[str, Site]:
    """Mamba's mixer. Its scan applies the gate itself."""
    return {
        "ssm.in_proj": Site("in_proj:output", "b t proj"),
        "ssm.conv": CONV,
        "ssm.x": Site("scan:x", "b t d_inner"),
        "ssm.dt": Site("scan:dt", "b t d_inner"),
        "ssm.B": Site("scan:B", "b t n"),
        "ssm.C": Site("scan:C", "b t n"),
        "ssm.decay": Site("scan:decay", "b t d_inner n"),
        "ssm.write": Site("scan:write", "b t d_inner n"),
        "ssm.state": Site("scan:state", "b t d_inner n", writable=False),
        "ssm.mixing": Site("scan:mixing by channel", "b channels t t", writable=False),
        "ssm.y": Site("scan:y", "b t d_inner"),
        "ssm.gate": Site("scan:gate", "b t d_inner"),
        "ssm.gated": Site("out_proj:input", "b t d_inner"),
        "ssm.out": out or Site(":output"),
    }


def ssd(out: Site | None = None, gate: Site | tuple[Site, ...] | None = None) -> dict[str, Site | tuple[Site, ...]]:
    """Mamba-2's mixer. The gate is applied by the norm that follows the scan."""
    return {
        "ssm.in_proj": Site("in_proj:output", "b t proj"),
        "ssm.conv": CONV,
        "ssm.x": Site("scan:x", "b t h p"),
        "ssm.dt": Site("scan:dt", "b t h"),
        "ssm.B": Site("scan:B", "b t g n"),
        "ssm.C": Site("scan:C", "b t g n"),
        "ssm.decay": Site("scan:decay", "b t h"),
        "ssm.write": Site("scan:write", "b t h p n"),
        "ssm.state": Site("scan:state", "b t h p n", writable=False),
        "ssm.mixing": Site("scan:mixing", "b h t t", writable=False),
        "ssm.y": Site("scan:y", "b t h p"),
        "ssm.gate": gate or Site("norm:input[1]", "b t d_inner"),
        "ssm.gated": Site("out_proj:input", "b t d_inner"),
        "ssm.out": out or Site(":output"),
    }


def gated_delta(
    projections: dict[str, Site], gate: Site, decay: str = "b t h", out: str = "out_proj"
) -> dict[str, Site]:
    """The gated delta rule: x are the values, B the keys, C the queries, beta the write strength.

    Args:
        projections: The input projections, fused or apart.
        gate: The gate, which the norm that follows the scan applies.
        decay: Axes of the decay: one for each head, or with ``k`` for each key channel too.
        out: The output projection.
    """
    return {
        **projections,
        "ssm.conv": CONV,
        "ssm.x": Site("scan:x", "b t h v"),
        "ssm.B": Site("scan:B", "b t h k"),
        "ssm.C": Site("scan:C", "b t h k"),
        "ssm.beta": Site("scan:beta", "b t h"),
        "ssm.decay": Site("scan:decay", decay),
        "ssm.write": Site("scan:write", "b t h k v"),
        "ssm.state": Site("scan:state", "b t h k v", writable=False),
        "ssm.mixing": Site("scan:mixing", "b h t t", writable=False),
        "ssm.y": Site("scan:y", "b t h v"),
        "ssm.gate": gate,
        "ssm.gated": Site(f"{out}:input", "b t d_inner"),
        "ssm.out": Site(":output"),
    }


def qkv_projections() -> dict[str, Site]:
    """The projections of queries, keys and values, where they are apart: what enters the short convolution."""
    return {
        "ssm.q_proj": Site("q_proj:output", "b t d_key"),
        "ssm.k_proj": Site("k_proj:output", "b t d_key"),
        "ssm.v_proj": Site("v_proj:output", "b t d_inner"),
    }


def attention(
    out: Site | None = None, heads: str = "o_proj", q: Site | tuple[Site, ...] | None = None
) -> dict[str, Site | tuple[Site, ...]]:
    """Attention with separate projections; q and k before any rotary embedding."""
    return {
        "attn.q": q or Site("q_proj:output", HEADS),
        "attn.k": Site("k_proj:output", "b t (kv p) -> b t kv p"),
        "attn.v": Site("v_proj:output", "b t (kv p) -> b t kv p"),
        "attn.pattern": Site("pattern:", "b h t t"),
        "attn.z": Site(f"{heads}:input", HEADS),
        "attn.out": out or Site(":output"),
    }


def mlp(down: str = "down_proj", out: Site | None = None, router: str | None = None) -> dict[str, Site]:
    """An MLP; with `router`, layers may hold a mixture of experts instead, whose hidden layer is not one tensor."""
    sites = {"mlp.in": Site(":input")}
    if router:
        sites["moe.router"] = Site(f"{router}/router_logits_0:output", "(b t) experts -> b t experts")
    return {**sites, "mlp.hidden": Site(f"{down}:input", "b t d_mlp"), "mlp.out": out or Site(":output")}


SSD_DIMS = {"h": "num_heads", "p": "head_dim", "n": "ssm_state_size", "g": "n_groups", "d_inner": "intermediate_size"}


def s6_part(*paths: str) -> Part:
    """Where Mamba's mixer is in a layer."""
    return Part(paths, "x_proj", {"n": "ssm_state_size", "d_inner": "intermediate_size"}, S6Scan(), cache=RECURRENT)


def ssd_part(*paths: str) -> Part:
    """Where Mamba-2's mixer is in a layer."""
    return Part(paths, "conv1d", SSD_DIMS, SSDScan(), cache=RECURRENT)


def gated_delta_part(*paths: str) -> Part:
    """Where the gated delta rule is in a layer."""
    dims = {"h": "num_v_heads", "v": "head_v_dim", "k": "head_k_dim", "d_inner": "value_dim", "d_key": "key_dim"}
    return Part(paths, "conv1d", dims, GatedDeltaScan(), cache=RECURRENT)


def attention_part(*paths: str, marker: str = "q_proj", head_dim: str = "head_dim", heads: str = "") -> Part:
    """Where attention is in a layer."""
    return Part(paths, marker, {"p": head_dim, "h": heads or "config.num_attention_heads"})


def mlp_part(*paths: str, marker: str | tuple[str, ...] | None = None) -> Part:
    """Where the MLP (or the mixture of experts) is in a layer."""
    return Part(paths, marker, mixes=False)


def moe_part(*paths: str, marker: str = "experts") -> Part:
    """The mixture of experts: the same module as the MLP, in the layers that have experts."""
    return Part(paths, marker, mixes=False)
