"""What the loop measures: losses, speed, and which checkpoint is the best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dist_train.config import Config, StopWhen, UserError
from dist_train.runtime import Runtime
from dist_train.tasks.base import wide
from dist_train.tree import tree_sum


class Window:
    """What the steps since the last row of metrics gave.

    It stays on the device until ranks `meet`, so that no step waits for a result.

    Args:
        values: by name the global mean of each step, and as `weight` what its values weigh together; from a
            checkpoint in mid-window.
    """

    def __init__(self, ranks: Runtime, values: dict[str, list[float]]) -> None:
        self.ranks = ranks
        self.values = {name: list(column) for name, column in values.items()}
        self._names: tuple[str, ...] = ("loss",)
        self._weighted = False
        self._pending: list[torch.Tensor] = []  # of each of this rank's parts: [K]

    def add(self, names: tuple[str, ...], parts: list[torch.Tensor], weighted: bool = False) -> None:
        """Adds a step: of each of this rank's parts the sum of weights, then that of each weighted value.

        Where values are `weighted`, otherwise than by one for each sample, a row tells their weight, too.
        """
        self._names, self._per_step, self._weighted = names, len(parts), weighted
        self._pending += parts

    def meet(self, *flags: float) -> list[float]:
        """Adds up what is new, and with it `flags`, over all ranks; returns the sums of the flags."""
        parts = wide(torch.stack(self._pending)).view(-1, self._per_step, 1 + len(self._names))
        steps = tree_sum(parts.unbind(1))  # [steps, K]
        table = torch.cat([steps.flatten(), steps.new_tensor(flags)])
        sums: list[float] = self.ranks.sum(table).tolist()
        for row in range(len(steps)):
            weight, *values = sums[row * steps.shape[1] : (row + 1) * steps.shape[1]]
            self.values.setdefault("weight", []).append(weight)
            for name, value in zip(self._names, values, strict=True):
                # Where nothing counts there is no value, and nothing went wrong.
                mean = value / weight if weight else value
                self.values.setdefault(name, []).append(mean)
        self._pending.clear()
        return sums[steps.numel() :]

    def first_nonfinite(self) -> int | None:
        """How many steps before the last one the first loss of the window that is not finite lies."""
        losses = self.values.get("loss", [])
        for position, loss in enumerate(losses):
            if not math.isfinite(loss):
                return len(losses) - 1 - position
        return None

    def take(self) -> dict[str, float]:
        """The means per step, rounded once, of the steps that were not skipped; and a new window."""
        weights = self.values.get("weight", [])
        names = [name for name in self.values if name != "weight"]
        row = {f"train/{name}": _mean(self.values[name], weights) for name in names}
        if self._weighted:
            row["train/weight"] = math.fsum(self.values["weight"])  # tokens, pixels: whatever counts
        self.values = {}
        return row


def _mean(values: list[float], weights: list[float]) -> float:
    """The mean of the steps that were not skipped, and in which anything counted."""
    early = [1.0] * (len(values) - len(weights))  # files of format 1 keep no weights
    steps = zip(values, early + weights, strict=True)
    finite = [value for value, weight in steps if math.isfinite(value) and weight]
    return math.fsum(finite) / len(finite) if finite else math.nan


class Clock:
    """The time that steps take, evaluation and saving left out.

    Args:
        account: where seconds are added, by name: `productive`, `waiting for data`, and those `excluded`.
    """

    def __init__(self, account: dict[str, float]) -> None:
        self.account = account
        self.seconds_per_step = 0.0  # between the last two `settle`s; 0: not known yet
        self._unsettled = 0  # steps since the last one
        self._excluded = 0.0
        self._settled = time.perf_counter()
        self._restart()

    def _restart(self) -> None:
        self.steps, self.samples = 0, 0  # since the last row
        self._seconds, self._waiting, self._device_waiting = 0.0, 0.0, 0.0

    def step(self, samples: int) -> None:
        """Counts a step, which took so many samples on all ranks together; a last batch may be short."""
        self.steps += 1
        self._unsettled += 1
        self.samples += samples

    @contextmanager
    def excluded(self, name: str) -> Iterator[None]:
        """What happens inside is no training step."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._excluded += seconds
        self.account[name] += seconds

    def settle(self, waiting: float, device_waiting: float) -> None:
        """Brings the account up to now.

        Args:
            waiting, device_waiting: seconds since the last call that the loop and the device waited for data.
        """
        now = time.perf_counter()
        seconds = now - self._settled - self._excluded
        self._settled, self._excluded = now, 0.0
        self._seconds += seconds
        self._waiting += waiting
        self._device_waiting += device_waiting
        self.account["productive"] += seconds - waiting
        self.account["waiting for data"] += waiting
        if self._unsettled:
            self.seconds_per_step, self._unsettled = seconds / self._unsettled, 0

    def take(self, steps_left: int, most_per_second: float | None) -> dict[str, float]:
        """Speed since the last row, as metrics, and a new start.

        Args:
            most_per_second: samples that all devices could train at their peak, if that is known.
        """
        seconds, steps = max(self._seconds, 1e-9), max(self.steps, 1)
        values = {
            "perf/samples_per_second": self.samples / seconds,
            "perf/data_share": self._waiting / seconds,
            "perf/device_wait_share": self._device_waiting / seconds,
            "perf/seconds_left": steps_left * seconds / steps,
        }
        if most_per_second:
            values["perf/mfu"] = self.samples / seconds / most_per_second
        self._restart()
        return {name: float(f"{value:.4g}") for name, value in values.items()}


def stop_when(config: Config, best: str) -> list[StopWhen]:
    """The rules of `train.stop_when`, where `best` chooses the best checkpoint.

    Raises UserError for one that leaves open what is better.
    """
    try:
        return StopWhen.parse(config.train.stop_when, best)
    except ValueError as error:
        raise UserError(f"train.stop_when: {error}.") from None


@dataclass(frozen=True)
class Best:
    """Which checkpoint is the best: the greatest or smallest value of a metric; `sign` 0: none is."""

    metric: str
    sign: int

    @classmethod
    def parse(cls, text: str) -> Best:
        """From `max eval/accuracy`, `min eval/loss` or `none`. Raises UserError for anything else."""
        direction, _, metric = text.partition(" ")
        sign = {"max": 1, "min": -1, "none": 0}.get(direction)
        if sign is None or bool(sign) != metric.startswith("eval/"):
            raise UserError(f"task: its `best` is written as 'max eval/accuracy' or 'none', not {text!r}.")
        return cls(metric, sign)

    def check(self, names: Iterable[str], key: str = "checkpoint.best") -> None:
        """Raises UserError, naming `key`, if the metric is not among what an evaluation gives."""
        known = [f"eval/{name}" for name in names]
        if self.sign and self.metric not in known:
            raise UserError(f"{key}: the evaluation has no '{self.metric}', only {', '.join(known)}.")

    def named(self, best: float | None) -> dict[str, float]:
        """The best value by the name of its metric; empty where there is none."""
        return {} if best is None or not self.sign else {self.metric: best}

    def improves(self, metrics: dict[str, float], best: float | None) -> bool:
        """Whether `metrics`, of an evaluation or of none, holds a better value than `best`."""
        if not metrics or not self.sign:
            return False
        value = metrics[self.metric]
        return not math.isnan(value) and (best is None or self.sign * value > self.sign * best)
