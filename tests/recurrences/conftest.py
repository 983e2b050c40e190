"""Ground of the tests of the recurrences."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are tiny: on a busy machine, starting a second thread takes far longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the run-time shape checks of the test suite, which would speak before the package does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
