"""Sparse decompositions of a site: building, training, judging, saving and reading them."""

from __future__ import annotations

from circuitbench.dictionaries import evaluation, features, losses
from circuitbench.dictionaries.base import Dictionary, build, from_weights
from circuitbench.dictionaries.files import load_dictionary
from circuitbench.dictionaries.sparse import SparseCode
from circuitbench.dictionaries.topk import TopK
from circuitbench.dictionaries.training import TrainResult, train

__all__ = [
    "Dictionary",
    "SparseCode",
    "TopK",
    "TrainResult",
    "build",
    "evaluation",
    "features",
    "from_weights",
    "load_dictionary",
    "losses",
    "train",
]
