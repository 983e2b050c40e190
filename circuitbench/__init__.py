"""circuitbench: mechanistic interpretability of state-space, recurrent and hybrid language models."""

import nnsight

# Code that travels to a remote server goes by value: nothing of ours has to exist there.
nnsight.register("circuitbench")

from .architectures import Architecture, Part, Site  # noqa: E402
from .architectures import register as register_architecture  # noqa: E402
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
from .models import Model, load_model  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "BadInput",
    "CheckFailed",
    "CircuitbenchError",
    "KernelMismatch",
    "Model",
    "Part",
    "ReadOnlySite",
    "RemoteError",
    "Site",
    "SiteNotFound",
    "UnsupportedModel",
    "VersionMismatch",
    "load_model",
    "register_architecture",
]
