"""Sparse decompositions of a site: building, training, judging, saving and reading them."""

from __future__ import annotations

from circuitbench.dictionaries import evaluation, features, losses
from circuitbench.dictionaries.base import KINDS, Dictionary
from circuitbench.dictionaries.batchtopk import BatchTopK
from circuitbench.dictionaries.building import build, from_weights
from circuitbench.dictionaries.files import load_dictionary
from circuitbench.dictionaries.hub import from_hub, push_to_hub
from circuitbench.dictionaries.matrix_atoms import Rank1
from circuitbench.dictionaries.model_card import card
from circuitbench.dictionaries.judging import Evaluation, evaluate, feature_examples
from circuitbench.dictionaries.on_model import train_many_on_text, train_on_text, train_sae
from circuitbench.dictionaries.shelf import Pretrained, pretrained
from circuitbench.dictionaries.sparse import SparseCode
from circuitbench.dictionaries.topk import TopK
from circuitbench.dictionaries.training import TrainResult, train, train_many

__all__ = [
    "KINDS",
    "BatchTopK",
    "Dictionary",
    "Evaluation",
    "Pretrained",
    "Rank1",
    "SparseCode",
    "TopK",
    "TrainResult",
    "build",
    "card",
    "evaluate",
    "evaluation",
    "feature_examples",
    "features",
    "from_hub",
    "from_weights",
    "load_dictionary",
    "losses",
    "pretrained",
    "push_to_hub",
    "train",
    "train_many",
    "train_many_on_text",
    "train_on_text",
    "train_sae",
]
