"""RecurrentGemma (arXiv:2404.07839), Griffin's architecture: RG-LRU in two layers of three, local attention in the
third.

The state is kept on the modules, not in a cache. A run from the beginning of a prompt forgets what an earlier one has
left there; prompts of different length cannot share a batch, as padding would run through the convolution.

``ssm.input_gate`` and ``ssm.recurrence_gate`` are the sigmoids i_t and r_t; ``ssm.decay`` is a_t =
exp(−8·softplus(Λ)·r_t), 0 where a document begins; ``ssm.x`` is √(1 − a²)·i_t·u_t for the convolution's output u
(``ssm.conv``, no activation).
"""

from __future__ import annotations

from .base import Architecture, Part, Site
from .blocks import attention, attention_part, mlp, mlp_part, resid_mid, resid_post, resid_pre
from .rnn_scans import RGLRUScan

CHANNELS = "b t d_inner"

RECURRENT_GEMMA = Architecture(
    model_type="recurrent_gemma",
    layers="model.layers",
    parts={
        "ssm": Part(("temporal_block",), "rg_lru", {"d_inner": "lru_width"}, RGLRUScan()),
        "attn": attention_part("temporal_block"),
        "mlp": mlp_part("mlp_block"),
    },
    sites={
        **resid_pre(),
        "ssm.gate": Site("linear_y:output", CHANNELS),
        "ssm.in_proj": Site("linear_x:output", CHANNELS),
        "ssm.conv": Site("rg_lru:input", CHANNELS),
        "ssm.input_gate": Site("rg_lru/torch_sigmoid_0:output", CHANNELS),
        "ssm.recurrence_gate": Site("rg_lru/torch_sigmoid_1:output", CHANNELS),
        "ssm.x": Site("scan:x", CHANNELS),
        "ssm.decay": Site("scan:decay", CHANNELS),
        "ssm.write": Site("scan:write", CHANNELS),
        "ssm.state": Site("scan:state", CHANNELS, writable=False),
        "ssm.mixing": Site("scan:mixing by channel", "b channels t t", writable=False),
        "ssm.y": Site("scan:y", CHANNELS),
        "ssm.gated": Site("linear_out:input", CHANNELS),
        "ssm.out": Site(":output"),
        **attention(),
        **resid_mid("channel_pre_norm"),
        **mlp(),
        **resid_post(),
    },
    final_norm="model.final_norm",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_window_size": 8,
        "conv1d_width": 4,
    },
)
