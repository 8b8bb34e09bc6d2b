"""Loading a configuration: files and overrides merged from left to right, every mistake one sentence.

A message names the file or the argument, the full key, what is wrong, and the nearest right key.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_train.config.errors import UserError, nearest
from dist_train.config.schema import Config, Every, all_keys, each_field, get, parse_seconds


def load(paths: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """The configuration from YAML files and `key=value` arguments, later ones winning.

    Raises UserError for whatever is wrong with any of them.
    """
    files = [Path(path) for path in paths]
    name = files[0].stem if files else "run"
    return _load([(_read_yaml(file), str(file)) for file in files], overrides, name)


def load_words(words: Iterable[str]) -> Config:
    """The configuration from the words of a command line: files are those without a `=`, in any place."""
    words = list(words)
    return load([word for word in words if "=" not in word], [word for word in words if "=" in word])


def from_mapping(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """The configuration from nested dicts, as `fit` takes them and a checkpoint holds them."""
    return _load([(OmegaConf.create(dict(values)), "config")], overrides, "run")


def _load(sources: list[tuple[DictConfig, str]], overrides: Iterable[str], name: str) -> Config:
    config = OmegaConf.structured(Config)
    origin: dict[str, str] = {}  # full key -> the file or argument that set it last
    for values, where in sources:
        config = _merge(config, values, where, origin)
    for argument in overrides:
        config = _merge(config, _read_override(argument), f"argument '{argument}'", origin)
    config.run.name = config.run.name or name
    return _finish(config, origin)


def to_mapping(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts of plain values."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load` reads back to the same."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        raise UserError(f"{path}: no such config file{near}.") from None
    except OSError as error:
        raise UserError(f"{path}: the config file can't be read: {error.strerror}.") from None
    except Exception as error:  # YAML's own error classes, UnicodeDecodeError, OmegaConf's
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: not valid YAML{line}: {reason}.") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: a config file holds `key: value` lines, this one holds a list or text.")
    return loaded


def _read_override(argument: str) -> DictConfig:
    key, equals, text = argument.partition("=")
    if not equals or not key.strip():
        raise UserError(f"argument '{argument}': write it as key=value, as in optim.lr=0.1.")
    try:
        if _is_text(key) and text not in ("", "~", "null") and text[0] not in "'\"":
            update = OmegaConf.create()
            OmegaConf.update(update, key, text)  # as it is: run.name=001 is no number
            return update
        return OmegaConf.from_dotlist([argument])
    except Exception as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"argument '{argument}': the value can't be read: {reason}.") from None


def _is_text(key: str) -> bool:
    """Whether the value of a full key is text and nothing else."""
    *sections, name = key.split(".")
    schema: Any = Config
    for section in sections:
        schema = get_type_hints(schema).get(section) if is_dataclass(schema) else None
    hint = get_type_hints(schema).get(name) if is_dataclass(schema) else None
    return hint in (str, str | None)


def _merge(config: DictConfig, update: DictConfig, where: str, origin: dict[str, str]) -> DictConfig:
    """`config` with `update` on top; each key of `update` is first held against the dataclasses."""
    values = OmegaConf.to_container(update, resolve=False)
    assert isinstance(values, dict)
    for key, value, hint in _leaves(values, Config, "", where):
        origin[key] = where
        _check_type(value, hint, key, where)
    try:
        return OmegaConf.merge(config, update)  # type: ignore[return-value]
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None) or ""
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: {f'{key}: ' if key else ''}{reason}.") from None


def _leaves(values: dict[Any, Any], schema: type, prefix: str, where: str) -> Iterator[tuple[str, Any, Any]]:
    """(full key, value, type hint) of each value that is no section; unknown keys raise UserError."""
    hints = get_type_hints(schema)
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
            yield from _leaves(value, hint, f"{key}.", where)
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


def _check_type(value: Any, hint: Any, key: str, where: str) -> None:
    if isinstance(value, str) and "${" in value:
        return  # an interpolation: its value is checked once it is resolved
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain = tuple(get_origin(item) or item for item in options)
    if value is None and type(None) in plain:
        return
    if any(_fits(value, item) for item in plain if item is not type(None)):
        inner = get_args(next((item for item in options if get_origin(item) is list), list))
        for position, item in enumerate(value if isinstance(value, list) and inner else ()):
            _check_type(item, inner[0], f"{key}[{position}]", where)
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


def _finish(config: DictConfig, origin: dict[str, str]) -> Config:
    try:
        OmegaConf.resolve(config)
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        reason = str(error).splitlines()[0]
        raise UserError(f"{origin.get(key, 'config')}: '{key}': {reason}.") from None
    assert isinstance(result, Config)
    _check_values(result, origin)
    return result


POSITIVE = (
    "train.batch_size",
    "train.epochs",
    "train.steps",
    "train.accumulate",
    "log.every",
    "checkpoint.keep",
    "eval.batch_size",
    "threads",
    "timeout_seconds",
    "data.prefetch",
    "max_skips",
)


def _check_values(config: Config, origin: dict[str, str]) -> None:
    """What types can't tell: choices, ranges, and keys that belong together."""

    def refuse(key: str, why: str) -> None:
        raise UserError(f"{origin.get(key, 'config')}: '{key}' {why}.")

    for key, item, value in each_field(config):
        choices = item.metadata.get("choices")
        if choices and value not in choices:
            refuse(
                key,
                f"can't be {value!r}; choose one of {', '.join(choices)}{nearest(str(value), choices)}",
            )

    def at_least(key: str, least: float) -> None:
        value = get(config, key)
        if value is not None and not value >= least:
            refuse(key, f"must be at least {least}, not {value}")

    for key in POSITIVE:
        at_least(key, 1)
    for key in ("seed", "data.workers", "train.clip_norm", "optim.lr", "watchdog_seconds"):
        at_least(key, 0)
    for key in ("train.ema", "data.eval_fraction"):
        at_least(key, 0)
        if get(config, key) >= 1:
            refuse(key, f"must be below 1, not {get(config, key)}")
    if config.seed >= 2**63:
        refuse("seed", "must be below 2**63")
    if not config.train.epochs and not config.train.steps:
        refuse("train.epochs", "is missing: give the length of the run here or in 'train.steps'")
    if config.train.epochs and config.train.steps:
        refuse(
            "train.steps",
            "and 'train.epochs' are both set; give one of them, and null for the other",
        )
    if len(config.data.mean) != len(config.data.std):
        refuse("data.std", "and 'data.mean' must have the same number of values, one for each channel")
    if any(not value > 0 for value in config.data.std):
        refuse("data.std", "must hold positive numbers")
    name = config.run.name
    if Path(name).is_absolute() or ".." in Path(name).parts or not name.strip():
        refuse("run.name", f"must be a folder's name inside run.dir, not {name!r}")
    for key in ("eval.every", "checkpoint.every", "schedule.warmup"):
        try:
            every = Every.parse(get(config, key))
        except ValueError as error:
            refuse(key, str(error))
        if key != "checkpoint.every" and (every.seconds or every.auto):
            refuse(key, "counts in steps or epochs: time differs from run to run")
    if config.stop_after is not None:
        try:
            parse_seconds(config.stop_after)
        except ValueError as error:
            refuse("stop_after", str(error))
    best = config.checkpoint.best
    if best not in ("", "none") and not re.fullmatch(r"(max|min) eval/\S+", best):
        refuse("checkpoint.best", f"is written as 'max eval/accuracy' or 'min eval/loss', not {best!r}")
