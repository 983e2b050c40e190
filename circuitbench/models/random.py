"""Tiny models with random weights, of any family there is a map for: for tests, for trying things out, offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..architectures import Architecture


def random_model(
    architecture: Architecture, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A tiny model of a family, the same one for the same seed.

    Fresh weights are nearly degenerate (all decays equal, norms one, projections tiny), which hides mistakes; they are
    spread out here, so that every site matters to the logits.

    Args:
        architecture: The family's map, which holds a tiny configuration.
        seed: Of the weights.
        dtype: Of the weights.
        **overrides: Changes to that configuration.
    """
    # nnsight's batches and generation want the special tokens; a vocabulary of 97 has room for three.
    config = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **architecture.random_config, **overrides}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[architecture.model_type](**config), attn_implementation="eager", dtype=torch.float32
        )
        with torch.no_grad():
            for name, parameter in hf.named_parameters():
                spread(name, parameter)
    return hf.to(dtype).eval()


def spread(name: str, parameter: torch.Tensor) -> None:
    """Move a parameter away from its initial value, by an amount that keeps the model sane."""
    name = name.removesuffix(".0")  # in a list of one
    if name.endswith("igate_preact.bias"):
        parameter.zero_()  # from -10, where nothing enters the memory
    if name.endswith((".D", "A_log", "dt_bias")) or parameter.dim() == 1:
        parameter.add_(torch.randn_like(parameter), alpha=0.3 if name.endswith(".D") else 0.1)
    elif not parameter.any():  # xLSTM's gates would be the same everywhere
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    elif parameter.std() < 0.05:
        parameter.mul_(5)
