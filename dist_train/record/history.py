"""Reading what runs have recorded: metrics.jsonl, attempts.jsonl, status.json. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; what a kill cut short is left out."""
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def read_status(folder: Path) -> dict[str, Any]:
    """status.json of a run, or an empty dict."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """The attempts of a run: of each its number, the `step` it began after, `processes` and `config`."""
    return list(read_lines(folder / "attempts.jsonl"))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The effective history of a run: of each step the values of the last attempt, in the order of steps.

    Rows that a later attempt took back, because it went on from an earlier step, are left out.
    """
    rows: list[dict[str, Any]] = []
    for row in read_lines(folder / "metrics.jsonl"):
        while rows and _takes_back(row, rows[-1]):
            rows.pop()
        rows.append(row)
    return rows


def _takes_back(row: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether `row` is of a later attempt that has done the step of `before` again.

    An evaluation alone is no step: an attempt may begin with the one that its predecessor did not finish.
    """
    if before["attempt"] >= row["attempt"] or before["step"] < row["step"]:
        return False
    return before["step"] > row["step"] or "train/loss" in row or "train/loss" not in before
