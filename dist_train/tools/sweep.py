"""Runs one after the other: of a sweep, or of one configuration with several seeds; and their results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_train.cluster.sweep import Task
from dist_train.config import is_override, load_words
from dist_train.record.history import read_status
from dist_train.record.terminal import describe


def of_seeds(words: Sequence[str], count: int) -> list[Task]:
    """A task for each of `count` seeds, from the configuration's own on; the runs are named by their seeds.

    Args:
        words: config files and overrides, as `train` takes them.
    """
    config = load_words(words)
    seeds = range(config.seed, config.seed + count)
    name = f"{config.run.name}-seed"
    files = [word for word in words if not is_override(word)]
    return [
        Task(Path(files[0] if files else "--seeds"), name, seed, tuple(words), (f"seed={seed}",))
        for seed in seeds
    ]


def train(tasks: Sequence[Task]) -> bool:
    """Trains what is not complete yet, one run after the other, here; False where one was interrupted."""
    from dist_train.guard.interrupt import before_training
    from dist_train.train import fit

    for task in tasks:
        before_training()  # and after the one before, whose end left signals without an effect
        if fit(load_words(task.arguments)).state == "interrupted":
            return False
    return True


def results(tasks: Sequence[Task]) -> Iterator[str]:
    """A line for each task with its last metrics, and where only seeds differ their mean and spread."""
    complete: list[dict[str, float]] = []
    for task in tasks:
        config = load_words(task.arguments)
        status: dict[str, Any] = read_status(config.run_dir)
        metrics = status.get("metrics") or {}
        if status.get("state") == "completed":
            complete.append({name: value for name, value in metrics.items() if value is not None})
        state = status.get("state", "not begun")
        yield f"{config.run.name}  {' '.join(task.overrides)}  {state}  {describe(metrics)}".rstrip()
    if len(complete) > 1 and all(word.startswith("seed=") for task in tasks for word in task.overrides):
        yield f"mean ± standard deviation of {len(complete)} runs: {_spread(complete)}"


def _spread(runs: Sequence[dict[str, float]]) -> str:
    shown = []
    for name in runs[0]:
        values = [run[name] for run in runs if name in run]
        if len(values) > 1:
            shown.append(f"{name} {statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}")
    return "  ".join(shown)
