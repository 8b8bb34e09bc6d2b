"""`dist-train status`: what has become of runs, from their status.json, their locks, and SLURM."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.cluster import slurm
from dist_train.config import UserError, printable
from dist_train.guard import lock
from dist_train.record.history import read_status

HEADINGS = ("run", "state", "step", "last", "best", "samples/s", "goodput", "job", "last trouble")
RIGHT = ("step", "best", "samples/s", "goodput")
GAP = "   "
COLUMNS = (
    "run", "state", "step", "total_steps", "attempts", "processes", "host", "slurm_job", "slurm_state",
    "samples_per_second", "goodput", "lost_steps", "skipped_steps", "bad_samples", "reason", "trouble",
    "best_metric", "best",
)  # fmt: skip
LEAST_TROUBLE = 20  # characters of the last column that are shown in any case


def collect(runs: Sequence[Path], top: Path = Path("runs"), ask_slurm: bool = True) -> list[dict[str, Any]]:
    """One dict for each run: what status.json holds, `run`, `slurm_state`, and a `state` that may be lost.

    Args:
        runs: folders of runs, or folders that hold such; none: all under `top`.
        ask_slurm: whether to ask its queue for the states of their jobs.

    Raises UserError for a folder that is no run and holds none.
    """
    folders: list[Path] = []
    for path in runs:
        if not (found := _runs(path)):
            raise UserError(f"{path}: there is no such run.")
        folders += found
    rows = [_row(folder) for folder in (folders if runs else _runs(top))]
    jobs = slurm.states([str(row["slurm_job"]) for row in rows if ask_slurm and row.get("slurm_job")])
    return [{**row, "slurm_state": jobs.get(str(row.get("slurm_job")))} for row in rows]


def show(rows: Sequence[dict[str, Any]], keys: Sequence[str] = ()) -> None:
    """Prints the table, with a column for each of the keys that were asked for."""
    keys = [key for key in keys if key not in HEADINGS]
    headings = [*HEADINGS[:-1], *keys, HEADINGS[-1]]
    table = [headings, *(_cells(row, keys) for row in rows)]
    right = [name in RIGHT or name in keys for name in headings]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    # The last column gets what the others leave, and is cut there: --json tells all.
    # Piped output is not cut to the width of a terminal that isn't there.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    left = width - sum(widths[:-1]) - len(GAP) * len(widths[:-1])
    widths[-1] = most = min(widths[-1], max(LEAST_TROUBLE, left))
    table.insert(1, ["-" * width for width in widths])
    for *cells, trouble in table:
        cells.append(trouble if len(trouble) <= most else f"{trouble[: most - 1]}…")
        columns = zip(cells, widths, right, strict=True)
        line = GAP.join(
            cell.rjust(width) if at_right else cell.ljust(width) for cell, width, at_right in columns
        )
        print(line.rstrip())


def as_json(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as one JSON list."""
    return json.dumps(rows, indent=2)


def as_csv(rows: Sequence[dict[str, Any]], keys: Sequence[str] = ()) -> str:
    """The rows as CSV: what status.json holds in single values, the last metrics, the keys asked for."""
    metrics = sorted({name for row in rows for name in row.get("metrics") or {}})
    columns = [*COLUMNS, *(name for name in (*metrics, *keys) if name not in COLUMNS)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(columns)), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        best = next(iter((row.get("best") or {}).items()), ("", None))
        named = {"best": best[1], "best_metric": best[0]}
        writer.writerow({**row, **(row.get("metrics") or {}), **row.get("asked", {}), **named})
    return text.getvalue()


def _runs(path: Path) -> list[Path]:
    """`path` itself if it is a run, else the runs in it, down to folders of folders, by name."""
    if (path / "status.json").exists():
        return [path]
    return sorted({status.parent for depth in ("*", "*/*") for status in path.glob(f"{depth}/status.json")})


def _row(folder: Path) -> dict[str, Any]:
    status = read_status(folder)
    own = {"run": str(folder), "state": status.get("state") or "unknown"}
    row = own | status | own
    lost = row["state"] == "running" and _lost(folder, status)
    if lost:
        row |= {"state": "lost", "trouble": lost}
    return row


def _lost(folder: Path, status: dict[str, Any]) -> str:
    """Why a run that says it is running does not, or an empty text."""
    holder, age = status, 0.0
    with contextlib.suppress(OSError):
        age = time.time() - (folder / "lock").stat().st_mtime
        holder = {**status, **(lock.read(folder / "lock") or {})}
    if lock.is_gone(holder):
        stacks = f"; its stacks are in {folder}/stacks" if _has_stacks(folder) else ""
        return f"process {holder.get('pid')} on {holder.get('host')} is gone{stacks}"
    if age > lock.STALE_SECONDS:
        return f"no sign of life from {holder.get('host') or 'its process'} for {age:,.0f} s"
    return ""


def _has_stacks(folder: Path) -> bool:
    """Whether the last attempt ended by writing its stacks: holding the GIL, it could tell nothing."""
    with contextlib.suppress(OSError):
        held = [path.stat() for path in (folder / "stacks").glob("rank-*-gil.txt")]
        renewed = (folder / "lock").stat().st_mtime
        return any(file.st_size and file.st_mtime >= renewed for file in held)
    return False


def _cells(row: dict[str, Any], keys: Sequence[str]) -> list[str]:
    step, total = row.get("step"), row.get("total_steps")
    speed, goodput = row.get("samples_per_second"), row.get("goodput")
    reason = row.get("reason") if row["state"] in ("failed", "interrupted", "completed") else ""
    trouble = str(reason or row.get("trouble") or "").strip().splitlines()
    cells = [
        row["run"],
        row["state"],
        f"{step:,}/{total:,}" if isinstance(step, int) and isinstance(total, int) else "-",
        *_metrics(row),
        f"{speed:,.0f}" if isinstance(speed, (int, float)) else "-",
        f"{goodput:.1%}" if isinstance(goodput, (int, float)) else "-",
        " ".join(filter(None, [str(row.get("slurm_job") or ""), row.get("slurm_state")])) or "-",
        *(_shown(row["asked"].get(key, "-")) for key in keys),
        trouble[-1] if trouble else "",
    ]
    return [printable(str(cell)) for cell in cells]


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return " ".join(value.split()) if isinstance(value, str) else text


def _metrics(row: dict[str, Any]) -> list[str]:
    """The metric that chooses the best checkpoint, else the first one: its last value, and its best."""
    last, best = row.get("metrics") or {}, row.get("best") or {}
    name = next(iter(best or last), "")
    values = [each.get(name) for each in (last, best)]
    shown = [f"{value:.4g}" if isinstance(value, float) else "-" for value in values]
    return [f"{name.removeprefix('eval/')} {shown[0]}" if name else "-", shown[1]]
