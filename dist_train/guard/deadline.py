"""The time at which an attempt stops by itself: what `stop_after` says, or shortly before SLURM's limit."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from dist_train.cluster import slurm
from dist_train.config import Config, parse_seconds

MARGIN_SECONDS = 60.0  # kept of SLURM's time limit for the last save


class Deadline(NamedTuple):
    """When to stop, as time.monotonic() counts, and why."""

    at: float
    reason: str


def deadline(config: Config, started: float) -> Deadline | None:
    """The deadline of an attempt that began at `started`, or None if it has none."""
    if config.stop_after:
        return Deadline(started + parse_seconds(config.stop_after), f"stop_after={config.stop_after}")
    if not (end := slurm.end_time(os.environ)):
        return None
    left = end - time.time()
    return Deadline(time.monotonic() + left - min(MARGIN_SECONDS, left / 5), "SLURM's time limit is near")
