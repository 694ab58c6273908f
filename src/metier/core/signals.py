"""SIGTERM and Ctrl-C end a run after the step it is in, with a complete checkpoint."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

KINDS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """The first SIGINT or SIGTERM only sets ``requested``; a second one of the same kind ends at once.

    Ending at once means what it meant before: ``KeyboardInterrupt`` for SIGINT, death by the signal for
    SIGTERM; finished checkpoints are not touched by either. The handlers found on entering are put back on
    leaving. A kind that was ignored (a shell's background job) stays ignored. Outside the main thread, and
    with ``enabled=False``, nothing is installed.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.requested = False
        self.signal: int | None = None
        """The first signal received; a process that stopped for it exits with 128 + this."""
        self._seen: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if self.enabled and threading.current_thread() is threading.main_thread():
            for kind in KINDS:
                if signal.getsignal(kind) is not signal.SIG_IGN:
                    self._before[kind] = signal.signal(kind, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            kind, before = self._before.popitem()
            # A handler that was not installed from Python reads as None and cannot be put back.
            signal.signal(kind, signal.SIG_DFL if before is None else before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            self._now(number)
            return
        self._seen.add(number)
        if self.signal is None:
            self.signal = number
            self.requested = True
            _say(f"\nmetier: {signal.Signals(number).name}: stopping after this step; again to stop at once\n")

    def _now(self, number: int) -> None:
        self._restore()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _say(text: str) -> None:
    """Straight to the descriptor: a handler may run in the middle of another write to ``sys.stderr``."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
