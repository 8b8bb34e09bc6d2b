"""Reading what runs have recorded: metrics.jsonl, attempts.jsonl, status.json. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; what a kill cut short is left out."""
    with contextlib.suppress(FileNotFoundError):
        yield from _parsed(path.read_bytes().split(b"\n"))


def _parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # nothing, or what a kill has cut
            continue


def read_status(folder: Path) -> dict[str, Any]:
    """status.json of a run, or an empty dict."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """The attempts of a run: of each its number, the `step` it began after, `processes` and `config`."""
    return list(read_lines(folder / "attempts.jsonl"))


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run's last attempt, as nested dicts; empty where none is recorded."""
    for lines in _from_end(folder / "attempts.jsonl"):
        if lines:
            return lines[-1].get("config") or {}
    return {}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The effective history of a run: of each step the values of the last attempt, in the order of steps.

    Rows that a later attempt took back, because it went on from an earlier step, are left out.
    """
    return effective(read_lines(folder / "metrics.jsonl"))


def effective(
    rows: Iterable[dict[str, Any]], known: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """`rows`, in the order in which they were written, without those that a later attempt took back.

    Args:
        known: what came of the rows before them; these are added to it.
    """
    kept = [] if known is None else known
    for row in rows:
        while kept and _takes_back(row, kept[-1]):
            kept.pop()
        kept.append(row)
    return kept


class Followed:
    """The effective history of a run that goes on, of which each look reads only what was added.

    Args:
        prefixes: how the names begin of what is kept of each row, beside its kind, step and attempt.
    """

    def __init__(self, folder: Path, prefixes: tuple[str, ...]) -> None:
        self.path, self.prefixes = folder / "metrics.jsonl", ("kind", "step", "attempt", *prefixes)
        self.rows: list[dict[str, Any]] = []
        self._read = 0  # bytes

    def look(self) -> list[dict[str, Any]]:
        """The rows so far."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._read:  # another run has begun there
                self._read = 0
                self.rows.clear()
            file.seek(self._read)
            lines, end, _ = file.read().rpartition(b"\n")  # the last line may be in the making
            self._read += len(lines) + len(end)
            effective(map(self._kept, _parsed(lines.split(b"\n"))), self.rows)
        return self.rows

    def _kept(self, row: dict[str, Any]) -> dict[str, Any]:
        return {sys.intern(name): row[name] for name in row if name.startswith(self.prefixes)}


def read_values(folder: Path, name: str) -> list[float]:
    """The effective values of a metric, in the order of steps, without those that were not finite."""
    try:
        read = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    newest = [row["attempt"] for row in _parsed([read.rstrip().rpartition(b"\n")[2]])]
    # Where none was taken back, other rows need not be parsed.
    lines = _with(json.dumps(name).encode(), read) if newest == [1] else read.split(b"\n")
    return [row[name] for row in effective(_parsed(lines)) if row.get(name) is not None]


def _with(word: bytes, read: bytes) -> Iterator[bytes]:
    """The lines that hold a word."""
    at = read.find(word)
    while at >= 0:
        end = read.find(b"\n", at) + 1 or len(read)
        yield read[read.rfind(b"\n", 0, at) + 1 : end]
        at = read.find(word, end)


def last_rows(folder: Path, kinds: Collection[str]) -> list[dict[str, Any]]:
    """The last effective rows of a run, back to one of each of these kinds; reads the end of its file."""
    kept: list[dict[str, Any]] = []
    for lines in _from_end(folder / "metrics.jsonl"):
        kept = effective(lines)
        if {*kinds} <= {row["kind"] for row in kept}:
            break
    return kept


def _from_end(path: Path, room: int = 1024) -> Iterator[list[dict[str, Any]]]:
    """The JSON objects in the last `room` bytes of a file of lines, then in ever more, at last in all."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while True:
            begin = max(0, size - room)
            file.seek(begin)
            lines = file.read(size - begin).split(b"\n")
            yield list(_parsed(lines[begin > 0 :]))  # the first one may be cut
            if not begin:
                return
            room *= 4


def _takes_back(row: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether `row` is of a later attempt that has done the step of `before` again.

    An evaluation alone is no step: an attempt may begin with the one that its predecessor did not finish.
    """
    if before["attempt"] >= row["attempt"] or before["step"] < row["step"]:
        return False
    return before["step"] > row["step"] or "train/loss" in row or "train/loss" not in before
