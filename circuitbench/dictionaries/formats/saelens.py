"""SAELens' layout, in which we save: `cfg.json` and `sae_weights.safetensors` of its version 6.54.

SAELens knows fewer kinds than we do, and one more, "temporal", for sequences. What it calls `jumprelu` is what
a batchtopk or a matryoshka dictionary does once it is trained, so they are saved under that name. Ours is recorded
beside it, in `metadata.circuitbench`, which SAELens keeps and does not read; with it everything comes back as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.building import kind_of
from circuitbench.dictionaries.formats import common
from circuitbench.errors import BadInput

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"  # beside the checkpoints that SAELens writes while it trains

# SAELens takes a file that names none for one of before 6.0, and drops what it does not know of the metadata.
LAYOUT = "6.54.12"

_READ = {name: name for name in ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit")}
_AS = _READ | dict.fromkeys(("batchtopk", "matryoshka"), "jumprelu")
_TRANSCODERS = {
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
_TOP_K = ("topk", "abstopk")
_PURSUIT = "matching_pursuit"
# What stands in its configuration under the name that the kind's setting has with us.
_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_TOP_K, ("k",)),
    _PURSUIT: ("max_iterations", "residual_threshold", "stop_on_duplicate_support"),
}
OURS = "circuitbench_"  # before the kind, where SAELens has no architecture that does the same


def architecture(kind: str, transcodes: bool, skip: bool) -> str:
    """What SAELens calls a dictionary; a name of ours where it has none that does the same."""
    name = _AS.get(kind)
    if not transcodes:
        return name or OURS + kind
    for theirs, form in _TRANSCODERS.items():
        if form == (name, skip):
            return theirs
    return f"{OURS}{kind}_{'skip_' if skip else ''}transcoder"


def config_of(dictionary: Dictionary, fingerprint: str) -> dict[str, Any]:
    """What `cfg.json` says of a dictionary.

    Args:
        fingerprint: of the weights it belongs to.

    Raises:
        BadInput: if its metadata cannot be written as JSON.
    """
    name = architecture(dictionary.kind, dictionary.transcodes, dictionary.W_skip is not None)
    sizes = {"d_in": dictionary.d_in, "d_sae": dictionary.d_dict}
    if dictionary.transcodes:
        sizes["d_out"] = dictionary.d_out
    options = {key: dictionary.settings[key] for key in _OPTIONS.get(name, ())}
    if name in _TOP_K:
        options["rescale_acts_by_decoder_norm"] = False
    theirs = dict(dictionary.metadata.get("saelens", {}))
    site = dictionary.site or (" + ".join(dictionary.blocks) or None)
    hooks = {"hook_name": theirs.get("hook_name") or site}
    if dictionary.transcodes:
        hooks["hook_name_out"] = theirs.get("hook_name_out") or dictionary.site_out
    ours = {
        "kind": dictionary.kind,
        "settings": dictionary.settings,
        "skip": dictionary.W_skip is not None,
        "blocks": dictionary.blocks,
        "site": dictionary.site,
        "site_out": dictionary.site_out,
        "weights": fingerprint,
        "metadata": {key: value for key, value in dictionary.metadata.items() if key != "saelens"},
    }
    config = {
        "architecture": name,
        **sizes,
        **options,
        "dtype": str(dictionary.b_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": not dictionary.transcodes,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_training_version": None, **theirs, **hooks, "model_name": dictionary.model_name}
        | {"sae_lens_version": LAYOUT, "circuitbench": ours},
    }
    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise BadInput(f"metadata of a dictionary is saved as JSON, and this is not: {error}.") from error
    return config


def read(folder: Path) -> Dictionary:
    """The dictionary in a folder of this layout. Raises BadInput as `load_dictionary`."""
    path = folder / CONFIG
    config = _modern(common.read_json(path), path)
    record = config["metadata"].get("circuitbench")
    form = _form(config, path) if record is None else _recorded(config, record, path)
    dtype = common.dtype_of(config, path)
    d_in, d_dict = common.integer(config, "d_in", path), common.integer(config, "d_sae", path)
    d_out = common.integer(config, "d_out", path) if form["transcodes"] else None

    tensors, beside = common.read_safetensors(folder / WEIGHTS)
    if record is not None and beside.get("circuitbench", record.get("weights")) != record.get("weights"):
        raise BadInput(f"{folder} holds the {CONFIG} of one dictionary and the weights of another; save it again.")
    arguments = {"d_in": d_in, "d_dict": d_dict, "d_out": d_out, **form["settings"]}
    dictionary = common.assemble(
        form["kind"],
        tensors,
        dtype=dtype,
        path=folder / WEIGHTS,
        fold=lambda found: _fold(found, config, folder),
        skip=form["skip"],
        blocks=form["blocks"],
        **arguments,
    )
    theirs = {key: value for key, value in config["metadata"].items() if key != "circuitbench"}
    dictionary.model_name = theirs.pop("model_name", None)
    if record is None:
        dictionary.site = theirs.pop("site", None)
        dictionary.metadata = {"saelens": theirs}
        return dictionary
    dictionary.site, dictionary.site_out = record.get("site"), record.get("site_out")
    dictionary.metadata = dict(record.get("metadata") or {})
    written = {"sae_lens_version", "sae_lens_training_version"}
    addresses = {"hook_name": dictionary.site, "hook_name_out": dictionary.site_out}
    if dictionary.blocks:
        addresses["hook_name"] = " + ".join(dictionary.blocks)
    theirs = {key: value for key, value in theirs.items() if key not in written and addresses.get(key, ...) != value}
    if theirs:
        dictionary.metadata["saelens"] = theirs
    return dictionary


def _form(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Kind and settings of a file that SAELens wrote."""
    name = config["architecture"]
    plain = {"transcodes": False, "skip": False, "blocks": None, "settings": {}}
    if name in _READ:
        settings = {"k": common.integer(config, "k", path)} if name in _TOP_K else {}
        settings = _pursuit(config, path) if name == _PURSUIT else settings
        return plain | {"kind": _READ[name], "settings": settings}
    if name in _TRANSCODERS:
        kind, skip = _TRANSCODERS[name]
        return plain | {"kind": kind, "transcodes": True, "skip": skip}
    if name == "temporal":
        raise BadInput(
            f"{path} says architecture 'temporal': its code of a token depends on the tokens before it, and a "
            "dictionary encodes rows, each by itself; run it with SAELens."
        )
    hint = " (that of a run in progress: save it with save_inference_model)" if str(name).endswith("batchtopk") else ""
    known = ", ".join(map(repr, sorted({*_READ, *_TRANSCODERS})))
    raise BadInput(f"{path} says architecture {name!r}{hint}; of SAELens' architectures these can be read: {known}.")


def _pursuit(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Where a matching pursuit stops; what is left out as SAELens takes it."""
    found = kind_of(_PURSUIT).default_settings(0) | {key: config[key] for key in _OPTIONS[_PURSUIT] if key in config}
    rounds, threshold = found["max_iterations"], found["residual_threshold"]
    if rounds is not None:
        common.integer(config, "max_iterations", path)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise BadInput(f"{path} says residual_threshold = {threshold!r}; it must be a number.")
    if config.get("normalize_activations") == "expected_average_only_in":
        found["residual_threshold"] = threshold / _scaling_factor(path.parent)
    return found


def _recorded(config: Mapping[str, Any], record: Any, path: Path) -> dict[str, Any]:
    """Kind and settings of a file that we wrote, which must be what its architecture says."""
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise BadInput(f"{path} has a metadata.circuitbench that is none of ours: {record!r:.80}.")
    kind, skip = str(record.get("kind")), bool(record.get("skip"))
    cls = kind_of(kind)
    name = config["architecture"]
    transcodes = name.endswith("transcoder")
    if architecture(kind, transcodes, skip) != name:
        raise BadInput(
            f"{path} says architecture {name!r}, and records kind {kind!r}, which is saved as "
            f"{architecture(kind, transcodes, skip)!r}; one of them was changed."
        )
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in record["settings"].items()}
    if set(settings) != set(cls.settings_names):
        raise BadInput(
            f"{path} does not describe a {kind!r} dictionary: it has the settings {', '.join(settings) or 'none'}, "
            f"and must have {', '.join(cls.settings_names) or 'none'}."
        )
    for key in _OPTIONS.get(name, ()):
        if config.get(key) != settings[key]:
            raise BadInput(
                f"{path} says {key} = {config.get(key)!r}, and records {settings[key]!r}; one of them was changed."
            )
    form = {"transcodes": transcodes, "skip": skip, "blocks": record.get("blocks") or None}
    return form | {"kind": kind, "settings": settings}


def _modern(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A configuration as SAELens writes it since 6.0, with what changes the meaning of weights looked at."""
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise BadInput(f"{path} has metadata that are no object: {metadata!r:.80}.")
    config = config | {"metadata": metadata}
    if "sae_lens_version" not in metadata:  # of before 6.0
        config = _of_before_6(config)
    if not isinstance(config.get("architecture"), str):
        raise BadInput(f"{path} says architecture {config.get('architecture')!r}; give the folder of a dictionary.")
    for option, known in (
        ("activation_fn", ("relu", "topk")),
        ("finetuning_scaling_factor", (False, None)),
        ("normalize_activations", ("none", "expected_average_only_in")),
        ("reshape_activations", ("none", "hook_z")),  # heads side by side in one row or in an axis of their own
    ):
        if option in config and config[option] not in known:
            raise BadInput(
                f"{path} asks for {option}={config[option]!r}, which depends on each input and cannot be brought "
                f"into the weights; read are {', '.join(map(repr, known))}."
            )
    return config


def _of_before_6(config: dict[str, Any]) -> dict[str, Any]:
    renamed = {"activation_fn_str": "activation_fn", "hook_point": "hook_name"}
    config = {renamed.get(key, key): value for key, value in config.items()}
    config.setdefault("architecture", "standard")
    if config.get("activation_fn") == "topk":
        config["architecture"] = "topk"
        config["k"] = (config.get("activation_fn_kwargs") or {}).get("k", config.get("k"))
    if config.get("normalize_activations") in (False, None):
        config["normalize_activations"] = "none"
    elif config["normalize_activations"] is True:
        config["normalize_activations"] = "expected_average_only_in"
    told = {name: config[name] for name in ("hook_name", "model_name", "prepend_bos", "context_size") if name in config}
    return config | {"metadata": told | config["metadata"]}


def _fold(tensors: dict[str, Tensor], config: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """SAELens' options brought into the weights: the same activations, the same reconstruction."""
    tensors = dict(tensors)
    if config["architecture"] == _PURSUIT:  # tied: directions keep their length, and b_dec goes in and out or neither
        if config.get("normalize_activations") == "expected_average_only_in":
            tensors["b_dec"] = tensors["b_dec"] / _scaling_factor(folder)
        return tensors | ({} if config.get("apply_b_dec_to_input", True) else {"b_dec": 0 * tensors["b_dec"]})
    if config.get("normalize_activations") == "expected_average_only_in":
        scale = _scaling_factor(folder)
        tensors["W_enc"] = tensors["W_enc"] * scale
        tensors["W_dec"] = tensors["W_dec"] / scale
        tensors["b_dec"] = tensors["b_dec"] / scale
    if config["architecture"] in _TOP_K and config.get("rescale_acts_by_decoder_norm", False):
        norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-8)
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    transcodes = config["architecture"].endswith("transcoder")
    subtracts = config.get("apply_b_dec_to_input", True)
    if transcodes and subtracts:
        raise BadInput(
            f"{folder / CONFIG} asks for apply_b_dec_to_input=True of a transcoder, which subtracts nothing."
        )
    if not transcodes and not subtracts:
        shift = tensors["b_dec"] @ tensors["W_enc"]
        for bias in ("b_enc", "b_gate"):
            if bias in tensors:
                tensors[bias] = tensors[bias] + shift
        if "b_mag" in tensors:
            tensors["b_mag"] = tensors["b_mag"] + shift * tensors["r_mag"].exp()
    return tensors


def _scaling_factor(folder: Path) -> float:
    path = folder / SCALER
    if not path.is_file():
        raise BadInput(
            f"{folder / CONFIG} asks for normalize_activations='expected_average_only_in' without saying by which "
            f"factor ({SCALER} is missing); SAELens folds it into the weights when training ends: take that file."
        )
    scale = common.read_json(path).get("scaling_factor")
    if not isinstance(scale, int | float) or not scale > 0 or scale == torch.inf:
        raise BadInput(f"{path} says scaling_factor = {scale!r}; it must be a number above 0.")
    return scale
