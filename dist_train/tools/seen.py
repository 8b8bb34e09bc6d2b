"""What the files of a run tell of how it goes: the facts that `dist-train watch` shows. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.config import counted
from dist_train.record.history import Followed
from dist_train.record.terminal import clock
from dist_train.tools.status import collect

STALLED_SECONDS = 60.0  # without news of a loop whose process renews its lock every few seconds
KEPT = ("train/loss", "eval/", "lr", "perf/seconds_left")  # what is kept of each row, by how names begin

SLOW, SLOW_SECONDS = 1.25, 0.005  # so many times the median, and so much more: one rank holds up the others

Curve = list[tuple[float, float]]  # (step, value)


class Seen(NamedTuple):
    """A run at a moment."""

    status: dict[str, Any]  # as `dist-train status --json` tells it
    left: float | None  # seconds to its end
    curves: dict[str, Curve]  # by the names of metrics
    ranks: str  # which of several is the slowest, or what they wait for
    troubles: list[str]

    @property
    def share(self) -> float:
        """Of its steps that are done, from 0 to 1."""
        step, total = self.status.get("step"), self.status.get("total_steps")
        return step / total if isinstance(step, int) and isinstance(total, int) and total else 0.0


def look(run: dict[str, Any], followed: Followed) -> Seen:
    """A run of `statuses` as it is now; of its history what was added since the last look is read."""
    folder, rows = Path(run["run"]), followed.look()
    ranks, is_slow = _ranks(run, folder)
    troubles = [*_troubles(run, folder, rows), *([ranks] if is_slow else [])]
    return Seen(run, _left(run, rows), _curves(rows), ranks, troubles)


ORDER = ("running", "lost", "failed", "interrupted", "unknown", "completed")


def statuses(runs: list[Path]) -> list[dict[str, Any]]:
    """The status of each run, those that go on or need somebody first; of several, the newest first."""
    rows = collect(runs, ask_slurm=False)
    places = {state: place for place, state in enumerate(ORDER)}
    return sorted(
        rows,
        key=lambda row: (
            places.get(row["state"], places["unknown"]),
            -_changed(Path(row["run"]) / "status.json"),
        ),
    )


def _left(run: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Seconds to the end, at the speed of the last row."""
    row = next((row for row in reversed(rows) if row.get("perf/seconds_left") is not None), None)
    total = run.get("total_steps") or 0
    if run["state"] != "running" or row is None or row["step"] >= total:
        return None
    steps = total - max(run.get("step") or 0, row["step"])
    return float(row["perf/seconds_left"]) * steps / (total - row["step"])


def _curves(rows: list[dict[str, Any]]) -> dict[str, Curve]:
    """Of each metric its values that are finite numbers."""
    curves: dict[str, Curve] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("train/", "eval/", "lr")) and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def _ranks(run: dict[str, Any], folder: Path) -> tuple[str, bool]:
    """What ranks.json tells of a run that goes on, in words; and whether one rank holds up the others."""
    file = folder / "ranks.json"
    if run["state"] != "running" or _changed(folder / "lock") - _changed(file) > STALLED_SECONDS:
        return "", False
    # Where the file is damaged, nothing is told.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        return _pace(json.loads(file.read_text(encoding="utf-8")))
    return "", False


def _pace(told: dict[str, Any]) -> tuple[str, bool]:
    if not told.get("steps"):
        return str(told.get("last", "")), False
    named, median = told["slowest"], told["seconds"]
    own, data = (f"{named[name] * 1000:.3g}" for name in ("seconds", "data"))
    text = (
        f"slowest: rank {named['rank']} on {named['host']}, {own} ms a step of its own, {data} of them"
        f" for data; the median rank has {median * 1000:.3g}"
    )
    return text, named["seconds"] > SLOW * median + SLOW_SECONDS


def _troubles(run: dict[str, Any], folder: Path, rows: list[dict[str, Any]]) -> Iterator[str]:
    """What somebody may want to know of, the worst first."""
    state, reason = run["state"], str(run.get("reason") or "").strip()
    if state in ("failed", "interrupted"):
        yield f"{state}: {reason}" if reason else state
    if state == "lost":
        yield str(run.get("trouble"))
    silent = _changed(folder / "lock") - _changed(folder / "status.json")
    if state == "running" and silent > STALLED_SECONDS:
        yield f"stalled: its process lives, but the loop has told nothing for {clock(silent)}"
    last = next((row for row in reversed(rows) if "train/loss" in row), {"train/loss": 0})
    if last["train/loss"] is None:
        yield f"train/loss is not finite at step {last['step']:,}"
    if skipped := run.get("skipped_steps"):
        yield f"{counted(skipped, 'step')} skipped: not finite"
    if bad := run.get("bad_samples"):
        yield f"{counted(bad, 'sample')} could not be read"
    if run.get("attempts", 1) > 1:
        yield f"attempt {run['attempts']}, {counted(run.get('lost_steps', 0), 'step')} done again"
    if run.get("trouble") and state != "lost":
        yield str(run["trouble"]).strip().splitlines()[-1]


def _changed(path: Path) -> float:
    """When a file was written last, by the clock of the disk's server; -inf where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return -math.inf
