"""Ctrl-C and SIGTERM while training: noted when they come, acted on between two steps, after what was done is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_TERMINATED = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class Interrupts:
    """Handlers of both signals for as long as the `with` block lasts; in other threads than the main one, none.

    A second Ctrl-C, or one after SIGTERM, is not waited with: KeyboardInterrupt is raised where the program is. A
    signal that is ignored (as under `nohup`) stays ignored.

    Args:
        active: whether there is something to save; else signals do what they always do.

    Attributes:
        received: the signal that came, if any.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if self.active:
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: a handler that Python did not set, nor can restore
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def act(self, saved: str) -> None:
        """Do what the signal asks for: KeyboardInterrupt, or the end of the process with exit code 143.

        A handler of one's own that was set before is called first.

        Args:
            saved: what is said of the state that was saved.
        """
        number = self.received if self.received is not None else signal.SIGTERM
        before = self._before.get(number)
        self._restore()
        if callable(before) and before is not signal.default_int_handler:
            before(number, None)
        if number == signal.SIGINT:
            raise KeyboardInterrupt(saved)
        raise SystemExit(_TERMINATED)
