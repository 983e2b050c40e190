"""circuitbench: mechanistic interpretability of state-space, recurrent and hybrid language models."""

from __future__ import annotations

import nnsight

# Code that travels to a remote server goes by value: nothing of ours has to exist there.
nnsight.register("circuitbench")

from .architectures import Architecture, Part, Site  # noqa: E402
from .architectures import register as register_architecture  # noqa: E402
from .circuits import ablation_effects, logit_diff, patch_effects, prob  # noqa: E402
from .dictionaries import evaluate, load_dictionary, train_sae  # noqa: E402
from .errors import (  # noqa: E402
    BadInput,
    CheckFailed,
    CircuitbenchError,
    KernelMismatch,
    ReadOnlySite,
    RemoteError,
    SiteNotFound,
    UnsupportedModel,
    VersionMismatch,
)
from .explain import feature_examples, load_examples  # noqa: E402
from .models import Model, State, load_model, load_state, run_prefix  # noqa: E402
from .models.remote import resume  # noqa: E402
from .tracing import (  # noqa: E402
    Ablate,
    Activations,
    Add,
    Continued,
    Feature,
    Intervention,
    Knockout,
    Result,
    Scale,
    Set,
    ablate,
    capture,
    check,
    continue_from,
    generate_text,
    hold,
    intervene,
    steer,
)
from .viewer.feature_page import feature_page  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "Activations",
    "Add",
    "Architecture",
    "BadInput",
    "CheckFailed",
    "CircuitbenchError",
    "Continued",
    "Feature",
    "Intervention",
    "KernelMismatch",
    "Knockout",
    "Model",
    "Part",
    "ReadOnlySite",
    "RemoteError",
    "Result",
    "Scale",
    "Set",
    "Site",
    "SiteNotFound",
    "State",
    "UnsupportedModel",
    "VersionMismatch",
    "ablate",
    "ablation_effects",
    "capture",
    "check",
    "continue_from",
    "evaluate",
    "feature_examples",
    "feature_page",
    "generate_text",
    "hold",
    "intervene",
    "load_dictionary",
    "load_examples",
    "load_model",
    "load_state",
    "logit_diff",
    "patch_effects",
    "prob",
    "register_architecture",
    "resume",
    "run_prefix",
    "steer",
    "train_sae",
]
