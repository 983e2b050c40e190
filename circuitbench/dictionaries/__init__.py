"""Sparse decompositions of a site: building, training, judging, saving and reading them."""

from __future__ import annotations

from circuitbench.dictionaries import evaluation, loggers, losses, probing, synthetic
from circuitbench.dictionaries.abstopk import AbsTopK
from circuitbench.dictionaries.base import KINDS, Dictionary
from circuitbench.dictionaries.batchtopk import BatchTopK
from circuitbench.dictionaries.branches import Branches, separate_branches
from circuitbench.dictionaries.building import build, from_weights
from circuitbench.dictionaries.correlations import Mppc, mppc, mppc_on_text
from circuitbench.dictionaries.end_to_end import train_end_to_end
from circuitbench.dictionaries.files import load_dictionary
from circuitbench.dictionaries.gated import Gated
from circuitbench.dictionaries.hub import from_hub, push_to_hub
from circuitbench.dictionaries.judging import Evaluation, evaluate
from circuitbench.dictionaries.jumprelu import JumpReLU
from circuitbench.dictionaries.many import grid
from circuitbench.dictionaries.matching import mmcs
from circuitbench.dictionaries.matching_pursuit import MatchingPursuit
from circuitbench.dictionaries.matrix_atoms import Rank1
from circuitbench.dictionaries.matryoshka import Matryoshka
from circuitbench.dictionaries.model_card import card
from circuitbench.dictionaries.on_model import train_many_on_text, train_on_text, train_sae
from circuitbench.dictionaries.on_sites import train_crosscoder, train_transcoder
from circuitbench.dictionaries.shelf import Pretrained, pretrained
from circuitbench.dictionaries.sparse import SparseCode
from circuitbench.dictionaries.splice_run import Spliced, splice
from circuitbench.dictionaries.standard import Standard
from circuitbench.dictionaries.states import state_rows, train_state_sae
from circuitbench.dictionaries.substitution import Substitution, substitution
from circuitbench.dictionaries.topk import TopK
from circuitbench.dictionaries.training import TrainResult, train, train_many

__all__ = [
    "KINDS",
    "AbsTopK",
    "BatchTopK",
    "Branches",
    "Dictionary",
    "Evaluation",
    "Gated",
    "JumpReLU",
    "MatchingPursuit",
    "Matryoshka",
    "Mppc",
    "Pretrained",
    "Rank1",
    "SparseCode",
    "Spliced",
    "Standard",
    "Substitution",
    "TopK",
    "TrainResult",
    "build",
    "card",
    "evaluate",
    "evaluation",
    "from_hub",
    "from_weights",
    "grid",
    "load_dictionary",
    "loggers",
    "losses",
    "mmcs",
    "mppc",
    "mppc_on_text",
    "pretrained",
    "probing",
    "push_to_hub",
    "separate_branches",
    "splice",
    "state_rows",
    "substitution",
    "synthetic",
    "train",
    "train_crosscoder",
    "train_end_to_end",
    "train_many",
    "train_many_on_text",
    "train_on_text",
    "train_sae",
    "train_state_sae",
    "train_transcoder",
]
