"""Keys and metrics by which runs are chosen and sorted, as `optim.lr=0.1` and `-eval/accuracy`. No torch.

A key is one of the configuration (`optim.lr`), of status.json (`state`, `goodput`, `seconds.lost`) or of
metrics.jsonl: `eval/loss` is the last value, `eval/loss.min` and `eval/loss.max` are the extremes of the run,
as W&B names them, and `best` is the value by which the best checkpoint was chosen.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dist_train.config import UserError, nearest
from dist_train.record.history import flat, last_rows, read_config, read_values

Run = dict[str, Any]  # what status.json holds, `run`, and under `asked` the values of the keys asked for
OF_ROWS = ("epoch", "time", "lr")  # what rows hold besides names with a slash
EXTREMES: dict[str, Callable[[Iterable[float]], float]] = {".min": min, ".max": max}
SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


class Comparison(NamedTuple):
    """`optim.lr>=0.1`: what a run must meet."""

    key: str
    sign: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> Comparison:
        """From its text. Raises UserError for anything else."""
        found = re.fullmatch(r"([^=<>!\s]+)\s*(==|!=|<=|>=|=|<|>)\s*(.*)", text.strip())
        if not found:
            raise UserError(f"--where '{text}': write it as KEY=VALUE, with =, !=, <, <=, > or >=.")
        key, sign, value = found[1], found[2], _parsed(found[3])
        if sign[0] in "<>" and not _is_number(value):
            raise UserError(f"--where '{text}': {sign} compares numbers, and '{found[3]}' is none.")
        return cls(key, sign, value)

    def holds(self, asked: Mapping[str, Any]) -> bool:
        """Whether a run with these values meets it; one that has no value is only unlike others (`!=`)."""
        if self.key not in asked:
            return self.sign == "!="
        value = asked[self.key]
        if self.sign[0] in "<>":
            return _is_number(value) and SIGNS[self.sign](value, self.value)
        if isinstance(value, str) and not isinstance(self.value, str):  # run.name=001 is text there
            return SIGNS[self.sign](_parsed(value), self.value)
        return SIGNS[self.sign](value, self.value)


def answer(runs: Sequence[Run], keys: Iterable[str]) -> list[Run]:
    """The runs, each with `asked`: the values that it has of these keys.

    Raises UserError for a key of which no run has a value.
    """
    keys = list(dict.fromkeys(keys))
    answered = [{**run, "asked": dict(_values(run, keys))} for run in runs]
    for key in keys:
        if runs and not any(key in run["asked"] for run in answered):
            raise UserError(f"status: no run here has '{key}'{nearest(key, _known(runs))}.")
    return answered


def in_order(runs: Sequence[Run], key: str) -> list[Run]:
    """The runs sorted by a key that was asked for, `-KEY` from the greatest down; last those without it."""
    name = key.removeprefix("-")
    having = [run for run in runs if run["asked"].get(name) is not None]
    numbers = all(_is_number(run["asked"][name]) for run in having)
    having.sort(
        key=lambda run: run["asked"][name] if numbers else str(run["asked"][name]),
        reverse=key.startswith("-"),
    )
    return having + [run for run in runs if run["asked"].get(name) is None]


def _values(run: Run, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(key, value) of each key of which a run has a value; reads no more of its files than that takes."""
    folder = Path(run["run"])
    places = [run]
    for key in (key for key in keys if not _is_metric(key)):
        if key == "best" and run.get("best"):
            yield key, next(iter(run["best"].values()))
            continue
        if not any(_look(values, key) for values in places) and len(places) == 1:
            places.append(read_config(folder))
        yield from ((key, value) for values in places for value in _look(values, key)[:1])
    # An evaluation that was never done is not looked for in the whole of a long file.
    metrics = [key for key in keys if _is_metric(key) and (run.get("metrics") or key[:5] != "eval/")]
    last = [key for key in metrics if not key.endswith(tuple(EXTREMES))]
    if last:
        rows = last_rows(folder, {"eval" if key.startswith("eval/") else "train" for key in last})
        yield from {key: row[key] for row in rows for key in last if key in row}.items()
    for key in (key for key in metrics if key not in last):
        if values := read_values(folder, key[:-4]):
            yield key, EXTREMES[key[-4:]](values)


def _look(values: Mapping[str, Any], key: str) -> list[Any]:
    """The value at a full key such as `optim.lr` in nested dicts, or none."""
    found: Any = values
    for name in key.split("."):
        if not isinstance(found, dict) or name not in found:
            return []
        found = found[name]
    return [] if isinstance(found, dict) else [found]


def _is_metric(key: str) -> bool:
    return "/" in key or key in OF_ROWS


def _known(runs: Sequence[Run]) -> list[str]:
    """All keys and metrics that some run has."""
    known: dict[str, None] = {"best": None}
    for run in runs:
        folder = Path(run["run"])
        rows = [*last_rows(folder, {"train"}), run.get("metrics") or {}]
        known |= dict.fromkeys(key for key in (*flat(read_config(folder)), *flat(run)) if not _is_metric(key))
        known |= dict.fromkeys(name for row in rows for name in row if _is_metric(name))
    return list(known)


def _parsed(text: str) -> Any:
    """A value as a configuration file has it: a number, true, null, a list, or text."""
    try:
        return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
