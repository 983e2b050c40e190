"""dictionary_learning: `config.json` and `ae.pt`, a state dict of `torch.save`, which is read without unpickling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.formats import common, torch_zip
from circuitbench.errors import BadInput

CONFIG = "config.json"
WEIGHTS = "ae.pt"

_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}  # nn.Linear: transposed
_OWN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED = {"gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag", "decoder_bias": "b_dec"}
_FORMS = {  # their class: our kind, and their tensors by our names
    "AutoEncoder": ("standard", _LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": ("standard", _LINEAR | {"decoder.bias": "b_dec"}),
    "GatedAutoEncoder": ("gated", {"encoder.weight": "W_enc", "decoder.weight": "W_dec"} | _GATED),
    "AutoEncoderTopK": ("topk", _LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": ("batchtopk", _LINEAR | {"b_dec": "b_dec"}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", _OWN),
    "JumpReluAutoEncoder": ("jumprelu", _OWN | {"threshold": "threshold"}),
}
_NOT_SUBTRACTED = ("AutoEncoderNew", "JumpReluAutoEncoder")  # b_dec is left in what these encode


def read(folder: Path) -> Dictionary:
    """The dictionary in a trainer's folder, in the dtype of the file, its decoder rows as long as they are there.

    Its `metadata["dictionary_learning"]` is the trainer's configuration. Which site it belongs to is not guessed.

    Raises:
        BadInput: as `load_dictionary`; and anything in `ae.pt` but tensors by name.
    """
    path = folder / CONFIG
    trainer = common.read_json(path).get("trainer")
    if not isinstance(trainer, dict):
        raise BadInput(f"{path} describes no trainer; give the folder of one trainer, with its config.json and ae.pt.")
    name = trainer.get("dict_class")
    if name not in _FORMS:
        raise BadInput(
            f"{path} says dict_class {name!r}; of dictionary_learning's these can be read: {', '.join(_FORMS)}."
        )
    kind, names = _FORMS[name]
    found = torch_zip.read(folder / WEIGHTS)
    settings, buffers = _settings(kind, found, trainer, path)

    weights = {key: tensor for key, tensor in found.items() if key not in ("k", "group_sizes", *buffers)}
    if set(weights) != set(names):
        raise BadInput(
            f"{folder / WEIGHTS} holds the tensors {', '.join(sorted(weights)) or 'none'}; a {name} has "
            f"{', '.join(sorted(names))}."
        )
    tensors = {ours: _ours(weights[theirs], theirs) for theirs, ours in names.items()}
    if tensors["W_enc"].ndim != 2:
        raise BadInput(f"{folder / WEIGHTS} holds an encoder with {tensors['W_enc'].ndim} axes; it must have two.")
    d_in, d_dict = tensors["W_enc"].shape
    if kind in ("batchtopk", "matryoshka"):
        tensors["threshold"] = _scalar(found, "threshold", folder / WEIGHTS).float().expand(d_dict).clone()
    fold: dict[str, Callable[..., Any]] = {"fold": _with_b_dec} if name in _NOT_SUBTRACTED else {}
    dictionary = common.assemble(
        kind,
        tensors,
        dtype=tensors["W_enc"].dtype if tensors["W_enc"].is_floating_point() else common.DTYPES["float32"],
        path=folder / WEIGHTS,
        d_in=d_in,
        d_dict=d_dict,
        **settings,
        **fold,
    )
    dictionary.model_name = trainer.get("lm_name")
    dictionary.metadata = {"dictionary_learning": trainer}
    return dictionary


def _ours(tensor: Tensor, name: str) -> Tensor:
    return tensor.T if name.endswith(".weight") and tensor.ndim == 2 else tensor


def _scalar(found: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if found[name].numel() != 1:
        raise BadInput(f"{path} holds {name} with shape {tuple(found[name].shape)}; it must be one number.")
    return found[name].flatten()


def _settings(
    kind: str, found: dict[str, Tensor], trainer: dict[str, Any], path: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The kind's settings, and what lies beside the weights."""
    if kind not in ("topk", "batchtopk", "matryoshka"):
        return {}, ()
    k = common.integer(trainer, "k", path)
    if "k" in found and int(_scalar(found, "k", path.with_name(WEIGHTS))) != k:
        raise BadInput(f"{path} says k = {k}, and {WEIGHTS} {int(found['k'])}; one of them was changed.")
    if kind == "topk":  # it keeps a threshold too, and encodes without it unless asked to
        return {"k": k}, ("threshold",)
    if "threshold" not in found:
        raise BadInput(f"{path.with_name(WEIGHTS)} holds no threshold; a {kind!r} dictionary encodes by it.")
    if kind == "batchtopk":
        return {"k": k}, ("threshold",)
    sizes = found.get("group_sizes")
    if sizes is None or sizes.ndim != 1 or sizes.is_floating_point():
        raise BadInput(f"{path.with_name(WEIGHTS)} holds no list of group_sizes, which a matryoshka dictionary has.")
    return {"k": k, "prefixes": tuple(sizes.cumsum(0).tolist())}, ("threshold",)


def _with_b_dec(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What our encoders subtract is added back in their bias: the same pre-activations."""
    return tensors | {"b_enc": tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]}
