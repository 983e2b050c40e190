"""The authors' checkpoints: one ``.pth`` file, a state dict by the names of their code, without a configuration."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput, UnsupportedModel
from .configuration import RWKV7Config
from .modeling import RWKV7ForCausalLM

WHOLE = {
    "emb": "model.embeddings",
    "blocks.0.ln0": "model.layers.0.pre_norm",
    "ln_out": "model.norm",
    "head": "lm_head",
}
BLOCK = {
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
    "att.ln_x": "attn.g_norm",
    "ffn.key": "ffn.key",
    "ffn.value": "ffn.value",
}
LOW_RANK = re.compile(r"att\.([wavg])([012])")  # rank-reducing (d, rank), rank-raising (rank, d), and 0 the bias
IGNORED = re.compile(r"blocks\.0\.att\.v[012]")  # the first layer has nothing to mix its values with
NORMED_HEADS = 64  # their norm of heads has an epsilon of 64e-5, which is head_dim * norm_eps for this size


def load(path: str, dtype: torch.dtype, remote: bool = False) -> RWKV7ForCausalLM:
    """A checkpoint as a Hugging Face model.

    Args:
        path: The file.
        dtype: Of the weights.
        remote: Leave the weights on the meta device.

    Raises:
        BadInput: If there is no such file, or it holds no weights.
        UnsupportedModel: If they are not an RWKV-7's.
    """
    state = read(path)
    config = config_of(state, path)
    if remote:
        with torch.device("meta"):
            hf: Any = RWKV7ForCausalLM(config)
        hf.to(dtype)
    else:
        renamed = {name: value.to(dtype) for name, value in converted(state, path).items()}
        with torch.device("meta"):
            hf = RWKV7ForCausalLM(config)
        expected = {name: parameter.shape for name, parameter in hf.named_parameters()}
        wrong = sorted(set(expected) ^ set(renamed)) or [
            name for name, value in renamed.items() if value.shape != expected[name]
        ]
        if wrong:
            raise UnsupportedModel(
                f"The weights in {path!r} do not fit an RWKV-7 of their sizes: {', '.join(wrong[:5])}"
                f"{' …' if len(wrong) > 5 else ''} (by flash-linear-attention's names)."
            )
        hf.load_state_dict(renamed, assign=True)
    hf.name_or_path = path
    return hf


def read(path: str) -> dict[str, Tensor]:
    """The state dict; only tensors are unpacked."""
    if not Path(path).is_file():
        raise BadInput(f"There is no file {path!r}; give the path of an RWKV-7 checkpoint.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise BadInput(f"{path!r} is no file of weights that torch can read ({type(error).__name__}).") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(f"{path!r} holds no state dict; give a checkpoint as the authors publish it.")
    return state


def config_of(state: dict[str, Tensor], path: str) -> RWKV7Config:
    """The configuration, from names and shapes.

    Raises:
        UnsupportedModel: If they are not an RWKV-7's.
    """
    needed = ["emb.weight", "head.weight", "blocks.0.att.r_k", "blocks.0.ffn.key.weight"]
    needed += [f"blocks.0.att.{name}1" for name in "wag"]
    lacking = [name for name in needed if name not in state]
    if lacking:
        raise UnsupportedModel(
            f"The weights in {path!r} are not an RWKV-7's: there is no {lacking[0]}. Give a checkpoint of version 7 "
            "(x070)."
        )
    heads, head_dim = state["blocks.0.att.r_k"].shape
    if head_dim != NORMED_HEADS:
        raise UnsupportedModel(f"The heads in {path!r} have {head_dim} channels; the authors' have {NORMED_HEADS}.")
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    vocab_size, hidden_size = state["emb.weight"].shape
    ranks = {name: state[f"blocks.0.att.{name}1"].shape[1] for name in "wag"}
    later = state.get("blocks.1.att.v1")
    return RWKV7Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        head_dim=head_dim,
        num_heads=heads,
        intermediate_size=state["blocks.0.ffn.key.weight"].shape[0],
        decay_low_rank_dim=ranks["w"],
        a_low_rank_dim=ranks["a"],
        gate_low_rank_dim=ranks["g"],
        v_low_rank_dim=16 if later is None else later.shape[1],
        norm_first="blocks.0.ln0.weight" in state,
        bos_token_id=0,
        eos_token_id=0,  # end of text, in the authors' vocabulary
    )


def converted(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The state dict by our names and in our shapes.

    Raises:
        UnsupportedModel: For a name that is not an RWKV-7's.
    """
    found = {}
    for name, value in state.items():
        if IGNORED.fullmatch(name):
            continue
        stem, _, kind = name.rpartition(".")
        if stem in WHOLE:
            found[f"{WHOLE[stem]}.{kind}"] = value
            continue
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        ours = None if block is None else in_block(block[2], value)
        if block is None or ours is None:
            raise UnsupportedModel(
                f"The weights in {path!r} hold {name}, which RWKV-7 does not have; variants of it cannot be loaded."
            )
        found[f"model.layers.{block[1]}.{ours[0]}"] = ours[1]
    return found


def in_block(name: str, value: Tensor) -> tuple[str, Tensor] | None:
    """A parameter of one layer, or ``None`` if there is no such."""
    low_rank = LOW_RANK.fullmatch(name)
    if low_rank is not None:
        place = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}[low_rank[2]]
        return f"attn.{low_rank[1]}_lora.{place}", value.flatten() if low_rank[2] == "0" else value.mT.contiguous()
    if re.fullmatch(r"att\.x_[rwkvag]", name):
        return f"attn.{name[4:]}", value.reshape(1, 1, -1)
    if name in ("att.k_k", "att.k_a"):
        return f"attn.{name[4:]}", value.flatten()
    if name == "att.r_k":
        return "attn.r_k", value
    if name == "ffn.x_k":
        return name, value.flatten()
    stem, _, kind = name.rpartition(".")
    return (f"{BLOCK[stem]}.{kind}", value) if stem in BLOCK else None
