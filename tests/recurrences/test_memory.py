"""All states of a layer of mamba2-130m can be read without holding them."""

from __future__ import annotations

import subprocess
import sys

READ_ALL_STATES = """
import resource
import torch
from circuitbench.recurrences import ssd

torch.set_num_threads(1)
heads, p, n = 24, 64, 128
x, dt = torch.randn(1, 640, heads, p), torch.rand(1, 640, heads)
B, C = torch.randn(1, 640, 1, n), torch.randn(1, 640, 1, n)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(states.shape[1] for _, states in ssd.iter_states(x, dt, -torch.rand(heads), B, C))
assert total == 640
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_reading_states_in_chunks_takes_a_few_chunks_of_memory() -> None:
    # The states of 640 positions are 503 MB, a chunk 67 MB. (scripts/bench/scan.py measures 2,048 positions.)
    result = subprocess.run([sys.executable, "-c", READ_ALL_STATES], check=True, capture_output=True, text=True)
    assert int(result.stdout) < 300e6
