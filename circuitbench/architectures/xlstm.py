"""xLSTM (Beck et al. 2024, arXiv:2405.04517; xLSTM 7B, arXiv:2503.13427): mLSTM and a gated MLP in every layer.

The matrix memory is an ``ssm`` with heads: ``ssm.x`` are the values, ``ssm.B`` the keys, ``ssm.C`` the queries (divided
by √d_k), ``ssm.input_gate`` and ``ssm.forget_gate`` before exp and sigmoid. ``ssm.state`` is (b, t, heads, d_k, d_v +
1): the memory C, and the normaliser n as one more column, both in units of exp(``ssm.scale``). ``ssm.normed`` is each
head's output after its layer norm, ``ssm.gate`` the output gate before its sigmoid. Padding is not masked.
"""

from __future__ import annotations

from .base import Architecture, Part, Site
from .blocks import resid_mid, resid_post, resid_pre
from .rnn_scans import MLSTMScan

DIMS = {
    "h": "config.num_heads",
    "k": "config.qk_head_dim",
    "v": "multihead_norm.head_dim",
    "d_inner": "v_dim",
    "proj": "qkv_opreact.out_features",
}

XLSTM = Architecture(
    model_type="xlstm",
    layers="backbone.blocks",
    parts={
        "ssm": Part(("mlstm_layer",), "mlstm_backend", DIMS, MLSTMScan()),
        "mlp": Part(("ffn",), dims={"d_mlp": "up_proj_dim"}, mixes=False),
    },
    sites={
        **resid_pre(),
        "ssm.in_proj": Site("qkv_opreact:output", "b t proj", when="qkv_opreact"),
        "ssm.x": Site("scan:x", "b t h v"),
        "ssm.B": Site("scan:B", "b t h k"),
        "ssm.C": Site("scan:C", "b t h k"),
        "ssm.input_gate": Site("scan:input_gate", "b t h"),
        "ssm.forget_gate": Site("scan:forget_gate", "b t h"),
        "ssm.decay": Site("scan:decay", "b t h"),
        "ssm.write": Site("scan:write", "b t h k v+1"),
        "ssm.scale": Site("scan:scale", "b t h", writable=False),
        "ssm.state": Site("scan:state", "b t h k v+1", writable=False),
        "ssm.mixing": Site("scan:mixing", "b h t t", writable=False),
        "ssm.y": Site("scan:y", "b t h v"),
        "ssm.normed": Site("multihead_norm:output", "b t (h v) -> b t h v"),
        "ssm.gate": Site("ogate_act_fn:input", "b t d_inner"),
        "ssm.gated": Site("out_proj:input", "b t d_inner"),
        "ssm.out": Site(":output"),
        **resid_mid("norm_ffn"),
        "mlp.in": Site(":input"),
        "mlp.hidden": Site("proj_down:input", "b t d_mlp"),
        "mlp.out": Site(":output"),
        **resid_post(),
    },
    final_norm="backbone.out_norm",
    random_config={
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "qk_dim_factor": 1.0,
        "v_dim_factor": 2.0,
        "ffn_proj_factor": 0.75,
        "ffn_round_up_to_multiple_of": 8,
        "chunk_size": 8,
        "autocast_kernel_dtype": "float32",
    },
)
