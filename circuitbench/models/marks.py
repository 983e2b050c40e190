"""Which model a state is of: short digests of the configuration and the weights, and the versions of the packages."""

from __future__ import annotations

import hashlib
import json
import weakref
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .model import Model

NOT_THE_FUNCTION = ("transformers_version", "architectures", "dtype", "use_cache", "max_inference_chunksize")
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MARKS: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def about(model: Model) -> dict[str, str]:
    """What a state has to fit: the model, its weights, the versions of the packages."""
    from .. import __version__  # here, because this package is imported before it has one

    return {
        "model_type": model.hf.config.model_type,
        "config": config_mark(model),
        "weights": weights_mark(model),
        "dtype": str(next(model.hf.parameters()).dtype),
        "circuitbench": __version__,
        "transformers": version("transformers"),
    }


def config_mark(model: Model) -> str:
    """A short digest of the configuration, as far as it says what the model computes."""
    given = model.hf.config.to_dict()
    said = {key: value for key, value in given.items() if key not in NOT_THE_FUNCTION and not key.startswith("_")}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_mark(model: Model) -> str:
    """A short digest of all weights; empty where they are not here.

    Of the bits of every parameter, as integers, their sum and that of every second one: exact, so that threads, device
    and order do not matter. Taken anew when a weight has changed.
    """
    hf: Any = model.hf
    if model.device.type == "meta":
        return ""
    if hf.config.model_type == "rwkv" and hf.rwkv.training == hf.rwkv.layers_are_rescaled:
        hf.rwkv._rescale_layers()  # as its next forward would
    now = [(parameter.data_ptr(), parameter._version) for parameter in hf.parameters()]
    before, mark = _MARKS.get(hf, (None, ""))
    if before != now:
        sums = []
        for parameter in hf.parameters():
            bits = parameter.detach().flatten().view(INTEGERS[parameter.element_size()])
            sums += [bits.sum(dtype=torch.int64), bits[::2].sum(dtype=torch.int64)]
        mark = hashlib.sha256(torch.stack([value.cpu() for value in sums]).numpy().tobytes()).hexdigest()[:16]
        _MARKS[hf] = (now, mark)
    return mark
