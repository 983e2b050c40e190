"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, TopK autoencoders and transcoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.formats import common
from circuitbench.errors import BadInput

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"


def read(folder: Path) -> Dictionary:
    """The dictionary in a hookpoint's folder, in the dtype of the file.

    Its `metadata["sparsify"]` is the configuration. Which site the folder's name stands for is not guessed.

    Raises:
        BadInput: as `load_dictionary`.
    """
    path = folder / CONFIG
    config = common.read_json(path)
    for option, known in (("activation", "topk"), ("signed", False)):
        if config.get(option, known) != known:
            raise BadInput(f"{path} asks for {option}={config[option]!r}; read is {option}={known!r}.")
    d_in, k = common.integer(config, "d_in", path), common.integer(config, "k", path)
    d_dict = config.get("num_latents") or d_in * common.integer(config, "expansion_factor", path)
    d_dict = common.integer({"num_latents": d_dict}, "num_latents", path)
    transcode, skip = bool(config.get("transcode")), bool(config.get("skip_connection"))

    tensors, _ = common.read_safetensors(folder / WEIGHTS)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_dict, d_in),
        "encoder.bias": (d_dict,),
        "W_dec": (d_dict, d_in),
        "b_dec": (d_in,),
    }
    if skip:
        shapes["W_skip"] = (d_in, d_in)
    common.check_tensors(tensors, shapes, "sparsify", folder / WEIGHTS)
    ours = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        **{name: tensors[name] for name in shapes if name.startswith(("W_", "b_"))},
    }

    def without_b_dec(found: dict[str, Tensor]) -> dict[str, Tensor]:
        # An autoencoder with a skip is for us a transcoder from a site to itself, and those subtract nothing.
        return found | {"b_enc": found["b_enc"] - found["b_dec"] @ found["W_enc"]}

    arguments: dict[str, Any] = {"fold": without_b_dec} if skip and not transcode else {}
    dictionary = common.assemble(
        "topk",
        ours,
        dtype=_widest(ours),
        path=folder / WEIGHTS,
        d_in=d_in,
        d_dict=d_dict,
        d_out=d_in if transcode or skip else None,
        skip=skip,
        k=k,
        **arguments,
    )
    dictionary.metadata = {"sparsify": config}
    return dictionary


def _widest(tensors: dict[str, Tensor]) -> torch.dtype:
    dtype = torch.float16
    for tensor in tensors.values():
        dtype = tensor.dtype if dtype == torch.float16 else torch.promote_types(dtype, tensor.dtype)
    return dtype
