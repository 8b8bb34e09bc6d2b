"""Interruption: a signal sets a flag, and the loop stops at the next step on which all ranks agree.

The handler does nothing else, so it can't meet a half-done backward pass or a collective in flight.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: try again
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
SAME_SECONDS = 0.5  # torchrun forwards the SIGINT that a terminal has sent to its ranks already


class Interrupt:
    """While it is entered, signals are turned into `reason`; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.reason = ""  # of the first request, or empty
        self._sigint_at = 0.0
        self._before: dict[int, object] = {}

    def is_set(self) -> bool:
        """Whether somebody has asked to stop."""
        return bool(self.reason)

    def request(self, reason: str) -> None:
        """Asks to stop at the next step on which all ranks agree; the first reason is kept."""
        self.reason = self.reason or reason

    def __enter__(self) -> Interrupt:
        for name in SIGNALS:
            number = getattr(signal, name, None)  # some are not on every system
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue  # `nohup` asks to go on without the terminal
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread
                break
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._sigint_at and time.monotonic() - self._sigint_at > SAME_SECONDS:
                raise KeyboardInterrupt
            self._sigint_at = self._sigint_at or time.monotonic()
        self.request(signal.Signals(number).name)


def before_training() -> None:
    """From here on a signal ends this process at once, as interrupted: there is nothing to save yet."""
    for number in _that_srun_sends():
        signal.signal(number, lambda *_: os._exit(EXIT_INTERRUPTED))


def around_training() -> None:
    """From here on a signal means nothing outside of an `Interrupt`: the state is saved, or never will be.

    As soon as one rank has ended with 75, srun sends SIGTERM to the others, which are about to end as well.
    """
    for number in _that_srun_sends():
        signal.signal(number, signal.SIG_IGN)


def _that_srun_sends() -> list[int]:
    """Ctrl-C and a terminal that goes away keep their usual meaning outside of training."""
    names = ("SIGTERM", "SIGUSR1", "SIGUSR2")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
