"""Refusing what transformers computes wrongly without a word: a look at the arguments of every forward.

Found by running every family token by token, several tokens at a time, and padded on either side, against the whole
sequence. `load_model` puts the guard on the Hugging Face module, so that it also stands in ``model.trace`` and
``generate``; `continue_from` gives the right answer in all of these cases.
"""

from __future__ import annotations

import weakref
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from ..architectures import architecture_of
from ..errors import BadInput
from .caches import blocks_of
from .prompts import UNMASKED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ATTRIBUTE = "circuitbench_guard"
INSTEAD = "use circuitbench.continue_from(model, circuitbench.run_prefix(model, prompt), suffix), which is exact"
# Families whose forward counts positions from 0 again after a cached past, unless it is told them.
FORGETFUL = ("bamba", "minimax")
# Families that multiply their input with the whole mask, also where it counts the cached past.
UNTRIMMED = ("mamba", "falcon_mamba")
# Its code, which is ours, leaves out what the mask hides, wherever it is.
MASKED_ANYWHERE = ("rwkv7",)


def put_on(hf: Any) -> None:
    """Guard a model's forward, once; only families that have something to guard pay for it."""
    if hasattr(hf, ATTRIBUTE):
        return
    guard = Guard(hf)
    if guard.recurrent:
        hf.register_forward_pre_hook(guard, with_kwargs=True)
        setattr(hf, ATTRIBUTE, guard)
    if guard.family in REORDERED:
        hf._reorder_cache = MethodType(REORDERED[guard.family], hf)  # transformers asks a model for it


def reorder_minimax(hf: Any, cache: Any, beams: Tensor) -> Any:
    """The cache for the beams that go on: transformers leaves the states of lightning attention where they are."""
    cache.reorder_cache(beams)
    for index, value in enumerate(cache.linear_cache):
        if isinstance(value, torch.Tensor):
            cache.linear_cache[index] = value.index_select(0, beams.to(value.device))
    return cache


def reorder_recurrent_gemma(hf: Any, cache: Any, beams: Tensor) -> Any:
    """The cache for the beams that go on: transformers leaves the states on the modules where they are."""
    cache.reorder_cache(beams)
    for block in blocks_of(hf).values():
        chosen = beams.to(block.conv1d_state.device)
        block.conv1d_state = block.conv1d_state[chosen]
        block.rg_lru.recurrent_states = block.rg_lru.recurrent_states[chosen]
    return cache


REORDERED = {"minimax": reorder_minimax, "recurrent_gemma": reorder_recurrent_gemma}


class Guard:
    """A forward pre-hook.

    Attributes:
        family: The model's ``model_type``.
        recurrent: Whether a layer keeps a state (or the last inputs of a convolution).
        restarts: Whether a scan starts from zero where several tokens follow a cached state.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        parts = architecture_of(hf.config).parts
        self.family: str = hf.config.model_type
        self.recurrent = any(name not in ("attn", "mlp", "moe") for name in parts)
        scans = [part.scan for part in parts.values() if part.scan is not None]
        self.restarts = any(not scan.continues for scan in scans)
        self.last: Any = None  # RecurrentGemma: a weak reference to the cache of the last forward

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Look at the arguments of a forward.

        Raises:
            BadInput: Saying what would go wrong, and what to type instead.
        """
        ids = args[0] if args else kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, torch.Tensor):
            return
        rows, length = ids.shape[:2]
        cache = kwargs.get("past_key_values", kwargs.get("cache_params", kwargs.get("state")))
        follows = cache is not None and holds(cache)
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        if mask is not None and (length > 1 or self.family in (*UNTRIMMED, "minimax")):
            self.check_mask(module, mask, kwargs.get("use_cache"), length, follows)
        if follows:
            self.check_following(kwargs, cache, rows, length)
        if self.family == "rwkv" and length == 1 and rows > 1 and (follows or caches(module, kwargs)):
            raise BadInput(
                f"One token comes with a cache in each of {rows} prompts, and transformers then mixes the prompts of "
                f"rwkv into each other; run them one by one, or {INSTEAD}."
            )
        if self.family == "recurrent_gemma":
            self.check_modules(module, cache, follows, kwargs)

    def check_mask(self, module: Any, mask: Tensor, use_cache: bool | None, length: int, follows: bool) -> None:
        """Padding that goes through the recurrence, and masks that are laid over other tokens than they mean."""
        if self.family in UNTRIMMED and mask.shape[1] != length and not bool(mask.all()):
            raise BadInput(
                f"attention_mask has padding and {mask.shape[1]} columns for {length} tokens, and transformers takes "
                f"the first column for that of {self.family}'s token; leave it out after a cached state, or {INSTEAD}."
            )
        if self.family == "minimax" and follows and not bool(mask.all()):
            raise BadInput(
                "Tokens follow a cached past with padding in it, and there transformers masks the wrong keys of "
                f"minimax; give it prompts of one length at a time, or {INSTEAD}."
            )
        real = mask[:, -length:].bool()
        if bool(real.all()):
            return
        if self.family in UNMASKED:
            raise BadInput(
                f"attention_mask has padding, and transformers runs the recurrence of {self.family} through it, "
                "whatever the mask says; give it prompts of one length at a time."
            )
        if self.family in MASKED_ANYWHERE or not bool((real[:, :-1] & ~real[:, 1:]).any()):
            return
        caching = getattr(module.config.get_text_config(), "use_cache", False) if use_cache is None else use_cache
        if caching:
            raise BadInput(
                "attention_mask has padding on the right, and the recurrence goes on through it: what is kept after "
                'such a prompt is not its state. Pad on the left (tokenizer.padding_side = "left"), or pass '
                "use_cache=False where nothing but the logits of real tokens is wanted."
            )

    def check_following(self, kwargs: dict[str, Any], cache: Any, rows: int, length: int) -> None:
        """Tokens that follow a cached past."""
        if self.restarts and (length > 1 or recording(cache)):
            what = "the convolution before the scan" if self.family == "recurrent_gemma" else "the scan"
            raise BadInput(
                f"{length} tokens follow a cached state, and transformers starts {what} of {self.family} from zero "
                f"again; give it one token at a time, or {INSTEAD}."
            )
        if self.family in FORGETFUL and kwargs.get("position_ids") is None:
            raise BadInput(
                f"Tokens follow a cached past, and without position_ids transformers counts the positions of "
                f"{self.family} from 0 again; pass position_ids=torch.arange(n, n + {length})[None] for the n tokens "
                f"before them, or {INSTEAD}."
            )

    def check_modules(self, module: Any, cache: Any, follows: bool, kwargs: dict[str, Any]) -> None:
        """RecurrentGemma keeps its state on the modules: that of another run must not be taken for this one's."""
        if follows and (self.last is None or self.last() is not cache):
            raise BadInput(
                "recurrent_gemma keeps its recurrent state on its modules, and another run has been there since this "
                f"cache was filled; run the whole sequence at once, or {INSTEAD}."
            )
        if not follows:
            for block in blocks_of(module).values():
                block.conv1d_state = block.rg_lru.recurrent_states = None
        self.last = None if cache is None else weakref.ref(cache)


def caches(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether RWKV-4 makes a cache, where none is given."""
    asked = kwargs.get("use_cache")
    return module.config.use_cache and not module.training if asked is None else asked


def holds(cache: Any) -> bool:
    """Whether a cache holds a past."""
    if isinstance(cache, (list, tuple)):
        return True
    if any(isinstance(value, torch.Tensor) for value in getattr(cache, "linear_cache", ())):
        return True
    for layer in getattr(cache, "layers", ()):
        states = getattr(layer, "has_previous_state", None)
        if states and any(states.values()):
            return True
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.numel():
            return True
    return False


def recording(cache: Any) -> bool:
    """Whether a cache is being recorded, to be rolled back: transformers then runs single tokens as a sequence."""
    return any(getattr(layer, "record_past", False) for layer in getattr(cache, "layers", ()))
