"""The watchdog: a thread beside a rank's loop that notices what the loop itself can't.

A step that never ends, a deadline, and a lock that another attempt has taken.
It only asks to stop, as a signal does; of a hang it writes the stacks and ends the process. Where code holds
Python's lock (the GIL) no thread can look: then faulthandler's own thread, in C, does that.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from dist_train.config import Config, UserError
from dist_train.guard.deadline import deadline
from dist_train.guard.interrupt import Interrupt
from dist_train.guard.lock import RENEW_SECONDS, Lock
from dist_train.guard.pace import Pace, Reader, Word
from dist_train.runtime import Runtime

LOOK_SECONDS = 1.0
GIL_SECONDS = 10.0  # after a hang of any other kind would have been ended
SHARED_SECONDS = 10.0  # for so long what one rank has found out of a hang goes for the others, too
MOST_NAMED = 8  # ranks in one line
SILENT_SECONDS = 5.0  # a rank that has published nothing for so long is stopped or gone


class Watchdog:
    """Looks after this rank until `stop`.

    Args:
        fail: hears, on rank 0, the reason for which the process is about to be ended.
    """

    def __init__(
        self,
        config: Config,
        ranks: Runtime,
        interrupt: Interrupt,
        started: float,
        lock: Lock | None,
        fail: Callable[[str], None] | None,
    ) -> None:
        self.folder, self.seconds = config.run_dir / "stacks", config.watchdog_seconds
        self.ranks, self.interrupt, self.lock, self.fail = ranks, interrupt, lock, fail
        self.pace = Pace()
        self.beat, self._age = self.pace.beat, self.pace.age
        self.reason = ""  # for which it has given this rank up
        self._deadline = deadline(config, started) if ranks.is_main else None
        self._store = _store() if ranks.world_size > 1 else None
        self._held = self._open_held() if self.seconds else None
        self.publish_seconds = publish_seconds(ranks.world_size)
        self._renewed = self._published = 0.0
        self._ended = threading.Event()
        self._reader: Reader | None = None
        if self._store and ranks.is_main and hasattr(self._store, "clone"):  # torch 2.7 and later
            size, age = ranks.world_size, self._age
            # It knows neither this object nor its store, which serves all ranks for as long as anyone has it.
            self._reader = Reader(
                self._store.clone(),
                size,
                config.run_dir / "ranks.json",
                lambda words: last_of(words, size, age()),
            )
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def at(self) -> tuple[float, int, str]:
        """Since when the loop does what, after so many steps."""
        return self.pace.at

    def stop(self) -> None:
        """Ends the watch."""
        self._ended.set()
        if self._reader:
            self._reader.stop()
        self._thread.join(2 * LOOK_SECONDS)
        self._close_held()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Does what is due at this time of the clock, in seconds as time.monotonic() counts them."""
        if self._held is not None:  # as long as this thread gets its turn, it never comes to that
            faulthandler.dump_traceback_later(self.seconds + GIL_SECONDS, exit=True, file=self._held)
        if self._deadline and now >= self._deadline.at:
            self.interrupt.request(self._deadline.reason)
        if self.lock and now - self._renewed >= RENEW_SECONDS:
            self._renewed = now
            if not self.lock.renew():
                _end(f"another attempt has taken {self.lock.path}; this one ends.")
        if now - self._published >= self.publish_seconds:
            self._published = now
            self._publish()
        if self.seconds and now - self.at[0] > self.seconds:
            self._end_hang()

    def _publish(self) -> None:
        """Tells the other ranks where this one is."""
        if self._store:
            with contextlib.suppress(RuntimeError):  # the store is gone, with the launcher or rank 0
                self._store.set(f"at/{self.ranks.rank}", self.pace.word())

    def _end_hang(self) -> None:
        """Writes the stacks, names the rank that came last, and ends the process if it still hangs."""
        at = self.at
        _, step, doing = at
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            with (self.folder / f"rank-{self.ranks.rank}.txt").open("w", encoding="utf-8") as file:
                file.write(f"rank {self.ranks.rank} after step {step}: {doing}, {time.ctime()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        self.reason = (
            f"no step for {self.seconds} s; {self._last()}; the stacks of each rank are in {self.folder}"
        )
        if self.fail:
            self.fail(self.reason)
        # The end of this rank would end the others before they write; rank 0, which reports it, goes first.
        if self._ended.wait((3 if self.fail else 6) * LOOK_SECONDS):
            return
        if self.at is at:
            _end(f"rank {self.ranks.rank}: {self.reason}")
        self.reason = ""  # it was slow, and moves again

    def _held_path(self) -> Path:
        return self.folder / f"rank-{self.ranks.rank}-gil.txt"

    def _open_held(self) -> int:
        """Where the stacks go when the GIL is held: open before, since no Python runs then."""
        try:
            self.folder.mkdir(exist_ok=True)
            return os.open(self._held_path(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        except OSError:
            return os.dup(2)

    def _close_held(self) -> None:
        """Leaves nothing behind where nothing was written."""
        if self._held is None:
            return
        faulthandler.cancel_dump_traceback_later()
        empty = os.fstat(self._held).st_size == 0
        os.close(self._held)
        self._held = None
        with contextlib.suppress(OSError):
            if empty:
                self._held_path().unlink()
            self.folder.rmdir()  # which fails if stacks are in it

    def _last(self) -> str:
        """Which rank came last, in words."""
        if self._store is None:
            return f"it was {self.at[2]} after step {self.at[1]}"
        answers: list[str] = []
        # In a thread of its own: a store whose rank is stopped would not answer.
        asking = threading.Thread(target=lambda: answers.append(self._ask()), daemon=True)
        asking.start()
        asking.join(2 * LOOK_SECONDS)
        return answers[0] if answers else last_rank({}, self.ranks.world_size, self._age())

    def _ask(self) -> str:
        """Which rank came last; the first rank that asks finds out, the others take its word.

        If each of thousands of ranks asked for the places of all, no store could answer in time.
        """
        assert self._store
        hang = int(self._age() // min(self.seconds, SHARED_SECONDS))
        if self._store.add(f"asked/{hang}", 1) > 1:
            return self._store.get(f"last/{hang}").decode()
        keys = [f"at/{rank}" for rank in range(self.ranks.world_size)]
        if self._store.check(keys):  # two requests, however many ranks there are
            words = dict(enumerate(map(Word.parse, self._store.multi_get(keys))))
        else:  # some have never said a word
            words = {
                r: Word.parse(self._store.get(key)) for r, key in enumerate(keys) if self._store.check([key])
            }
        last = last_of(words, self.ranks.world_size, self._age())
        self._store.set(f"last/{hang}", last)
        return last


def publish_seconds(world_size: int) -> float:
    """Seconds from a rank's word to its next: all go to one store, which hears of a thousand a second."""
    return max(LOOK_SECONDS, world_size / 1000) - LOOK_SECONDS / 2


def silent_seconds(world_size: int) -> float:
    """Seconds without a word after which a rank counts as stopped or gone."""
    return SILENT_SECONDS + 2 * publish_seconds(world_size)


def check_seconds(seconds: float, world_size: int) -> None:
    """Raises UserError where a hang would be ended before the store has heard of each rank."""
    if 0 < seconds < silent_seconds(world_size) and publish_seconds(world_size) > LOOK_SECONDS:
        raise UserError(
            f"watchdog_seconds: {seconds:g} is too short for {world_size:,} processes, each of which says"
            f" where it is every {publish_seconds(world_size):.0f} s; set at least"
            f" {math.ceil(silent_seconds(world_size))}."
        )


def _end(reason: str) -> None:
    """Ends the process, also where the reason can't be printed: stderr may lie on a full disk."""
    with contextlib.suppress(OSError):
        print(f"dist-train: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


ORDER = ("starting", "waiting for data", "computing", "waiting for other ranks", "evaluating", "saving")


def last_rank(
    places: Mapping[int, tuple[float, int, str]],
    world_size: int,
    now: float,
    silent_after: float = SILENT_SECONDS,
) -> str:
    """Which rank came last, in words.

    Args:
        places: of each rank that is known the time at which it published that, its step, and what it did.
        now: the same clock's time.
        silent_after: seconds without a word after which a rank counts as stopped or gone.
    """
    if not places:
        return "the store does not answer, so rank 0 or the launcher, which keeps it, came last"
    silent = [r for r in range(world_size) if r not in places or now - places[r][0] > silent_after]
    if silent:
        names = ", ".join(map(str, silent[:MOST_NAMED]))
        names += f" and {len(silent) - MOST_NAMED:,} others" if len(silent) > MOST_NAMED else ""
        return f"rank {names} came last: nothing was heard of it for {silent_after:.0f} s or more"
    rank = min(places, key=lambda r: (places[r][1], ORDER.index(places[r][2])))
    _, step, doing = places[rank]
    same = [r for r in places if places[r][1:] == places[rank][1:]]
    if len(same) == world_size > 1:
        return f"all ranks are {doing} after step {step}"
    return f"rank {rank} came last: it is {doing} after step {step}"


def last_of(words: Mapping[int, Word], world_size: int, age: float) -> str:
    """Which of the ranks came last by their words, in words; `age` in seconds since ranks began."""
    places = {rank: (word.age, word.step, word.doing) for rank, word in words.items()}
    return last_rank(places, world_size, age, silent_seconds(world_size))


def _store() -> dist.Store:
    """The key-value store by which the ranks met."""
    return dist.PrefixStore("dist_train/watchdog", dist.distributed_c10d._get_default_store())
