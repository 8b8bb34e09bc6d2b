"""Interruption: a signal sets a flag, and the loop stops at the next step on which all ranks agree.

The handler does nothing else, so it can't meet a half-done backward pass or a collective in flight.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: try again
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")


class Interrupt:
    """While it is entered, signals are turned into `reason`; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.reason = ""  # name of the first signal, or empty
        self._before: dict[int, object] = {}

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return bool(self.reason)

    def __enter__(self) -> Interrupt:
        for name in SIGNALS:
            try:
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._handle)
            except (AttributeError, ValueError):  # not on this system; not in the main thread
                continue
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name
