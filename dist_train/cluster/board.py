"""The board: a page of memory that `dist-train launch` shares with its ranks, to tell each other of deaths.

A page is there as long as anybody has it, so it needs no server, no file, and no rank that lives.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Iterable

WORD_SECONDS = 3.0  # within which the launcher has noticed the death of a rank; it takes milliseconds
REPLACED, FAILED = "replaced", "failed"


class Board:
    """What the launcher and `processes` ranks tell each other; all that is forked after it sees the same."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._page = mmap.mmap(-1, 8 + processes)

    @property
    def generation(self) -> int:
        """How often ranks were replaced so far."""
        return int(struct.unpack_from("i", self._page)[0])

    def replace(self) -> None:
        """Tells that ranks have died and that others take their place, with whom all have to meet anew."""
        for rank in range(self.processes):
            self.set_ready(rank, False)
        struct.pack_into("i", self._page, 0, self.generation + 1)

    def fail(self) -> None:
        """Tells that a rank has failed, and that nobody takes its place."""
        struct.pack_into("i", self._page, 4, 1)

    def set_ready(self, rank: int, ready: bool) -> None:
        """Tells whether a rank is where it can meet anew with others, without a start of its own."""
        self._page[8 + rank] = ready

    def are_ready(self, ranks: Iterable[int]) -> bool:
        """Whether all of these are."""
        return all(self._page[8 + rank] for rank in ranks)

    def word(self, generation: int) -> str:
        """Waits for what the launcher says to an error in a collective operation.

        REPLACED if ranks were replaced since this `generation`, FAILED if one has failed for good; nothing
        within WORD_SECONDS if no other rank is to blame.
        """
        deadline = time.monotonic() + WORD_SECONDS
        while True:
            if self.generation != generation:
                return REPLACED
            if struct.unpack_from("i", self._page, 4)[0]:
                return FAILED
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.002)


current: Board | None = None  # in a process that `dist-train launch` has started, and in itself


def is_restart() -> bool:
    """Whether ranks were replaced since the launcher began."""
    return current is not None and current.generation > 0
