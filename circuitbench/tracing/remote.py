"""Errors of remote runs, in one sentence each. (Placeholder until the error table is complete.)"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..models import Model


@contextlib.contextmanager
def explained(model: Model, remote: bool | str) -> Iterator[None]:
    yield
