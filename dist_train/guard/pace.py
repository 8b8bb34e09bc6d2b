"""How fast each rank is: what its loop spends on itself, and ranks.json, where rank 0 names the slowest.

Ranks step together, so all are as slow as the slowest, and only what a rank spends on itself tells which
one that is. Each rank's watchdog publishes it with its place; a thread of rank 0 reads the words of all of
them from the store, by a connection of its own, and nobody's loop waits for it. These are seconds of the
loop: a GPU that computes slowly while its loop goes ahead doesn't show in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

READ_SECONDS = 5.0  # from one look at all ranks to the next, or more with thousands of them


class Word(NamedTuple):
    """What a rank tells of itself."""

    age: float  # seconds since ranks began, when it told that
    step: int
    doing: str
    host: str
    data: float  # seconds so far that its loop waited for its own data
    own: float  # these, and those in which it computed before it met the others

    @classmethod
    def parse(cls, text: bytes) -> Word:
        """From what `Pace.word` gave."""
        return cls(*json.loads(text))


class Pace:
    """Where a rank's loop is, and what it has spent on itself."""

    def __init__(self) -> None:
        self._began = time.monotonic()  # ranks begin together; clocks of hosts differ, and are set
        self.at = (self._began, 0, "starting")
        self.data = self.own = 0.0

    def beat(self, step: int, doing: str) -> None:
        """Tells that the loop moves: what it does now, after `step` optimizer steps."""
        now = time.monotonic()
        since, before, was = self.at
        if was == "waiting for data":
            self.data += now - since
            self.own += now - since
        elif was == "computing" and before == step and doing == "waiting for data":
            self.own += now - since  # a part that is not the step's last: ranks meet in that one
        self.at = (now, step, doing)

    def meets(self) -> None:
        """Tells that the loop has computed its own gradients, and from now on waits for other ranks."""
        now = time.monotonic()
        since, step, was = self.at
        if was == "computing":
            self.own += now - since
            self.at = (now, step, "waiting for other ranks")

    def age(self) -> float:
        """Seconds since ranks began."""
        return time.monotonic() - self._began

    def word(self) -> str:
        """What the other ranks are told: see `Word`."""
        _, step, doing = self.at
        return json.dumps([self.age(), step, doing, socket.gethostname(), self.data, self.own])


class Reader:
    """A thread of rank 0 that writes ranks.json.

    Args:
        store: a connection of its own.
        last: says which rank came last, of the words of all.
    """

    def __init__(
        self, store: dist.Store, world_size: int, file: Path, last: Callable[[Mapping[int, Word]], str]
    ) -> None:
        self.store, self.file, self.last = store, file, last
        self.keys = [f"at/{rank}" for rank in range(world_size)]
        self.ended = threading.Event()
        self.seconds = READ_SECONDS * (1 + world_size / 4000)
        self.thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Ends it; what it waits for may never answer."""
        self.ended.set()
        self.thread.join(1)

    def _run(self) -> None:
        before: dict[int, Word] = {}
        with contextlib.suppress(RuntimeError):  # the store is gone
            while not self.ended.wait(self.seconds):
                if not self.store.check(self.keys):
                    continue
                words = dict(enumerate(map(Word.parse, self.store.multi_get(self.keys))))
                told = {**slowest(before, words), "last": self.last(words)}
                temporary = self.file.with_name("ranks.json.tmp")
                with contextlib.suppress(OSError):  # a full disk may have room at the next look
                    temporary.write_text(json.dumps(told) + "\n", encoding="utf-8")
                    os.replace(temporary, self.file)
                before = words


def slowest(before: Mapping[int, Word], now: Mapping[int, Word]) -> dict[str, Any]:
    """What a step took each rank for itself between two looks, and the rank that took longest.

    Returns `steps` between them; where there were some, `seconds` a step of the median rank, and `slowest`:
    its `rank`, `host`, `seconds` a step, and how many of these were for `data`.
    """
    steps = {rank: now[rank].step - word.step for rank, word in before.items()}
    took = {rank: (now[rank].own - before[rank].own) / count for rank, count in steps.items() if count > 0}
    if not took:
        return {"steps": 0}
    rank = max(took, key=lambda rank: took[rank])
    data = (now[rank].data - before[rank].data) / steps[rank]
    named = {"rank": rank, "host": now[rank].host, "seconds": round(took[rank], 6), "data": round(data, 6)}
    median = round(statistics.median_low(took.values()), 6)
    return {"steps": steps[rank], "seconds": median, "slowest": named}
