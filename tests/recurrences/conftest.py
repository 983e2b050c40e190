"""Ground of the tests of the recurrences."""

from __future__ import annotations

import inspect

import pytest


@pytest.fixture
def unchecked():
    """The function a user calls: without the run-time shape checks of the test suite, which would speak first."""
    return inspect.unwrap
