"""What a key may hold: its type, and what the type can't tell: choices, ranges, keys that belong together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from dist_train.config.errors import UserError, nearest
from dist_train.config.every import Every, parse_seconds
from dist_train.config.schema import Config, all_keys, each_key, get
from dist_train.config.stopping import StopWhen


@cache
def hints_of(schema: type) -> dict[str, Any]:
    """The type of each field of a dataclass, by its name."""
    hints = get_type_hints(schema)
    return {item.name: hints[item.name] for item in fields(schema)}


def leaves(values: dict[Any, Any], schema: type, prefix: str, where: str) -> Iterator[tuple[str, Any, Any]]:
    """(full key, value, type hint) of each value that is no section; unknown keys raise UserError."""
    hints = hints_of(schema)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            known = [f"{prefix}{hint}" for hint in hints]
            near = nearest(key, known) or nearest(str(name), all_keys())
            raise UserError(f"{where}: there is no key '{key}'{near}.")
        hint = hints[name]
        if not isinstance(hint, type) or not is_dataclass(hint):
            yield key, value, hint
        elif isinstance(value, dict):
            yield from leaves(value, hint, f"{key}.", where)
        else:
            inner = ", ".join(f"{key}.{item.name}" for item in fields(hint))
            raise UserError(f"{where}: '{key}' is a section, so it can't be {value!r}; its keys are {inner}.")


NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


def check_type(value: Any, hint: Any, key: str, where: str) -> None:
    """Raises UserError for a value that is not of the type of its key."""
    if isinstance(value, str) and "${" in value:
        return  # an interpolation: its value is checked once it is resolved
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain = tuple(get_origin(item) or item for item in options)
    if value is None and type(None) in plain:
        return
    if any(_fits(value, item) for item in plain if item is not type(None)):
        inner = get_args(next((item for item in options if get_origin(item) is list), list))
        for position, item in enumerate(value if isinstance(value, list) and inner else ()):
            check_type(item, inner[0], f"{key}[{position}]", where)
        return
    wanted = " or ".join(NAMES[item] for item in plain if item is not type(None))
    raise UserError(f"{where}: '{key}' must be {wanted}, not {value!r}.")


def _fits(value: Any, kind: type) -> bool:
    if kind is Any or (value is None and kind is Any):
        return True
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is str:  # YAML reads run.name=001 as a number
        return isinstance(value, (str, int, float, bool))
    return isinstance(value, kind)


NAME_BYTES = 255  # of a file's name, on all common file systems


def check_values(config: Config, origin: Mapping[str, str]) -> None:
    """Raises UserError for what types can't tell: choices, ranges, and keys that belong together.

    Args:
        origin: full key -> the file or argument that set it.
    """
    for objections in (_limits, _lengths, _channels, _paths, _intervals, _groups):
        for key, why in objections(config):
            raise UserError(f"{origin.get(key, 'config')}: '{key}' {why}.")


Objections = Iterator[tuple[str, str]]  # (full key, what is wrong with its value)


def _limits(config: Config) -> Objections:
    for key, rule, value in each_key(config):
        if not rule.allows(value):
            near = nearest(str(value), rule.choices)
            yield key, f"can't be {_shown(config, key)}; choose one of {', '.join(rule.choices)}{near}"
        if rule.least is not None and value is not None and not value >= rule.least:
            yield key, f"must be at least {rule.least}, not {_shown(config, key)}"
        if rule.below is not None and value is not None and not value < rule.below:
            yield key, f"must be below {rule.below}, not {_shown(config, key)}"


def _lengths(config: Config) -> Objections:
    if not config.train.epochs and not config.train.steps:
        yield "train.epochs", "is missing: give the length of the run here or in 'train.steps'"
    if config.train.epochs and config.train.steps:
        yield "train.steps", "and 'train.epochs' are both set; give one of them, and null for the other"
    if config.model.init and config.resume not in ("auto", "never"):
        yield "model.init", "and 'resume' both name what the run begins with; give one of them"


def _channels(config: Config) -> Objections:
    if len(config.data.mean) != len(config.data.std):
        yield "data.std", "and 'data.mean' must have the same number of values, one for each channel"
    if any(not value > 0 for value in config.data.std):
        yield "data.std", "must hold positive numbers"


def _paths(config: Config) -> Objections:
    if not _is_folder(config.run.name):
        name = _shown(config, "run.name")
        name = name if len(name) < 100 else f"{name[:60]}...' of {len(config.run.name)} characters"
        yield "run.name", f"must be a folder's name inside run.dir, not {name}"
    for key in ("run.dir", "data.root", "model.init", "resume", "task.teacher"):
        if "\0" in (get(config, key) or ""):
            yield key, f"must be a path, not {_shown(config, key)}"


def _intervals(config: Config) -> Objections:
    """Intervals, lengths of time, and which checkpoint is the best, each with its way to be written."""
    for key in ("eval.every", "checkpoint.every", "schedule.warmup", "model.freeze_until"):
        if get(config, key) is None:
            continue
        try:
            every = Every.parse(get(config, key))
        except ValueError as error:
            yield key, f"{error}, not {_shown(config, key)}"
        else:
            if key != "checkpoint.every" and (every.seconds or every.auto):
                yield key, "counts in steps or epochs: time differs from run to run"
            elif key == "model.freeze_until" and not every.in_steps(1):
                yield key, f"must be a step or an epoch at least, not {_shown(config, key)}; null: to the end"
    waits = config.train.stop_when or config.schedule.name == "plateau"
    if waits and str(config.eval.every).strip() in ("never", "0"):
        yield "eval.every", "is never: train.stop_when and schedule.name=plateau wait for evaluations"
    if config.model.freeze_until is not None and not config.model.freeze:
        yield "model.freeze_until", "says how long, but 'model.freeze' names nothing to freeze"
    if config.stop_after is not None:
        try:
            parse_seconds(config.stop_after)
        except ValueError as error:
            yield "stop_after", f"{error}, not {_shown(config, 'stop_after')}"
    try:
        StopWhen.parse(config.train.stop_when)
    except ValueError as error:
        yield "train.stop_when", f"{error}, not {_shown(config, 'train.stop_when')}"
    best = config.checkpoint.best
    if best not in ("", "none") and not re.fullmatch(r"(max|min) eval/\S+", best):
        wanted = "is written as 'max eval/accuracy' or 'min eval/loss'"
        yield "checkpoint.best", f"{wanted}, not {_shown(config, 'checkpoint.best')}"


def _groups(config: Config) -> Objections:
    """Groups of weights: each a pattern, and options of which only the rate is known here."""
    for number, group in enumerate(config.optim.groups):
        patterns = group.get("match") if isinstance(group, dict) else None
        patterns = patterns if isinstance(patterns, list) else [patterns]
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            yield "optim.groups", f"has as [{number}] nothing like {{match: head, lr: x0.1}}: {group!r}"
            return
        if "params" in group:
            yield "optim.groups", f"has as [{number}].params what is not yours to set"
        rate = str(group.get("lr", 1))
        if not re.fullmatch(r"x?\d+(\.\d*)?(e[+-]?\d+)?", rate):
            yield "optim.groups", f"has as [{number}].lr neither a number from 0 on nor x0.1, but {rate!r}"


def _shown(config: Config, key: str) -> str:
    """The value as it was written: what a resolver gave may be a secret."""
    text, _ = config.written.get(tuple(key.split(".")), (None, None))
    return repr(get(config, key)) if text is None else repr(text)


def _is_folder(name: str) -> bool:
    """Whether a folder inside another one can have this name; `a/b` is one in a folder of its own."""
    parts = Path(name).parts
    return (
        bool(parts and name.strip())
        and not Path(name).is_absolute()
        and ".." not in parts
        and name.isprintable()  # no line ends, no escape codes, no bytes that are not UTF-8
        and all(len(part.encode()) <= NAME_BYTES for part in parts)
    )
