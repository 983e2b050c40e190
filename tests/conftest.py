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


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, alone or in the whole suite."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
