"""Runs that differ only in the seed are one group: its mean and spread, and a test of what is better.

The test is Student's paired t test (Biometrika 6, 1908) on the last values of the seeds that two groups
share: order of samples and initial weights are functions of the seed, so what two recipes have in common is
taken out. It is two-sided; where several groups are compared with the first one, its p values are corrected
by Holm's method (Scandinavian Journal of Statistics 6, 1979).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.config import UserError, counted
from dist_train.tools.compare.runs import AXES, Run, choose_metric

SIGNIFICANT = 0.05  # the greatest p of a difference that is called one
FEW_SEEDS = 5  # below, a test finds only great differences, and its p hangs on their being normal
LONGEST_NAME = 44
NAMES = ("run.", "wandb.")  # what a run is called and where it lies is no difference


@dataclass(frozen=True)
class Value:
    """What a metric of a run came to."""

    best: float
    best_step: int
    last: float


@dataclass(frozen=True)
class Group:
    """Runs of one configuration."""

    name: str  # what is special about its configuration, or its first run
    config: dict[str, Any]  # without the seed and names
    runs: list[Run]
    values: list[Value]  # of each run

    def mean(self, of: Callable[[Value], float]) -> tuple[float, float | None]:
        """Mean and standard deviation (n - 1) over seeds; None where there is only one."""
        numbers = list(self.by_seed(of).values())
        return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None

    def by_seed(self, of: Callable[[Value], float]) -> dict[Any, float]:
        """The value of each seed; a run that was repeated with one seed counts once."""
        return {
            run.config.get("seed", run.name): of(value)
            for run, value in zip(self.runs, self.values, strict=True)
        }


@dataclass(frozen=True)
class Comparison:
    """What is shown."""

    metric: str
    axis: str  # one of AXES
    smooth: float  # weight of what came before in a moving average, 0: none
    groups: list[Group]
    keys: list[str]  # in which their configurations differ
    verdicts: list[str]  # who is better than the first one
    without: list[str]  # runs that have no value of the metric


def compare(runs: Sequence[Run], metric: str = "", axis: str = "step", smooth: float = 0.0) -> Comparison:
    """Compares runs by a metric, as `choose_metric` takes it.

    Raises UserError for fewer than two runs, an axis that there is none of, and as `choose_metric` does.
    """
    if len(runs) < 2:
        raise UserError(f"compare: needs at least two runs, not only {runs[0].name}.")
    if axis not in AXES:
        raise UserError(f"--x: step, time, samples or epoch, not '{axis}'.")
    if not 0 <= smooth < 1:
        raise UserError(f"--smooth: a weight from 0 to below 1, not {smooth:g}.")
    name, more_is_better = choose_metric(runs, metric)
    values = [(run, value) for run in runs if (value := evaluate(run, name, more_is_better))]
    groups, keys = group([run for run, _ in values], [value for _, value in values])
    without = [run.name for run in runs if run.name not in {run.name for run, _ in values}]
    told = verdicts(groups, name, more_is_better)
    return Comparison(name, axis, smooth, groups, keys, told, without)


def evaluate(run: Run, metric: str, more_is_better: bool) -> Value | None:
    """Best and last of a metric of a run; None if it has none."""
    x, y = run.curve(metric)
    if not len(y):
        return None
    best = int(y.argmax() if more_is_better else y.argmin())
    return Value(float(y[best]), int(x[best]), float(y[-1]))


def group(runs: Sequence[Run], values: Sequence[Value]) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first runs, and the keys in which their configurations differ."""
    found: dict[str, list[int]] = {}
    configs = [_told(run) for run in runs]
    for number, (run, config) in enumerate(zip(runs, configs, strict=True)):
        told = {key: value for key, value in config.items() if value is not None}
        key = json.dumps(told, sort_keys=True, default=str) if config else run.name
        found.setdefault(key, []).append(number)
    firsts = [configs[numbers[0]] for numbers in found.values()]
    keys = sorted({key for config in firsts for key in config if _differs(key, firsts)})
    names = _names([runs[numbers[0]].name for numbers in found.values()], firsts, keys)
    groups = [
        Group(name, config, [runs[i] for i in numbers], [values[i] for i in numbers])
        for name, config, numbers in zip(names, firsts, found.values(), strict=True)
    ]
    return groups, keys


def _told(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key != "seed" and not key.startswith(NAMES)}


def _differs(key: str, configs: Sequence[dict[str, Any]]) -> bool:
    return any(config.get(key) != configs[0].get(key) for config in configs)


def _names(runs: Sequence[str], configs: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """Groups by what is special about each, as `optim.lr=0.1`; by their first runs where that is long."""
    names = [
        " ".join(f"{key}={written(config[key])}" if key in config else f"no {key}" for key in keys)
        for config in configs
    ]
    short = all(names) and max(map(len, names)) <= LONGEST_NAME and len(set(names)) == len(names)
    return names if short else list(runs)


def written(value: Any) -> str:
    """A value of a configuration as it is written in a command."""
    if isinstance(value, str):
        return value or "''"
    return "–" if value is None else json.dumps(value, default=str)


def verdicts(groups: Sequence[Group], metric: str, more_is_better: bool) -> list[str]:
    """Whether each further group is better or worse than the first one, and how that is known."""
    tests = [paired(groups[0], other) for other in groups[1:]]
    corrected = iter(holm([p for _, p, _ in tests if p is not None]))
    lines = []
    for other, (difference, p, seeds) in zip(groups[1:], tests, strict=True):
        against = f"{other.name} against {groups[0].name}"
        if p is None:
            why = "the differences of all seeds are the same" if seeds > 1 else "a test needs two"
            lines.append(f"{against}: not tested, {counted(seeds, 'shared seed')}: {why}.")
            continue
        p = next(corrected)
        word = "better" if (difference > 0) == more_is_better else "worse"
        told = word if p < SIGNIFICANT else "no difference that can be told"
        few = ": few" if seeds < FEW_SEEDS else ""
        lines.append(f"{against}: {told} ({difference:+.3g}, p = {p:.2g}, {seeds} shared seeds{few}).")
    if any(p is not None for _, p, _ in tests):
        holms = ", Holm's correction" if sum(p is not None for _, p, _ in tests) > 1 else ""
        lines.append(
            f"Student's paired t test of the last {metric} of shared seeds, two-sided{holms}; "
            f"'better' means p < {SIGNIFICANT}."
        )
    return lines


def paired(one: Group, other: Group) -> tuple[float, float | None, int]:
    """The mean difference of the last values, other - one; the p value; the number of shared seeds.

    p is None where nothing can be tested: with fewer than two shared seeds, or without any spread.
    """
    a, b = one.by_seed(lambda value: value.last), other.by_seed(lambda value: value.last)
    differences = [b[seed] - a[seed] for seed in a if seed in b]
    count, mean = len(differences), statistics.fmean(differences) if differences else math.nan
    if count < 2:
        return mean, None, count
    deviation = statistics.stdev(differences)
    if deviation <= 1e-9 * max(map(abs, [*a.values(), *b.values()])):
        return mean, None, count
    return mean, student(mean / deviation * math.sqrt(count), count - 1), count


def student(t: float, freedom: int) -> float:
    """The two-sided p value of a t with so many degrees of freedom.

    By the finite sums of Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(freedom))
    cosine = math.cos(angle) ** 2
    term = math.cos(angle) if freedom % 2 else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + freedom % 2, freedom - 1, 2):
        term *= cosine * (k - 1) / k
        total += term
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if freedom % 2 else inside)


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the same order."""
    corrected, least = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        least = max(least, min(1.0, values[index] * (len(values) - rank)))
        corrected[index] = least
    return corrected
