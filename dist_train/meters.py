"""What the loop measures: losses, speed, and which checkpoint is the best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dist_train.config import UserError
from dist_train.runtime import Runtime


class Window:
    """The losses of the steps since the last row of metrics.

    They stay on the device until ranks `meet`, so that no step waits for a result.

    Args:
        losses: global mean loss of each step, from a checkpoint in mid-window.
    """

    def __init__(self, runtime: Runtime, accumulate: int, losses: list[float]) -> None:
        self.runtime, self.accumulate, self.losses = runtime, accumulate, list(losses)
        self._pending: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor) -> None:
        """Adds the loss of one micro-batch: a scalar, times the world size."""
        self._pending.append(loss)

    def meet(self, *flags: float) -> list[float]:
        """Adds up the new losses, and with them `flags`, over all ranks; returns the sums of the flags."""
        steps = torch.stack(self._pending).view(-1, self.accumulate).sum(1)
        table = torch.cat([steps, steps.new_tensor(flags)])
        sums: list[float] = self.runtime.sum(table).tolist()
        self.losses += [loss / self.runtime.world_size for loss in sums[: len(steps)]]
        self._pending.clear()
        return sums[len(steps) :]

    def take(self) -> float:
        """The mean loss per step, rounded once, and a new window."""
        mean = math.fsum(self.losses) / len(self.losses)
        self.losses = []
        return mean


class Clock:
    """The time that steps take, evaluation and saving left out."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._restart()

    def _restart(self) -> None:
        self.start, self.steps, self.data_seconds, self.paused_seconds = (
            time.perf_counter(),
            0,
            0.0,
            0.0,
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training step."""
        begin = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - begin

    @property
    def seconds(self) -> float:
        """Seconds of training steps since the last row."""
        return time.perf_counter() - self.start - self.paused_seconds

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of a training step since the last row."""
        return self.seconds / max(self.steps, 1)

    def take(self, steps_left: int) -> dict[str, float]:
        """Speed since the last row, as metrics, and a new start."""
        seconds, steps = max(self.seconds, 1e-9), max(self.steps, 1)
        values = {
            "perf/samples_per_second": self.batch_size * steps / seconds,
            "perf/data_share": self.data_seconds / seconds,
            "perf/seconds_left": steps_left * seconds / steps,
        }
        self._restart()
        return {name: float(f"{value:.4g}") for name, value in values.items()}


@dataclass(frozen=True)
class Best:
    """Which checkpoint is the best: the greatest or smallest value of a metric; `sign` 0: none is."""

    metric: str
    sign: int

    @classmethod
    def parse(cls, text: str) -> Best:
        """From `max eval/accuracy`, `min eval/loss` or `none`."""
        direction, _, metric = text.partition(" ")
        return cls(metric, {"max": 1, "min": -1}.get(direction, 0))

    def improves(self, metrics: dict[str, float], best: float | None) -> bool:
        """Whether `metrics` holds a better value than `best`.

        Raises UserError if an evaluation has no such metric.
        """
        if not metrics or not self.sign:
            return False
        if self.metric not in metrics:
            raise UserError(
                f"checkpoint.best: the evaluation has no '{self.metric}', only {', '.join(metrics)}."
            )
        value = metrics[self.metric]
        return not math.isnan(value) and (best is None or self.sign * value > self.sign * best)
