"""Checkpoints in memory: each rank has a copy of the state, so a death of one of them loses next to nothing.

The idea is that of Gemini (Wang et al., SOSP'23). Here a copy is taken where a file would be, and all that
holds for a file holds for it; as soon as a newer file is there, that is used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dist_train.checkpoint.snapshot import to_cpu
from dist_train.runtime import Runtime

SHARE = 100  # a copy is due after so many times what one takes: it costs about a hundredth
SHORTEST_SECONDS = 0.2


class Memory:
    """The newest copy of the state in the memory of this rank; `state` is as a file would hold it."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None
        self.every = SHORTEST_SECONDS  # seconds from copy to copy
        self._taken = -math.inf

    @property
    def step(self) -> int:
        """Of the copy; -1 if there is none."""
        return self.state["step"] if self.state else -1

    def is_due(self) -> bool:
        """Whether a new copy is worth its time."""
        return time.monotonic() - self._taken >= self.every

    def take(self, state: Callable[[], dict[str, Any]]) -> None:
        """Copies what `state` gives, on all ranks that come here together.

        Once one rank has a copy, all have done what was due until then, such as writing a row of metrics.
        """
        begin = time.monotonic()
        dist.barrier()
        self.state = to_cpu(state(), self.state)
        self._taken = time.monotonic()
        self.every = max(SHORTEST_SECONDS, SHARE * (self._taken - begin))

    def share(self, ranks: Runtime) -> None:
        """Gives all ranks the newest copy that any of them has."""
        steps = ranks.gather(self.step)
        owner = steps.index(max(steps))
        box = [self.state if ranks.rank == owner else None]
        dist.broadcast_object_list(box, src=owner)
        self.state = box[0]
