"""What each model of the zoo is made of and how it is trained, as data."""

from __future__ import annotations

import dataclasses

import torch
from transformers import BambaConfig, FalconH1Config, Mamba2Config, PreTrainedConfig, PreTrainedTokenizerFast

from circuitbench.models.zoo import tasks

SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


@dataclasses.dataclass(frozen=True)
class LanguageRecipe:
    """A language model of the standard library's text: Muon on matrices, AdamW on the rest, bfloat16 autocast."""

    family: str
    steps: int
    layers: int
    attention_layers: tuple[int, ...] = ()
    d_model: int = 192
    state: int = 64
    head_dim: int = 64
    chunk: int = 32
    vocabulary: int = 2048
    batch: int = 16
    micro_batch: int = 8  # sequences in one forward pass: what fits a core's cache is fastest
    lr: float = 4e-3
    weight_decay: float = 0.1
    warmup: int = 50
    decay: float = 0.5  # share of the steps, at the end, over which the learning rate falls to nothing
    seed: int = 0

    def config(self) -> PreTrainedConfig:
        d, heads = self.d_model, 2 * self.d_model // self.head_dim
        common = {"vocab_size": self.vocabulary, "hidden_size": d, "num_hidden_layers": self.layers, **SPECIAL}
        common |= {"initializer_range": 0.02, "tie_word_embeddings": True}
        if self.family == "mamba2":
            ssm = {"num_heads": heads, "head_dim": self.head_dim, "state_size": self.state, "n_groups": 1}
            return Mamba2Config(**common, **ssm, chunk_size=self.chunk)
        ssm = {"mamba_n_heads": heads, "mamba_d_head": self.head_dim, "mamba_d_state": self.state}
        attention = {"num_attention_heads": d // 32, "num_key_value_heads": d // 32}
        attention |= {"attn_layer_indices": list(self.attention_layers), "max_position_embeddings": 2048}
        mlp = {"intermediate_size": 8 * d // 3 // 32 * 32}
        return BambaConfig(**common, **ssm, **attention, **mlp, mamba_chunk_size=self.chunk)


@dataclasses.dataclass(frozen=True)
class TaskRecipe:
    """A two-layer model of a synthetic task: AdamW, at a learning rate that falls to nothing."""

    family: str
    task: str
    steps: int
    d_model: int = 64
    layers: int = 2
    state: int = 32
    head_dim: int = 32
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 50
    decay: float = 0.5  # share of the steps, at the end, over which the learning rate falls to nothing
    seed: int = 0

    def config(self) -> PreTrainedConfig:
        d, heads = self.d_model, 2 * self.d_model // self.head_dim
        common = {"vocab_size": len(self.tokenizer()), "hidden_size": d, "num_hidden_layers": self.layers, **SPECIAL}
        common |= {"tie_word_embeddings": False}
        if self.family == "mamba2":
            ssm = {"num_heads": heads, "head_dim": self.head_dim, "state_size": self.state, "n_groups": 1}
            return Mamba2Config(**common, **ssm, chunk_size=32)
        common |= {"intermediate_size": 2 * d, "num_attention_heads": 4, "num_key_value_heads": 4}
        common |= {"max_position_embeddings": 2048}
        ssm = {"mamba_n_heads": heads, "mamba_d_head": self.head_dim, "mamba_d_state": self.state}
        ssm |= {"mamba_n_groups": 1, "mamba_chunk_size": 32}
        if self.family == "bamba":
            return BambaConfig(**common, **ssm, attn_layer_indices=[1])
        return FalconH1Config(**common, **ssm, head_dim=d // 4, mamba_d_ssm=2 * d)

    def sample(self, n: int, seed: int | torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(tasks, self.task)(n, seed)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return getattr(tasks, f"{self.task}_tokenizer")()


@dataclasses.dataclass(frozen=True)
class CompiledRecipe:
    """A model whose weights are set by code: the arguments of `compiled.mqar`."""

    keys: int = 16
    values: int = 16
    heads: int = 8
    layers: int = 2
    layer: int = 1
    head: int = 3
    noise: float = 1.0
    seed: int = 0


RECIPES = {
    "mqar-compiled": CompiledRecipe(),
    "mqar-mamba2": TaskRecipe("mamba2", "mqar", steps=1000),
    "mqar-bamba": TaskRecipe("bamba", "mqar", steps=2500, decay=0.25),
    "induction-falcon-h1": TaskRecipe("falcon_h1", "induction", steps=1000),
    "pylm-hybrid": LanguageRecipe("bamba", steps=1300, layers=4, attention_layers=(1, 3)),
    "pylm-mamba2": LanguageRecipe("mamba2", steps=1400, layers=5),
}
