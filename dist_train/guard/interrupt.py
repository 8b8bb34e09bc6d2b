"""Interruption: a signal sets a flag, and the loop stops at the next step on which all ranks agree.

The handler does nothing else, so it can't meet a half-done backward pass or a collective in flight. A
launcher that goes away asks to stop as well. Imports nothing heavy: this is there before all else.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from dist_train.cluster import board

EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: try again
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
LOOK_SECONDS = 1.0  # how often the launcher is looked for
BORN = (os.getpid(), os.getppid())  # later the launcher may be gone, and another process the parent
SAME_SECONDS = 0.5  # torchrun forwards the SIGINT that a terminal has sent to its ranks already


class Interrupt:
    """While it is entered, signals are turned into `reason`; a second SIGINT stops at once.

    So is a launcher that is gone once `can_save` is set; before, it ends the process: nothing is lost.
    """

    def __init__(self) -> None:
        self.reason = ""  # of the first request, or empty
        self.can_save = False  # whether there is a loop that stops and saves
        self._watched = launcher_watched(self._launcher_gone)
        self._sigint_at = 0.0
        self._before: dict[int, object] = {}

    def is_set(self) -> bool:
        """Whether somebody has asked to stop."""
        return bool(self.reason)

    def request(self, reason: str) -> None:
        """Asks to stop at the next step on which all ranks agree; the first reason is kept."""
        self.reason = self.reason or reason

    def __enter__(self) -> Interrupt:
        self._watched.__enter__()
        for name in SIGNALS:
            number = getattr(signal, name, None)  # some are not on every system
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue  # `nohup` asks to go on without the terminal
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread
                break
        if board.current:  # the launcher has held them back until here
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watched.__exit__(None, None, None)
        for number, handler in self._before.items():
            # The state is saved, or never will be. As soon as one rank has ended with 75, srun sends SIGTERM
            # to the others, which are about to end as well.
            ending = handler is end_as_interrupted
            signal.signal(number, signal.SIG_IGN if ending else handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._sigint_at and time.monotonic() - self._sigint_at > SAME_SECONDS:
                raise KeyboardInterrupt
            self._sigint_at = self._sigint_at or time.monotonic()
        self.request(signal.Signals(number).name)

    def _launcher_gone(self) -> None:
        if not self.can_save:
            end_as_interrupted()
        self.request("the launcher is gone")


def before_training() -> None:
    """From here to an `Interrupt` a signal ends this process at once: there is nothing to save yet.

    Ctrl-C and a terminal that goes away keep their usual meaning outside of training.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        if number := getattr(signal, name, None):
            signal.signal(number, end_as_interrupted)


def end_as_interrupted(*_: object) -> None:
    """Ends the process without ado, with the exit code of an interruption."""
    os._exit(EXIT_INTERRUPTED)


@contextmanager
def launcher_watched(gone: Callable[[], None] = end_as_interrupted) -> Iterator[None]:
    """Meanwhile a thread calls `gone` each second in which the launcher of this process is no more."""
    from dist_train.cluster.accelerate import was_launched

    launcher = BORN[1] if BORN[0] == os.getpid() else os.getppid()  # a forked process has another parent
    left = threading.Event()

    def look() -> None:
        while not left.wait(LOOK_SECONDS):
            if os.getppid() != launcher:
                gone()

    if board.current or was_launched(os.environ):
        threading.Thread(target=look, name="launcher", daemon=True).start()
    try:
        yield
    finally:
        left.set()
