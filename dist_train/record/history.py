"""Reading what runs have recorded: metrics.jsonl, attempts.jsonl, status.json. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Parse = Callable[[Iterable[bytes]], Iterator[dict[str, Any]]]
Kind = type | tuple[type, ...]
NUMBER = (int, float)
MOST_ATTEMPTS = 100  # of which the first rows are looked for one by one
ATTEMPT: dict[str, Kind] = {"config": dict, "machine": dict}  # what kinds of values an attempt has
STATUS: dict[str, Kind] = {  # what kinds of values status.json has
    **dict.fromkeys(("state", "reason", "trouble", "host"), str),
    **dict.fromkeys(("step", "total_steps", "attempts", "processes"), int),
    **dict.fromkeys(("lost_steps", "skipped_steps", "bad_samples"), int),
    **dict.fromkeys(("samples_per_second", "goodput"), NUMBER),
    **dict.fromkeys(("metrics", "best", "seconds"), dict),
}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; what a kill cut short is left out."""
    yield from _parsed(_lines(path))


def read_status(folder: Path) -> dict[str, Any]:
    """status.json of a run, or an empty dict; values of another kind than runs write are left out."""
    try:
        found = _loaded((folder / "status.json").read_bytes())
    except OSError:
        return {}
    if not isinstance(found, dict):
        return {}
    kept = _fitting(found, STATUS)
    groups = {
        key: _fitting(kept[key], dict.fromkeys(kept[key], NUMBER))
        for key, kind in STATUS.items()
        if kind is dict and kept.get(key)
    }
    return kept | groups


def _fitting(values: dict[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Those that are of the kind that is known of them, if one is; a number may be missing, as null."""
    return {
        key: value
        for key, value in values.items()
        if (kind := kinds.get(key)) is None or isinstance(value, kind) or (value is None and kind == NUMBER)
    }


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """The attempts of a run: of each its number, the `step` it began after, `processes` and `config`."""
    return [_fitting(attempt, ATTEMPT) for attempt in _rows(_lines(folder / "attempts.jsonl"))]


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run's last attempt, as nested dicts; empty where none is recorded."""
    for lines in _from_end(folder / "attempts.jsonl", _parsed):
        if lines:
            config = lines[-1].get("config")
            return config if isinstance(config, dict) else {}
    return {}


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by full keys; empty ones are left out."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """All rows of metrics of a run, as they were written, also those that a later attempt took back."""
    yield from _rows(_lines(folder / "metrics.jsonl"))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The effective history of a run: of each step the values of the last attempt, in the order of steps.

    Rows that a later attempt took back, because it went on from an earlier step, are left out.
    """
    return effective(read_rows(folder))


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
            effective(map(self._kept, _rows(lines.split(b"\n"))), self.rows)
        return self.rows

    def _kept(self, row: dict[str, Any]) -> dict[str, Any]:
        return {sys.intern(name): row[name] for name in row if name.startswith(self.prefixes)}


def _lines(path: Path) -> list[bytes]:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes().split(b"\n")
    return []


def _parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if isinstance(found := _loaded(line), dict):
            yield found


def _loaded(text: bytes) -> Any:
    """The JSON value of a text, or None: for nothing, and for what a kill has cut or no run has written."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Those that are rows of metrics or attempts; a damaged file may hold others."""
    for row in _parsed(lines):
        if isinstance(row.get("step"), int) and isinstance(row.get("attempt"), int):
            yield row


def read_values(folder: Path, name: str) -> list[float]:
    """The effective values of a metric, in the order of steps, without those that were not finite."""
    try:
        read = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    newest = next((row["attempt"] for row in _rows([read.rstrip().rpartition(b"\n")[2]])), 0)
    begins = [read.find(b'"attempt": %d,' % later) for later in range(2, min(newest, MOST_ATTEMPTS) + 1)]
    if not 1 <= newest <= MOST_ATTEMPTS or -1 in begins:
        lines: Iterable[bytes] = read.split(b"\n")
    else:  # what a later attempt took back is seen from its first row, so others need not be parsed
        word = json.dumps(name).encode()
        places = {*(_line(read, at) for at in begins), *(_line(read, at) for at in _all(word, read))}
        lines = (read[begin:end] for begin, end in sorted(places))
    return [row[name] for row in effective(_rows(lines)) if row.get(name) is not None]


def _all(word: bytes, read: bytes) -> Iterator[int]:
    """Where a word is."""
    at = read.find(word)
    while at >= 0:
        yield at
        at = read.find(word, at + len(word))


def _line(read: bytes, at: int) -> tuple[int, int]:
    """Begin and end of the line around a place."""
    return read.rfind(b"\n", 0, at) + 1, read.find(b"\n", at) + 1 or len(read)


def last_rows(folder: Path, kinds: Collection[str]) -> list[dict[str, Any]]:
    """The last effective rows of a run, back to one of each of these kinds; reads the end of its file."""
    kept: list[dict[str, Any]] = []
    for lines in _from_end(folder / "metrics.jsonl", _rows):
        kept = effective(lines)
        if {*kinds} <= {row.get("kind") for row in kept}:
            break
    return kept


def _from_end(path: Path, parsed: Parse, room: int = 1024) -> Iterator[list[dict[str, Any]]]:
    """What `parsed` makes of the last `room` bytes of a file of lines, then in ever more, at last in all."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while True:
            begin = max(0, size - room)
            file.seek(begin)
            lines = file.read(size - begin).split(b"\n")
            yield list(parsed(lines[begin > 0 :]))  # the first one may be cut
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
