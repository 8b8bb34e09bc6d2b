"""The way to the device: a GPU gets each batch while it computes the one before, and nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache

import torch

from dist_train.data.batch import Batch


class Feed:
    """An iterator over batches that moves them to the device, and knows what that has cost.

    To a GPU they are copied in a stream of its own, one batch ahead of what it computes: into the memory of
    the batch before the last, so that two of them are there, however far the loop is ahead.

    Args:
        change: what is done to each batch there.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        device: torch.device,
        channels_last: bool = False,
        change: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self.batches, self.device, self.channels_last, self.change = batches, device, channels_last, change
        self._side = _side(device) if device.type == "cuda" else None
        self._last: list[tuple[torch.cuda.Event, Batch]] = []  # when what came before was done; two at most
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. To be asked for when all that is computed of the one before is under way."""
        asked = time.perf_counter()
        batch = self._copied(self._side) if self._side else self._moved()
        self._seconds += time.perf_counter() - asked
        return self.change(batch) if self.change else batch

    def waited(self) -> tuple[float, float]:
        """Seconds since the last call that the loop waited for data, and that the device did.

        A GPU waits where it has computed all that it was given and the next batch is not there: between two
        events of its stream, which are asked here, once the loop has waited for the device anyway. Other
        devices wait as long as the loop.
        """
        loop = self._seconds
        device = sum(done.elapsed_time(there) for done, there in self._waits) / 1000 if self._side else loop
        self._waits.clear()
        self._seconds = 0.0
        return loop, device

    def _moved(self) -> Batch:
        return next(self.batches).to(self.device, self.channels_last)

    def _copied(self, side: torch.cuda.Stream) -> Batch:
        """The next batch, copied in the stream `side`."""
        stream = torch.cuda.current_stream(self.device)
        done, there = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        done.record(stream)  # all that the batch before it is needed for
        if len(self._last) == 2:
            del self._last[0]  # so the copy gets its memory, once the device is done with it:
            side.wait_event(self._last[0][0])
        with torch.cuda.stream(side):
            batch = self._moved()
        stream.wait_stream(side)
        there.record(stream)
        self._last.append((done, batch))
        self._waits.append((done, there))
        return batch


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The one stream for copies to a GPU: torch keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)
