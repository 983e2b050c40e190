"""The ground every test stands on: no network, fixed seeds, shapes checked at run time."""

from __future__ import annotations

import os

# Read at import by the libraries below.
for name in ("NDIF_API_KEY", "NDIF_HOST", "NNSIGHT_DEBUG"):
    os.environ.pop(name, None)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NNSIGHT_CONFIG": os.devnull,  # the developer's own NDIF settings are not the tests'
    "TOKENIZERS_PARALLELISM": "false",
}

import random

import numpy as np
import pytest
import torch
from nnsight.schema.config import CONFIG

from tests import typechecking

pytest_plugins = ["tests.ndif.plugin"]

CONFIG.APP.DEBUG = False  # `pytest -v` has turned it on: nnsight reads "-v" in sys.argv as its own
CONFIG.APP.REMOTE_LOGGING = False
torch.set_num_threads(1)  # these models are small: a second thread makes them slower
typechecking.fit_to_nnsight()


# Families that are read and edited by the very adapters of another one. `check` runs on all of them every time; these
# files' tests, which run over all families, run on them with `pytest -m slow`.
ALIKE = {"falcon_mamba", "bamba", "nemotron_h", "granitemoehybrid", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"}
ALIKE |= {"bailing_hybrid", "lfm2_moe", "lfm3", "mistral", "qwen2", "qwen3", "gemma3_text"}
OVER_ALL = {
    "architectures/test_gradients.py",
    "architectures/test_sites.py",
    "models/test_continue.py",
    "models/test_state.py",
    "models/test_views.py",
    "tracing/test_capture.py",
    "tracing/test_generation.py",
    "tracing/test_interventions.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of families that are like another as slow."""
    for item in items:
        values = getattr(item, "callspec", None)
        home = "/".join(item.path.parts[-2:])
        if values is not None and home in OVER_ALL and ALIKE & {str(value) for value in values.params.values()}:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, alone or in the whole suite."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
