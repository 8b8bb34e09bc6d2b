"""The comparison on a terminal, and the tables that the page shows, too."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dist_train.config import printable
from dist_train.record.terminal import BLOCKS, clock
from dist_train.tools.compare.groups import Comparison, Group, Value, written
from dist_train.tools.compare.runs import Run

WIDTH = 24  # characters of a sparkline
LEAST = 80  # of a terminal: a narrower one breaks the lines itself
GAP = 3  # between columns
ENDED = ("completed", "finished")  # finished is W&B's word
LEFT = ("key", "group", "curve")  # columns of words


def show(comparison: Comparison) -> None:
    """Prints what differs, what came of it, and what is better."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Piped output is not cut to the width of a terminal that isn't there.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, emoji=False)
    console.width = max(console.width, LEAST)
    head, rows = results(comparison)
    lines = sparklines(comparison)
    taken = sum(max(map(len, column)) + GAP for column in zip(head, *rows, strict=True))
    came = f"What came of it: {comparison.metric}"
    if taken + WIDTH + GAP <= console.width:
        rows = [[*row, line] for row, line in zip(rows, lines, strict=True)]
        tables = [(came, [*head, "curve"], rows)]
    else:
        curves = [[row[0], line] for row, line in zip(rows, lines, strict=True)]
        tables = [(came, head, rows), ("Curves", ["group", "curve"], curves)]
    for title, names, cells in (("What differs", *differences(comparison)), *tables):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
        for name in names:
            table.add_column(name, overflow="fold", justify="left" if name in LEFT else "right")
        for row in cells:
            table.add_row(*[printable(cell) for cell in row])
        if cells:
            console.print(table)
    for line in [*comparison.verdicts, *missing(comparison)]:
        console.print(printable(line), soft_wrap=True)


def differences(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The keys in which the groups differ: a column for each group, or a row where groups are many."""
    groups, keys = comparison.groups, comparison.keys
    cells = [[written(group.config.get(key)) for group in groups] for key in keys]
    if len(groups) <= max(4, len(keys)):
        rows = [[key, *row] for key, row in zip(keys, cells, strict=True)]
        return ["key", *(group.name for group in groups)], rows
    columns = zip(*cells, strict=True) if cells else []
    return ["group", *keys], [[group.name, *row] for group, row in zip(groups, columns, strict=False)]


def results(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """A row for each group: runs, best and last as mean ± spread over seeds, speed, goodput, time."""
    head = ["group", "runs", "best", "at step", "last", "samples/s", "goodput", "time"]
    return head, [_result(group) for group in comparison.groups]


def _result(group: Group) -> list[str]:
    steps = sorted({value.best_step for value in group.values})
    return [
        group.name,
        str(len(group.runs)),
        _spread(group, lambda value: value.best),
        f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}",
        _spread(group, lambda value: value.last),
        _mean([run.speed for run in group.runs], lambda speed: f"{speed:,.0f}"),
        _mean([run.status.get("goodput") for run in group.runs], lambda share: f"{share:.1%}"),
        _mean([run.seconds for run in group.runs], clock),
    ]


def _spread(group: Group, of: Callable[[Value], float]) -> str:
    mean, deviation = group.mean(of)
    return f"{mean:.4g}" if deviation is None else f"{mean:.4g} ± {deviation:.2g}"


def _mean(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return form(statistics.fmean(known)) if known else "–"


def each_run(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """A row for each run: its group, seed, state and numbers, not rounded."""
    head = ["run", "group", "seed", "state", "step", "best", "best step", "last"]
    head += ["samples/s", "goodput", "seconds", "attempts"]
    rows = [
        _run(run, group.name, value)
        for group in comparison.groups
        for run, value in zip(group.runs, group.values, strict=True)
    ]
    return head, rows


def _run(run: Run, group: str, value: Value) -> list[Any]:
    status = run.status
    numbers = [value.best, value.best_step, value.last, run.speed]
    told = [run.name, group, run.config.get("seed"), status.get("state"), status.get("step")]
    return [*told, *numbers, status.get("goodput"), run.seconds, status.get("attempts")]


def missing(comparison: Comparison) -> list[str]:
    """Sentences about runs that have no value of the metric, and those that are not complete."""
    names, metric = comparison.without, comparison.metric
    under_way = [
        f"{run.name} ({run.status['state']} at step {run.status.get('step', 0)})"
        for group in comparison.groups
        for run in group.runs
        if run.status.get("state") not in (None, *ENDED)
    ]
    return [
        *([f"left out, without any {metric}: {', '.join(names)}."] if names else []),
        *(
            [f"not complete, so their last values are not those of the end: {', '.join(under_way)}."]
            if under_way
            else []
        ),
    ]


def smoothed(y: np.ndarray, weight: float) -> np.ndarray:
    """The exponential moving average of y [N], divided by the weights that it has seen so far."""
    result, total, seen = np.empty_like(y), 0.0, 0.0
    for index, value in enumerate(y):
        total = weight * total + (1 - weight) * value
        seen = weight * seen + (1 - weight)
        result[index] = total / seen
    return result


def sparklines(comparison: Comparison) -> list[str]:
    """Of each group the mean of its curves, all on the same axes."""
    curves = [
        [run.curve(comparison.metric, comparison.axis) for run in group.runs] for group in comparison.groups
    ]
    ends = [x[at] for group in curves for x, _ in group for at in (0, -1)]
    grid = np.linspace(min(ends), max(ends), WIDTH)
    means = []
    for group in curves:
        lines = [
            np.interp(grid, x, smoothed(y, comparison.smooth), left=np.nan, right=np.nan) for x, y in group
        ]
        known = np.isfinite(lines).sum(0)
        means.append(np.where(known, np.nansum(lines, 0) / np.maximum(known, 1), np.nan))
    low, high = np.nanmin(means), np.nanmax(means)
    return ["".join(_block(value, low, high) for value in mean) for mean in means]


def _block(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return " "
    return BLOCKS[min(int((value - low) / max(high - low, 1e-12) * len(BLOCKS)), len(BLOCKS) - 1)]
