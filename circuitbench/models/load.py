"""`load_model`: from a name, a folder or a module to a `Model`."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from nnsight import TransformersModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..architectures import ARCHITECTURES, Architecture, architecture_of, families_like, language_model_type
from ..architectures.base import find_module
from ..errors import BadInput, UnsupportedModel, VersionMismatch
from . import guards, kernels, raw_checkpoints, remote, zoo
from . import hymba as _hymba  # noqa: F401 (makes itself known to transformers' Auto classes)
from . import rwkv7 as _rwkv7  # noqa: F401 (as above)
from .binding import Binder
from .id_tokenizer import id_tokenizer
from .model import Model
from .random import random_model
from .rwkv7 import RwkvTokenizer, pth

# The maps name operations inside transformers' code; these are the versions they were checked on.
TRANSFORMERS = ((5, 22), (5, 24))
NNSIGHT = ((0, 8), (0, 9))


def check_versions() -> None:
    """Refuse versions of transformers and nnsight that the maps were not made for.

    Raises:
        VersionMismatch: Naming the version and what to install.
    """
    for name, installed, (low, high) in (
        ("transformers", transformers.__version__, TRANSFORMERS),
        ("nnsight", version("nnsight"), NNSIGHT),
    ):
        numbers = tuple(int(part) for part in installed.split(".")[:2])
        if not low <= numbers < high:
            wanted = f"{name}>={low[0]}.{low[1]},<{high[0]}.{high[1]}"
            raise VersionMismatch(
                f"{name} {installed} is installed, but the architecture maps are made for {wanted}; "
                f"install it with: pip install '{wanted}'"
            )


def load_model(
    source: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    remote: bool = False,
) -> Model:
    """Load a language model and name every tensor inside it.

    Args:
        source: A Hub id (``"state-spaces/mamba2-130m-hf"``, raw ``"state-spaces/mamba2-130m"`` too), a folder, a
            ``PreTrainedModel`` you hold, ``"random:<model_type>"`` (tiny random weights), or ``"zoo:<name>"``
            (shipped).
        tokenizer: A tokenizer, or where to load one; default: the model's own.
        device: Where to put the weights; default: where they are loaded (CPU).
        dtype: Floating-point type of the weights, ``torch.bfloat16`` or ``"bfloat16"``; default: float32.
        revision: Branch, tag or commit on the Hub.
        remote: Leave the weights on the meta device; every trace then needs ``remote=True`` (or a server's address).

    Returns:
        The model, in eval mode, its attention set to ``eager`` so that ``attn.pattern`` can be read. Both are done to
        the ``PreTrainedModel`` you hold, too, and its forward refuses what transformers would compute wrongly without a
        word (see `guards`).

    Raises:
        UnsupportedModel: If there is no map for the family, or the checkpoint cannot be represented.
        BadInput: If the source cannot be found.
        VersionMismatch: If transformers or nnsight is a version the maps were not made for.
        KernelMismatch: If installed kernels cannot run where the model is.
    """
    hf, tokenizer = prepared(source, tokenizer, device, dtype, revision, remote)
    kernels.fit(hf)
    guards.put_on(hf)
    return bind(nnsight_model(hf, tokenizer, revision), architecture_of(hf.config))


def prepared(
    source: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    remote: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The Hugging Face module, where and as it is wanted, and its tokenizer; arguments as in `load_model`."""
    check_versions()
    dtype = as_dtype(dtype)
    if isinstance(source, PreTrainedModel):
        hf = source
        check_whole(hf)
        hf.set_attn_implementation("eager")
    elif isinstance(source, (str, os.PathLike)):
        hf, tokenizer = from_name(os.fspath(source), tokenizer, dtype, revision, remote)
    else:
        raise BadInput(f"load_model takes a Hub id, a folder or a PreTrainedModel, not {type(source).__name__}.")
    hf: Any = hf
    if device is not None and not remote:
        hf = moved(hf, device)
    if isinstance(source, PreTrainedModel) and dtype is not None:
        hf = hf.to(dtype)
    if hf.dtype == torch.float64 and getattr(hf.config, "_experts_implementation", None) is not None:
        hf.set_experts_implementation("eager")  # transformers' grouped product of experts has no double precision
    kernels.allow_gradients(hf)
    kernels.run_whole(hf)
    return hf.eval(), tokenizer_of(tokenizer)


def check_whole(hf: PreTrainedModel) -> None:
    """Refuse a module that a map does not fit: another family, or one without its unembedding.

    Raises:
        UnsupportedModel: Saying which.
    """
    architecture = architecture_of(hf.config)
    for path in (architecture.layers, architecture.unembed):
        if find_module(hf, path) is None:
            raise UnsupportedModel(
                f"{type(hf).__name__} has no {path!r}, which the map for {architecture.model_type!r} names; load the "
                "family's whole language model (its ...ForCausalLM class)."
            )


def moved(hf: Any, device: str | torch.device) -> Any:
    """The module on a device.

    Raises:
        BadInput: If there is no such device here.
    """
    try:
        return hf.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"The model cannot be put on device={device!r}: {str(error).splitlines()[0]}") from error


def tokenizer_of(tokenizer: PreTrainedTokenizerBase | str | None) -> PreTrainedTokenizerBase | None:
    """A tokenizer, or the one of that name.

    Raises:
        BadInput: If there is none of that name, or it is none.
    """
    if isinstance(tokenizer, str) and tokenizer.endswith(".txt"):
        return RwkvTokenizer(tokenizer)
    if isinstance(tokenizer, str):
        try:
            return AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise BadInput(
                f"Could not load a tokenizer from {tokenizer!r} ({type(error).__name__}); give a folder that holds "
                "one, a Hub id while there is a network, or a tokenizer you hold."
            ) from error
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise BadInput(
            f"tokenizer= is a tokenizer of transformers, or where to load one, not {type(tokenizer).__name__}."
        )
    return tokenizer


def nnsight_model(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, revision: str | None = None
) -> TransformersModel:
    """nnsight's model over a Hugging Face module."""
    tokenizer = tokenizer or id_tokenizer(hf.config)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    if hf.device.type == "meta":
        options["device"] = "meta"  # else nnsight's pipeline moves the weights, and there are none
    if not hf.can_generate():
        raise UnsupportedModel(
            f"{type(hf).__name__} cannot generate; its class has to derive from transformers' GenerationMixin as well."
        )
    with warnings.catch_warnings():
        # RWKV's attention has a module that is called output; views know where nnsight puts it.
        warnings.filterwarnings("ignore", message=".*has a submodule named 'output'.*")
        return TransformersModel(hf, tokenizer=tokenizer, task="text-generation", **options)


def bind(nn: TransformersModel, architecture: Architecture) -> Model:
    """A `Model` over nnsight's model."""
    remote.attach(nn)
    binder = Binder(nn, architecture)
    layers = binder.layers()
    roots = {}
    for name in ("embed", "logits"):
        site = getattr(architecture, name)
        at = site.at.format(layers=architecture.layers)
        roots[name] = binder.root(name, at, site)
    shapes = {name: binder.shape(getattr(architecture, name), binder.hf, None, None) for name in roots}
    return Model(nn, layers, roots, shapes, architecture.model_type, binder.meta_tokens)


def from_name(
    name: str,
    tokenizer: PreTrainedTokenizerBase | str | None,
    dtype: torch.dtype | None,
    revision: str | None,
    remote: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | str | None]:
    """The Hugging Face module and tokenizer for a name."""
    scheme, _, rest = name.partition(":")
    if scheme == "random":
        family = language_model_type(rest)
        if family not in ARCHITECTURES:
            raise UnsupportedModel(
                f"random:{rest} is not a family there is a map for; there are {families_like(rest)}."
            )
        return random_model(ARCHITECTURES[family], dtype=dtype or torch.float32), tokenizer
    if scheme == "zoo":
        return zoo_model(rest, tokenizer, dtype)
    if name.endswith(".pth"):
        return pth.load(name, dtype or torch.float32, remote), tokenizer
    try:
        if raw_checkpoints.is_raw(name, revision):
            return raw_checkpoints.load(name, revision, dtype or torch.float32, remote), tokenizer or own_tokenizer(
                name
            )
        config = read_config(name, revision)
        architecture_of(config)
        settings: dict[str, Any] = {"dtype": dtype or torch.float32, "attn_implementation": "eager"}
        if remote:
            with torch.device("meta"):
                hf = AutoModelForCausalLM.from_config(config, **settings)
            hf.name_or_path = name
        else:
            hf = from_folder(name, revision, settings)
    except (OSError, HFValidationError) as error:
        raise BadInput(
            f"Could not load {name!r}: it is no local folder, and the Hub did not provide it "
            f"({type(error).__name__}). Give a folder that holds config.json, a Hub id while there is a network, "
            f'"zoo:<name>" ({", ".join(zoo.names())}), or "random:<model_type>".'
        ) from error
    return hf, tokenizer or own_tokenizer(name, revision)


def from_folder(name: str, revision: str | None, settings: dict[str, Any]) -> PreTrainedModel:
    """transformers' model with the weights of a folder or of a Hub repository.

    Raises:
        UnsupportedModel: If some of its weights are not there; transformers would make them up.
    """
    found: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, output_loading_info=True, **settings)
    hf, report = found
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        instead = f", but {unexpected[0]}" if unexpected else ""
        raise UnsupportedModel(
            f"{name!r} lacks {len(missing)} of the weights that a {type(hf).__name__} of its config.json has, which "
            f"would then be random: {missing[0]}{' …' if len(missing) > 1 else ''} is not there{instead}."
        )
    return hf


def read_config(name: str, revision: str | None) -> PretrainedConfig:
    """transformers' configuration of a checkpoint.

    Raises:
        BadInput: If there is no configuration that it knows.
    """
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except ValueError as error:
        raise BadInput(
            f"{name!r} has no config.json of a model that transformers {transformers.__version__} knows; give what "
            "save_pretrained has written."
        ) from error


def own_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model, or ``None`` for a folder without one."""
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return AutoTokenizer.from_pretrained(name, revision=revision)


def zoo_model(
    name: str, tokenizer: PreTrainedTokenizerBase | str | None, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | str | None]:
    """A model that ships with the package; stored in half precision, computed in float32."""
    folder = os.fspath(zoo.path(name))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32, attn_implementation="eager")
    return hf, tokenizer or own_tokenizer(folder)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from its name."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise BadInput(
                f'dtype={dtype!r} is no floating-point type; type "float32", "bfloat16", "float16" or "float64".'
            )
        return found
    return dtype
