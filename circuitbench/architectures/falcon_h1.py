"""Falcon-H1 (TII 2025, arXiv:2507.22448): a Mamba-2 mixer and attention side by side in every layer.

The branches are multiplied before they are added, so ``ssm.out`` and ``attn.out`` are read after that. Without
``mamba_rms_norm`` the gate is a plain product: of its own operation for a whole sequence, inside the scan while
decoding.
"""

from __future__ import annotations

from .base import LAYER, Architecture, Site
from .blocks import attention, attention_part, mlp, mlp_part, resid_mid, resid_post, resid_pre, ssd, ssd_part

FALCON_H1 = Architecture(
    model_type="falcon_h1",
    layers="model.layers",
    parts={"ssm": ssd_part("mamba"), "attn": attention_part("self_attn"), "mlp": mlp_part("feed_forward")},
    sites={
        **resid_pre(),
        **ssd(
            out=Site("/mamba_hidden_states_1:output", base=LAYER),
            gate=(
                Site("norm:input[1]", "b t d_inner", when="mamba_rms_norm"),
                Site("/torch_nn_functional_silu_0:input", "b t d_inner", step="scan:gate", when="!mamba_rms_norm"),
            ),
        ),
        **attention(out=Site("/attention_hidden_states_0:output", base=LAYER)),
        **resid_mid("pre_ff_layernorm"),
        **mlp(),
        **resid_post(),
    },
    final_norm="model.final_layernorm",
    random_config={
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 2,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "mamba_rms_norm": True,
        "ssm_multipliers": [0.7, 0.9, 1.1, 1.2, 0.8],
        "ssm_in_multiplier": 0.5,
        "ssm_out_multiplier": 0.6,
        "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 0.8,
        "key_multiplier": 0.7,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.3,
        "mlp_multipliers": [0.9, 0.8],
    },
)
