"""The runs that are compared: their configuration, rows and status, read from a folder or from W&B."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import UserError, nearest
from dist_train.record.history import effective, flat, read_config, read_metrics, read_status

AXES = ("step", "time", "samples", "epoch")
WANDB = "wandb:"


@dataclass(frozen=True)
class Run:
    """What a run has recorded."""

    name: str  # its folder, or wandb:ENTITY/PROJECT/ID
    config: dict[str, Any]  # of the last attempt, by full keys such as optim.lr
    rows: list[dict[str, Any]]  # the effective history, in the order of steps
    status: dict[str, Any]  # as status.json has it

    def curve(self, metric: str, axis: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """x and y of a metric, float64 [N] each; rows in which it is no finite number are left out.

        Args:
            axis: `step`, `time` (seconds), `samples` (a short last batch counts as a whole one) or `epoch`.

        Raises UserError where the run doesn't tell how long an epoch is.
        """
        along = "time" if axis == "time" else "step"
        points = [row for row in self.rows if _is_number(row.get(metric)) and _is_number(row.get(along))]
        x, y = ([row[name] for row in points] for name in (along, metric))
        scale = {"samples": self._batch_size, "epoch": lambda: 1 / self._per_epoch()}.get(axis, lambda: 1)
        return np.array(x, float) * scale(), np.array(y, float)

    @property
    def speed(self) -> float | None:
        """Samples per second, the median of all rows."""
        _, speeds = self.curve("perf/samples_per_second")
        return float(np.median(speeds)) if len(speeds) else self.status.get("samples_per_second")

    @property
    def seconds(self) -> float | None:
        """How long it took, over all attempts."""
        return (self.status.get("seconds") or {}).get("total")

    def metrics(self) -> list[str]:
        """The names of all that was measured, evaluations first."""
        names = {
            name for row in self.rows for name, value in row.items() if "/" in name and _is_number(value)
        }
        return sorted(names, key=lambda name: (not name.startswith("eval/"), name))

    def _batch_size(self) -> float:
        if size := self.config.get("train.batch_size"):
            return float(size)
        raise UserError(f"{self.name}: its configuration has no train.batch_size; use --x step.")

    def _per_epoch(self) -> int:
        """Steps of an epoch: by the length of the run, else by rows, one of which ends an epoch."""
        epochs, total = self.config.get("train.epochs"), self.status.get("total_steps")
        if epochs and total:
            return int(total / epochs)
        if self.rows and self.rows[-1].get("epoch"):
            return max((row["step"] - 1) // (row["epoch"] + 1) + 1 for row in self.rows if "epoch" in row)
        raise UserError(f"{self.name}: its rows don't tell how many steps an epoch has; use --x samples.")


def find(words: Sequence[str]) -> list[Run]:
    """The runs that words name, each once: folders, folders of such, globs, and wandb:ENTITY/PROJECT/ID.

    Raises UserError for a word that names none, and for a run of W&B that can't be read.
    """
    runs: dict[Any, Run] = {}
    for run in (run for word in words for run in _named(word)):
        runs.setdefault(run.name if run.name.startswith(WANDB) else Path(run.name).resolve(), run)
    return list(runs.values())


def _named(word: str) -> Iterator[Run]:
    if word.startswith(WANDB):
        yield read_wandb(word)
        return
    paths = [Path(word)] if Path(word).exists() else [Path(path) for path in sorted(glob.glob(word))]
    if not (folders := [folder for path in paths for folder in _folders(path)]):
        hint = f"; a run in W&B is written {WANDB}{word}" if word.count("/") == 2 and not paths else ""
        raise UserError(f"{word}: there is no such run{hint}.")
    for folder in folders:
        yield read_folder(folder)


def _folders(path: Path) -> list[Path]:
    """`path` itself if it is a run, else the runs in it, down to folders of folders, by name."""
    if any((path / name).exists() for name in ("status.json", "metrics.jsonl")):
        return [path]
    return sorted({status.parent for depth in ("*", "*/*") for status in path.glob(f"{depth}/status.json")})


def read_folder(folder: Path) -> Run:
    """A run of this machine."""
    return Run(str(folder), flat(read_config(folder)), read_metrics(folder), read_status(folder))


def read_wandb(name: str) -> Run:
    """A run of W&B, through its API. Raises UserError for one that can't be read.

    Args:
        name: wandb:ENTITY/PROJECT/ID.
    """
    import wandb

    from dist_train.record.wandb import has_key

    path = name.removeprefix(WANDB)
    if path.count("/") != 2:
        raise UserError(f"{name}: a run in W&B is written {WANDB}ENTITY/PROJECT/ID.")
    if not has_key(wandb):
        raise UserError(f"{name}: W&B knows no API key here; `wandb login` first.")
    try:
        run = wandb.Api().run(path)
        rows = [_plain(row) for row in run.scan_history()]
        summary, config = dict(run.summary), dict(run.config)
    except Exception as error:  # of the network, of the server, of rights: of many classes
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise UserError(f"{name}: W&B can't read it: {reason}.") from None
    seconds = {"total": summary.get("time", summary.get("_runtime"))}
    status = {key: summary.get(key) for key in ("attempts", "goodput", "lost_steps")}
    status |= {"state": run.state, "step": rows[-1]["step"] if rows else None, "seconds": seconds}
    return Run(name, flat(config), effective(rows), status)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row of W&B as metrics.jsonl has it, also of a run that others' programs have logged."""
    ours = {"step": row.get("_step", 0), "time": row.get("_runtime", 0.0), "attempt": 1}
    return ours | {name: value for name, value in row.items() if value is not None}


def choose_metric(runs: Sequence[Run], metric: str) -> tuple[str, bool]:
    """The metric to compare by, and whether more is better.

    Args:
        metric: its name, with `max` or `min` before it where neither the runs nor the name
            tell what is better; empty: the one by which the runs choose their best checkpoint.

    Raises UserError, with the names that there are, for one that no run has.
    """
    direction, _, name = metric.rpartition(" ")
    chosen = [next(iter(run.status.get("best") or {}), "") for run in runs]
    name = name or next((best for best in [*chosen, "eval/loss", "train/loss"] if has(runs, best)), "")
    if direction not in ("", "max", "min"):
        raise UserError(f"--metric: written as 'eval/accuracy' or 'max eval/accuracy', not '{metric}'.")
    if not has(runs, name):
        known = sorted({known for run in runs for known in run.metrics()})
        if not known:
            raise UserError(f"{runs[0].name}: no row of metrics has been written yet.")
        raise UserError(
            f"no run has the metric '{name}'{nearest(name, known)}; there are {', '.join(known)}."
        )
    return name, direction == "max" if direction else _more_is_better(runs, name)


def _more_is_better(runs: Sequence[Run], metric: str) -> bool:
    """By which extreme the runs have called the best, else by the name of the metric."""
    for run in runs:
        best, values = (run.status.get("best") or {}).get(metric), run.curve(metric)[1]
        if len(values) and best in (values.min(), values.max()) and values.min() < values.max():
            return bool(best == values.max())
    return not any(word in metric for word in ("loss", "error", "perplexity", "norm", "seconds", "wait"))


def has(runs: Sequence[Run], metric: str) -> bool:
    """Whether any of the runs has a value of a metric."""
    return any(_is_number(row.get(metric)) for run in runs for row in run.rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
