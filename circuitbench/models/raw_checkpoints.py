"""The checkpoints of the ``state-spaces`` organisation, as published: their own config.json, a pickled state dict.

``state-spaces/mamba-*`` and ``mamba2-*`` predate transformers' port and carry a configuration of another form.
Parameter names agree (transformers renames the embedding itself), so what is needed is the configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Mamba2Config,
    MambaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from ..errors import BadInput, UnsupportedModel

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def fetch(source: str, file: str, revision: str | None) -> Path | None:
    """A file of a folder or of a Hub repository; ``None`` if a folder lacks it."""
    if Path(source).is_dir():
        path = Path(source) / file
        return path if path.exists() else None
    return Path(hf_hub_download(source, file, revision=revision))


def read_config(source: str, revision: str | None) -> dict[str, Any] | None:
    """The config.json, or ``None`` if there is none."""
    path = fetch(source, "config.json", revision)
    try:
        return None if path is None else json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is not JSON ({error}).") from error


def is_raw(source: str, revision: str | None = None) -> bool:
    """Whether config.json is of the original code's form (``d_model`` and ``n_layer``, no ``model_type``)."""
    config = read_config(source, revision)
    return config is not None and "model_type" not in config and {"d_model", "n_layer"} <= config.keys()


def converted(raw: dict[str, Any], vocab_size: int) -> PretrainedConfig:
    """transformers' configuration for an original one.

    Args:
        raw: The original config.json.
        vocab_size: Rows of the embedding, which the original code pads to a multiple.

    Raises:
        UnsupportedModel: If it has attention layers or MLPs, which transformers' Mamba has no place for.
    """
    if raw.get("attn_layer_idx") or raw.get("d_intermediate", 0) > 0:
        raise UnsupportedModel(
            "This checkpoint has attention layers or MLPs (attn_layer_idx, d_intermediate), which transformers' Mamba "
            "cannot hold; load a pure mamba or mamba2 checkpoint."
        )
    ssm = dict(raw.get("ssm_cfg") or {})
    kind = ssm.pop("layer", "Mamba1")
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": raw["d_model"],
        "num_hidden_layers": raw["n_layer"],
        "layer_norm_epsilon": raw.get("norm_epsilon", 1e-5),
        "residual_in_fp32": raw.get("residual_in_fp32", True),
        "tie_word_embeddings": raw.get("tie_embeddings", True),
        "expand": ssm.pop("expand", 2),
        "conv_kernel": ssm.pop("d_conv", 4),
    }
    if kind == "Mamba2":
        head_dim = ssm.pop("headdim", 64)
        config: PretrainedConfig = Mamba2Config(
            **common,
            state_size=ssm.pop("d_state", 128),
            head_dim=head_dim,
            num_heads=common["expand"] * raw["d_model"] // head_dim,
            n_groups=ssm.pop("ngroups", 1),
            chunk_size=ssm.pop("chunk_size", 256),
        )
    elif kind == "Mamba1":
        config = MambaConfig(**common, state_size=ssm.pop("d_state", 16), time_step_rank=ssm.pop("dt_rank", "auto"))
    else:
        raise UnsupportedModel(f"This checkpoint's layer is {kind!r}; there are converters for Mamba1 and Mamba2.")
    if ssm:
        raise UnsupportedModel(f"This checkpoint sets {', '.join(sorted(ssm))} in ssm_cfg, which has no counterpart.")
    return config


def load(source: str, revision: str | None, dtype: torch.dtype, remote: bool) -> PreTrainedModel:
    """A raw checkpoint as a Hugging Face model.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        dtype: Of the weights.
        remote: Leave the weights on the meta device.
    """
    raw = read_config(source, revision)
    assert raw is not None  # `is_raw` read it
    if remote:
        multiple = raw.get("pad_vocab_size_multiple", 8)
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(
                converted(raw, -(-raw["vocab_size"] // multiple) * multiple), dtype=dtype
            )
        hf.name_or_path = source
        return hf
    state = read_weights(source, revision)
    if "backbone.embedding.weight" not in state:
        raise UnsupportedModel(
            f"The weights in {source!r} have no backbone.embedding.weight, so they are not the original code's."
        )
    config = converted(raw, state["backbone.embedding.weight"].shape[0])
    hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        missing, unexpected = hf.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of other shapes
        raise UnsupportedModel(
            f"The weights in {source!r} do not have the shapes its config.json gives a {config.model_type} of "
            f"d_model={config.hidden_size}."
        ) from error
    missing = [key for key in missing if key != "lm_head.weight" or not config.tie_word_embeddings]
    if missing or unexpected:
        raise UnsupportedModel(
            f"The weights in {source!r} do not fit a {config.model_type}: missing {missing}, unexpected {unexpected}."
        )
    hf.tie_weights()
    hf.name_or_path = source
    return hf


def read_weights(source: str, revision: str | None) -> dict[str, torch.Tensor]:
    """The state dict, from safetensors if there is one, else from the pickle, of which only tensors are unpacked."""
    for file in WEIGHTS:
        try:
            path = fetch(source, file, revision)
        except OSError:
            continue
        if path is not None:
            if file.endswith(".safetensors"):
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    raise UnsupportedModel(f"{source!r} holds neither {' nor '.join(WEIGHTS)}.")
