"""What Weights & Biases is given of a run: each step once, whatever attempts have done again.

A step of W&B is an optimizer step. W&B takes none that is not above the last one it has, and an attempt that
goes on learns from it which one that is; redone steps have the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dist_train.record.history import read_metrics, read_status

Row = Mapping[str, Any]


class Sent:
    """A run of W&B, which gets each step once, all rows of it together.

    Args:
        run: as wandb.init gives it.
        after: the last step that is not to be sent.
    """

    def __init__(self, run: Any, after: int) -> None:
        self.run, self.last = run, after
        self._step, self._values = 0, dict[str, Any]()

    def needs(self, step: int) -> bool:
        """Whether W&B doesn't have this step yet."""
        return step > self.last

    def row(self, row: Row, more: bool = False) -> None:
        """Sends a row of metrics.jsonl, unless `more` of its step is to come; an evaluation ends a step."""
        self.add(row["step"], without_kind(row))
        if not more or row["kind"] == "eval":
            self.flush()

    def add(self, step: int, values: Row) -> None:
        """Sends values of a step together with those that are added to it next.

        A step before the one that waits takes that back: a later attempt does it again, and sends it then.
        """
        if step > self._step:
            self.flush()
        elif step < self._step:
            self._values = {}
        self._step = step
        if self.needs(step):
            self._values |= values

    def flush(self) -> None:
        """Sends the step that waits."""
        if self._values:
            self.run.log(self._values, step=self._step, commit=True)
            self.last = self._step
        self._values = {}


def by_step(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows of a run as W&B gets them: of each step one, in the order of steps."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(without_kind(row))
    return [steps[step] for step in sorted(steps)]


def without_kind(row: Row) -> dict[str, Any]:
    """A row without its kind: those of a step are one for W&B."""
    return {name: value for name, value in row.items() if name != "kind"}


def summary(folder: Path) -> dict[str, Any]:
    """What W&B tells of a whole run beside the last values: the best evaluation, and where the time went.

    `define_metric` with min or max would know the best of this attempt only.
    """
    status = read_status(folder)
    found = {name: status.get(name) for name in ("goodput", "attempts", "lost_steps")}
    seconds = status.get("seconds") or {}
    found |= {f"seconds/{name}": value for name, value in seconds.items() if name != "total"}
    for metric, value in (status.get("best") or {}).items():
        rows = (row for row in read_metrics(folder) if row.get("kind") == "eval" and row.get(metric) == value)
        found |= best(next(rows, {}))
    return found


def best(row: Row) -> dict[str, Any]:
    """An evaluation as that of the best checkpoint: `best/accuracy`, `best/step`, ..."""
    names = (name for name in row if name == "step" or name.startswith("eval/"))
    return {f"best/{name.removeprefix('eval/')}": row[name] for name in names}
