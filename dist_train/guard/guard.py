"""Guard: what looks after one attempt, from the first line of `fit` to its last.

Signals, the lock of the run's folder, a deadline, and a watchdog for hangs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from dist_train.cluster import board as boards
from dist_train.cluster.board import FAILED, REPLACED
from dist_train.config import Config, RunError, UserError
from dist_train.guard.interrupt import Interrupt
from dist_train.guard.lock import Lock
from dist_train.guard.watchdog import Watchdog, check_seconds
from dist_train.runtime import Runtime


class Guard:
    """While it is entered, signals ask to stop; `lock` and `watch` add the rest as soon as they can be had.

    Args:
        started: time.monotonic() at the beginning of this attempt.
    """

    def __init__(self, config: Config, started: float) -> None:
        self.config, self.started = config, started
        self._began = started  # of the first of the attempts that this process takes part in
        self._interrupt = Interrupt()
        self._board = boards.current
        self._generation = self._board.generation if self._board else 0
        self._own_error: BaseException | None = None  # for which no other rank is to blame
        self._lock: Lock | None = None
        self._watchdog: Watchdog | None = None
        self.request = self._interrupt.request

    def __enter__(self) -> Guard:
        self._interrupt.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._interrupt.__exit__(kind, error, trace)

    @property
    def asked(self) -> bool:
        """Whether somebody has asked this rank to stop."""
        return self._interrupt.is_set()

    @property
    def hang(self) -> str:
        """Why the watchdog has given this rank up, or nothing."""
        return self._watchdog.reason if self._watchdog else ""

    def why_stopped(self, ranks: Runtime) -> str:
        """The reason of the first rank that was asked to stop; all ranks ask together."""
        return next(filter(None, ranks.gather(self._interrupt.reason)), "")

    def check(self, ranks: Runtime, say: Callable[[str], None]) -> None:
        """Waits, on rank 0, until nobody else trains this run. Raises UserError if somebody does."""
        if ranks.is_main:
            self._lock = self._lock or Lock(self.config.run_dir)
            self._lock.check(say)

    def clear(self) -> None:
        """Removes a lock that a dead attempt has left."""
        if self._lock:
            self._lock.clear()

    def take(self, say: Callable[[str], None]) -> None:
        """Makes the run's folder and takes its lock, on rank 0. Raises UserError if another one has it."""
        if not self._lock:
            return
        try:
            self.config.run_dir.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(say)
        except OSError as error:
            raise UserError(f"run.dir: {self.config.run_dir} can't be written: {error.strerror}.") from None

    def watch(self, ranks: Runtime, fail: Callable[[str], None] | None, can_meet_anew: bool) -> None:
        """Starts the watchdog: from now on there is a loop that stops and saves.

        Args:
            fail: hears, on rank 0, the reason for which the process is about to be ended.
            can_meet_anew: whether this rank goes on when another one has died and is replaced.

        Raises UserError where so many processes need a longer `watchdog_seconds`.
        """
        check_seconds(self.config.watchdog_seconds, ranks.world_size)
        self._watchdog = Watchdog(self.config, ranks, self._interrupt, self._began, self._lock, fail)
        self._interrupt.can_save = True
        if self._board:
            self._board.set_ready(ranks.rank, can_meet_anew)

    def beat(self, step: int, doing: str) -> None:
        """Tells that the loop moves: what it does now, after `step` optimizer steps."""
        if self._watchdog:
            self._watchdog.beat(step, doing)
        if self._is_replaced():
            raise RuntimeError("another rank was replaced")

    @property
    def meeting(self) -> list[Callable[[], None]]:
        """What is to be told when this rank has computed its own part of a step, and meets the others."""
        return [self._watchdog.pace.meets] if self._watchdog else []

    def _is_replaced(self) -> bool:
        return self._board is not None and self._board.generation != self._generation

    def lost_another(self, error: BaseException) -> bool:
        """Whether an error came of the death of another rank, in whose place there is a new process.

        Raises RunError if another rank has failed for good.
        """
        if not self._board or not isinstance(error, RuntimeError) or error is self._own_error:
            return False
        word = self._board.word(self._generation)
        if word == FAILED:
            raise RunError("another rank has failed, and this one can't go on without it") from error
        self._own_error = None if word else error
        return word == REPLACED

    def meet_anew(self) -> None:
        """Begins another attempt in this process; until `watch` there is no loop that stops and saves."""
        assert self._board
        self.started, self._generation = time.monotonic(), self._board.generation
        self._interrupt.can_save = False

    def release(self) -> None:
        """Gives the lock back, while the other ranks are still there; unless ranks are about to meet anew."""
        self.end_watch()
        if self._lock and not self._is_replaced():
            self._lock.release()

    def end_watch(self) -> None:
        """Ends the watchdog."""
        if self._watchdog:
            self._watchdog.stop()
