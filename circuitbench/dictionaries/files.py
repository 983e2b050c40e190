"""Dictionaries on disk, in SAELens' layout: `cfg.json` and `sae_weights.safetensors`. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from circuitbench.dictionaries.base import KINDS, Dictionary, build
from circuitbench.errors import BadInput

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def save(dictionary: Dictionary, path: str | Path) -> None:
    """Write the folder `path`, which is made if need be; a dictionary already there is replaced."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; a dictionary is saved as a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(dictionary.W_enc.dtype).removeprefix("torch.")
    config = {
        "architecture": dictionary.kind,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_dict,
        **dictionary.settings,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"hook_name": dictionary.site, "model_name": dictionary.model_name, "site": dictionary.site},
    }
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in dictionary.named_parameters()}
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def load_dictionary(path: str | Path) -> Dictionary:
    """The dictionary saved in the folder `path`, by us or by SAELens.

    Raises:
        BadInput: no such folder, a file missing, damaged or truncated, a tensor missing or of the wrong shape, an
            unknown kind, or an option of SAELens' that changes what the weights mean and is not known here.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; give the one that holds {CONFIG} and {WEIGHTS}.")
    config = _read_config(folder / CONFIG)
    cls = KINDS[config["architecture"]]
    try:
        settings = {name: config[name] for name in cls.settings_names}
        dictionary = build(
            cls.kind,
            d_in=config["d_in"],
            d_dict=config["d_sae"],
            dtype=_DTYPES[config.get("dtype", "float32")],
            **settings,
        )
    except (KeyError, TypeError) as error:
        raise BadInput(f"{folder / CONFIG} does not describe a {cls.kind!r} dictionary: {error!r}.") from error
    _fill(dictionary, _read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    _undo_saelens_options(dictionary, config)
    metadata = config.get("metadata") or {}
    dictionary.site = metadata.get("site") or metadata.get("hook_name")
    dictionary.model_name = metadata.get("model_name")
    return dictionary


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(f"{path} is missing; a saved dictionary has {CONFIG} and {WEIGHTS}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); save the dictionary again.") from error
    kind = config.get("architecture") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise BadInput(
            f"{path} says architecture {kind!r}; the kinds known here are: {', '.join(map(repr, sorted(KINDS)))}."
        )
    for option in ("normalize_activations", "reshape_activations"):
        if config.get(option, "none") != "none":
            raise BadInput(
                f"{path} asks for {option}={config[option]!r}, which is not known here; fold it into the weights first."
            )
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise BadInput(f"{path} is missing; weights are read from safetensors only, never from a pickle.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BadInput(f"{path} is truncated or not a safetensors file ({error}); copy it again.") from error


def _fill(dictionary: Dictionary, tensors: dict[str, Tensor], path: Path) -> None:
    parameters = dict(dictionary.named_parameters())
    if set(tensors) != set(parameters):
        raise BadInput(
            f"{path} holds the tensors {', '.join(sorted(tensors))}; "
            f"a {dictionary.kind!r} dictionary has {', '.join(sorted(parameters))}."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise BadInput(
                    f"{path} holds {name} with shape {tuple(tensors[name].shape)}; "
                    f"the sizes in {CONFIG} ask for {tuple(parameter.shape)}."
                )
            parameter.copy_(tensors[name])


@torch.no_grad()
def _undo_saelens_options(dictionary: Dictionary, config: dict[str, Any]) -> None:
    """Bring two of SAELens' options to our form, which has the same activations and the same reconstruction."""
    if config.get("rescale_acts_by_decoder_norm", False):
        norms = dictionary.W_dec.norm(dim=1).clamp_min(1e-8)
        dictionary.W_enc.mul_(norms)
        dictionary.b_enc.mul_(norms)
        dictionary.W_dec.div_(norms.unsqueeze(1))
    if not config.get("apply_b_dec_to_input", True):
        dictionary.b_enc.add_(dictionary.b_dec @ dictionary.W_enc)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    save_file(tensors, unfinished, metadata)
    os.replace(unfinished, path)
