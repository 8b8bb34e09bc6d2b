"""What a run has recorded, as parts of a page: curves, where its time went, attempts, what it ran on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import UserError, changes, completed, to_mapping
from dist_train.config.schema import Config
from dist_train.pages.page import Curve, Html, bars, chart, folded, grid, section, table, text, tiles
from dist_train.record.history import read_attempts, read_metrics, read_rows, read_status
from dist_train.record.terminal import clock
from dist_train.tools.status import collect

Row = dict[str, Any]
MOST_POINTS = 4_000  # of a curve that are drawn, evenly spread over it
MOST_LOG = 400  # lines of the log that are shown


@dataclass(frozen=True)
class Recorded:
    """The record of a run, as it lies in its folder."""

    folder: Path
    status: Row  # with a `state` that may be lost, as `dist-train status` tells it
    rows: list[Row]  # the effective history
    all_rows: list[Row]  # also those that a later attempt took back
    attempts: list[Row]

    @classmethod
    def read(cls, folder: Path) -> Recorded:
        """The record in a run's folder. Raises UserError if there is none."""
        if not read_status(folder) and not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: there is no such run.")
        status = collect([folder])[0] if read_status(folder) else {}
        rows = read_metrics(folder)
        return cls(folder, status, rows, list(read_rows(folder)), read_attempts(folder))

    @property
    def best(self) -> tuple[str, float | None, int | None]:
        """The metric that chooses the best checkpoint, else the first one; its best value and that step."""
        best, last = self.status.get("best") or {}, self.status.get("metrics") or {}
        name = next(iter(best or last), "")
        value = best.get(name)
        steps = [row["step"] for row in self.rows if value is not None and row.get(name) == value]
        return name, value, steps[0] if steps else None


def overview(run: Recorded) -> Html:
    """The few figures that say how the run stands."""
    status, (name, best, _) = run.status, run.best
    step, total, seconds = status.get("step"), status.get("total_steps"), status.get("seconds", {})
    last = (status.get("metrics") or {}).get(name)
    cells: list[tuple[str, Any]] = [("state", status.get("state", "unknown"))]
    if step is not None and total:
        cells.append(("step", f"{step:,}" if step == total else f"{step:,} of {total:,}"))
    if best is not None:
        cells.append((f"best {name.removeprefix('eval/')}", best))
    if last is not None:
        cells.append((f"last {name.removeprefix('eval/')}", last))
    if seconds.get("total"):
        cells.append(("time", clock(seconds["total"])))
    if status.get("samples_per_second"):
        cells.append(("samples per second", f"{status['samples_per_second']:,.0f}"))
    if status.get("goodput") is not None:
        cells.append(("goodput", f"{status['goodput']:.1%}"))
    cells.append(("attempts", status.get("attempts", len(run.attempts))))
    return tiles(cells)


# --- curves ----------------------------------------------------------------------------------------------


def curves(run: Recorded) -> Html:
    """The curves of all that was recorded, those that belong together in one chart."""
    names = list(dict.fromkeys(name for row in run.rows for name in row if "/" in name or name == "lr"))
    best = run.best[2]
    marks = [(float(best), "best")] if best else []
    shares = [n for n in names if n.startswith("eval/") and n != "eval/loss" and _within(run.rows, n)]
    groups: list[tuple[str, str, list[str]]] = [
        ("Loss", "loss", [name for name in ("train/loss", "eval/loss") if name in names]),
        ("Evaluation", "", shares),
        *((name, "", [name]) for name in names if name.startswith("eval/") and name not in shares),
        ("Learning rate", "rate", [name for name in names if name == "lr" or name.startswith("lr/")]),
        ("Gradient's norm, before clipping", "norm", [name for name in names if name == "train/grad_norm"]),
        *((name, "", [name]) for name in names if name.startswith("train/")),
        ("Throughput", "samples per second", [n for n in names if n == "perf/samples_per_second"]),
        ("Memory", "GB", [name for name in names if name == "perf/memory_gb"]),
        ("Shares of the time", "", [n for n in names if n.endswith("_share") or n == "perf/mfu"]),
    ]
    charts, drawn = [], set()
    for title, label, members in groups:
        members = [name for name in members if name not in drawn]
        drawn |= set(members)
        lines = [_curve(run.rows, name) for name in members]
        if any(np.isfinite(line.y).any() for line in lines):
            charts.append(chart(title, "step", label, lines, marks if "eval" in "".join(members) else ()))
    return section("Curves", grid(*charts) if charts else text("Nothing has been measured yet."))


def _within(rows: Iterable[Row], name: str) -> bool:
    """Whether a metric is a share, from 0 to 1."""
    return all(0 <= row[name] <= 1 for row in rows if isinstance(row.get(name), (int, float)))


def _curve(rows: Iterable[Row], name: str) -> Curve:
    points = [(row["step"], row[name]) for row in rows if name in row and not isinstance(row[name], str)]
    values = [math.nan if value is None else value for _, value in points]
    x, y = np.array([step for step, _ in points], float), np.array(values, float)
    return Curve(name, _spread(x), _spread(y))


def _spread(values: np.ndarray) -> np.ndarray:
    """At most MOST_POINTS of the values, the first and the last among them."""
    count = min(len(values), MOST_POINTS)
    return values[np.linspace(0, len(values) - 1, count).round().astype(int)] if count else values


# --- time ------------------------------------------------------------------------------------------------


def time(run: Recorded) -> Html:
    """Where the time went, and the attempts on it."""
    seconds = dict(run.status.get("seconds", {}))
    total = float(seconds.pop("total", 0) or 0)
    parts: list[Html] = []
    if total:
        spent = [(name, float(value)) for name, value in seconds.items()]
        spent.append(("other", max(0.0, total - sum(value for _, value in spent))))
        shares = [(f"{name}, {clock(value)}", round(100 * value / total, 1)) for name, value in spent]
        parts.append(bars(f"Where {clock(total)} went, in percent", shares, most=100))
    lines, timed = [], [row for row in run.all_rows if isinstance(row.get("time"), (int, float))]
    for attempt in run.attempts:
        own = [row for row in timed if row["attempt"] == attempt["attempt"]]
        before = [row["time"] for row in timed if row["attempt"] < attempt["attempt"]]
        x = [max(before, default=0.0), *(row["time"] for row in own)]
        y = [attempt["step"], *(row["step"] for row in own)]
        drawn = (_spread(np.array(x, float)), _spread(np.array(y, float)))
        lines.append(Curve(f"attempt {attempt['attempt']}", drawn[0], drawn[1]))
    if lines:
        parts.append(chart("Steps over the time of the run, by attempt", "time", "step", lines))
        head = ("attempt", "from step", "to step", "processes", "parts", "steps done again", "changed")
        parts.append(table(head, _attempts(run)))
    return section("Time and attempts", *parts)


def _attempts(run: Recorded) -> list[Sequence[Any]]:
    """A row for each attempt: which steps, on how many processes, what was lost and changed after it."""
    rows: list[Sequence[Any]] = []
    for place, attempt in enumerate(run.attempts):
        own = [row["step"] for row in run.all_rows if row.get("attempt") == attempt["attempt"]]
        is_last = place == len(run.attempts) - 1
        reached = max([attempt["step"], *own, *([run.status.get("step", 0)] if is_last else [])])
        again = None if is_last else max(0, reached - run.attempts[place + 1]["step"])
        changed = ""
        if place:
            before = run.attempts[place - 1].get("config", {})
            changed = ", ".join(map(str, changes(before, attempt.get("config", {}))))
        sizes = (attempt.get("processes"), attempt.get("parts"))
        rows.append((attempt["attempt"], attempt["step"], reached, *sizes, again, changed))
    return rows


# --- what it was -----------------------------------------------------------------------------------------


def setting(run: Recorded) -> Html:
    """The configuration, and what the run ran on."""
    parts: list[Html] = []
    file = run.folder / "config.yaml"
    if file.is_file():
        differing = changes(to_mapping(Config()), completed(file))
        rows = [(change.key, str(change.old), str(change.new)) for change in differing]
        parts.append(table(("key", "default", "here"), rows, "What differs from the defaults"))
        parts.append(folded("config.yaml", file.read_text(encoding="utf-8")))
    ran_on = dict(run.attempts[-1].get("machine") or {}) if run.attempts else {}
    for name in ("host", "slurm_job", "processes"):
        if run.status.get(name):
            ran_on.setdefault(name, run.status[name])
    parts.append(table(("", ""), [(name, str(value)) for name, value in ran_on.items()], "Environment"))
    log = run.folder / "log.txt"
    if log.is_file() and not log.is_symlink():  # a stranger's link could show any file on a page to be shared
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        left = f", the last {MOST_LOG} lines" if len(lines) > MOST_LOG else ""
        parts.append(folded(f"log.txt{left}", "\n".join(lines[-MOST_LOG:])))
    return section("Configuration and environment", *parts)
