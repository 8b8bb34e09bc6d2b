"""Loading a configuration: files and overrides merged from left to right, every mistake one sentence.

A message names the file or the argument, the full key, what is wrong, and the nearest right key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from dist_train.config import interpolation
from dist_train.config.errors import UserError, nearest
from dist_train.config.schema import Config, all_keys
from dist_train.config.values import check_type, check_values, hints_of, leaves

Say = Callable[[str], None]
# What one source sets: values, or the full key that it takes away; and the words that messages call it by.
Part = tuple[DictConfig | str, str]


def load(
    paths: Iterable[str | Path] = (), overrides: Iterable[str] = (), say: Say = lambda text: None
) -> Config:
    """The configuration from YAML files and `key=value` or `~key` arguments, later ones winning.

    Args:
        say: hears of arguments that are dropped because a later source has another name for their object.

    Raises UserError for whatever is wrong with any of them.
    """
    files, overrides = [Path(path) for path in paths], list(overrides)
    for word in (*map(str, files), *overrides):
        if not word.isascii() and re.search("[\udc80-\udcff]", word):  # bytes that could not be decoded
            shown = os.fsencode(word).decode(errors="backslashreplace")
            encoding = sys.getfilesystemencoding()
            raise UserError(f"argument '{shown}': is no text in {encoding}, the encoding of this locale.")
    name = files[0].stem if files else "run"
    sources = [[(_read_yaml(file), str(file))] for file in files]
    return _load([*sources, _read_overrides(overrides)], name, say)


def load_words(words: Iterable[str], say: Say = lambda text: None) -> Config:
    """The configuration from the words of a command line: files are those that are no overrides."""
    words = list(words)
    return load([w for w in words if not is_override(w)], [w for w in words if is_override(w)], say)


def is_override(word: str) -> bool:
    """Whether a word of a command line is `key=value` or `~key`, and no file."""
    return "=" in word or word.startswith("~")


def from_mapping(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """The configuration from nested dicts, as `fit` takes them and a checkpoint holds them."""
    return _load([[(_read_mapping(values), "config")], _read_overrides(overrides)], "run")


def completed(recorded: Mapping[str, Any] | Path) -> dict[str, Any]:
    """A recorded configuration (or its file) with the keys that are new since then; nothing is resolved."""
    values = _read_yaml(recorded) if isinstance(recorded, Path) else _read_mapping(recorded)
    merged, _ = _merged([[(values, "config")]])
    return OmegaConf.to_container(merged, resolve=False)  # type: ignore[return-value]


def _load(sources: Sequence[Sequence[Part]], name: str, say: Say = lambda text: None) -> Config:
    merged, origin = _merged(sources, say)
    if _look(merged, "run.name") in (None, ""):
        merged.run.name = name
    return _finish(merged, origin)


def _merged(
    sources: Sequence[Sequence[Part]], say: Say = lambda text: None
) -> tuple[DictConfig, dict[str, str]]:
    """All sources on top of each other, unresolved; and which file or argument set each key last."""
    config = _defaults().copy()
    origin: dict[str, str] = {}
    for source in sources:
        before = config.copy()
        _make_way(config, source, say)
        for part, where in source:
            if isinstance(part, str):
                _take_away(config, part, before, where)
                origin[part] = where
            else:
                _merge(config, part, where, origin)
    return config, origin


@functools.cache
def _defaults() -> DictConfig:
    """Every key with its default; made once, since that takes half of a load's time."""
    return OmegaConf.structured(Config)


NAMED = ("data", "model", "task", "optim", "schedule")  # sections of a name and its arguments


def _make_way(config: DictConfig, source: Sequence[Part], say: Say) -> None:
    """Takes back what can't stay beside what `source` sets: a former name's arguments, another length."""
    held: Any = OmegaConf.to_container(config, resolve=False)
    for section in NAMED:
        key, old, args = f"{section}.name", held[section]["name"], held[section]["args"]
        names = [(new, where) for values, where in source if (new := _look(values, key)) is not None]
        if names and args and names[-1][0] != old:
            new, where = names[-1]
            config[section].args = {}
            shown = ", ".join(map(str, args)) if isinstance(args, dict) else args
            say(f"{where}: {key} is '{new}' now: the arguments of '{old}' are dropped ({shown}).")
    lengths = ("epochs", "steps")
    given = [
        name for name in lengths if any(_look(values, f"train.{name}") is not None for values, _ in source)
    ]
    if len(given) == 1:
        config.train["steps" if given == ["epochs"] else "epochs"] = None


def _look(values: DictConfig | str, key: str) -> Any:
    """The unresolved value of a full key in what a source sets, or None."""
    try:
        return interpolation.look(OmegaConf.to_container(values, resolve=False), tuple(key.split(".")))
    except (LookupError, TypeError, ValueError):
        return None


def _take_away(config: DictConfig, key: str, before: DictConfig, where: str) -> None:
    """Gives a key its default again; one that has none, an argument, is deleted."""
    defaults = _defaults()
    place = tuple(key.split("."))
    *above, name = place
    try:
        interpolation.put(config, place, interpolation.look(defaults, place))
        return
    except (LookupError, OmegaConfBaseException):
        pass  # none of ours
    known = [*all_keys()]
    for values in (config, before):  # one that made way for another name is as good as deleted
        plain = OmegaConf.to_container(values, resolve=False)
        args = [".".join(map(str, item)) for item in _places(plain) if "args" in item]
        if key in args:
            if values is config:
                del interpolation.look(config, tuple(above))[name]
            return
        known += args
    raise UserError(f"{where}: there is no key '{key}' to take away{nearest(key, known)}.")


def _places(values: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where there is something in nested dicts."""
    for name, value in values.items() if isinstance(values, dict) else ():
        yield (*place, str(name))
        yield from _places(value, (*place, str(name)))


def to_mapping(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts of plain values, as it is recorded: see interpolation.py."""
    return interpolation.unresolved(dataclasses.asdict(config), config.written)


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load` reads back to the same."""
    return OmegaConf.to_yaml(OmegaConf.create(to_mapping(config)))


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


def _read_mapping(values: Mapping[str, Any]) -> DictConfig:
    try:
        return OmegaConf.create(dict(values))
    except (OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"config: {str(error).splitlines()[0]}.") from None


def _read_overrides(arguments: Iterable[str]) -> list[Part]:
    return [
        (argument[1:] if argument.startswith("~") else _read_override(argument), f"argument '{argument}'")
        for argument in arguments
    ]


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
        schema = hints_of(schema).get(section) if _is_section(schema) else None
    hint = hints_of(schema).get(name) if _is_section(schema) else None
    return hint in (str, str | None)


def _is_section(schema: Any) -> bool:
    return isinstance(schema, type) and is_dataclass(schema)


def _merge(config: DictConfig, update: DictConfig, where: str, origin: dict[str, str]) -> None:
    """Lays `update` on top of `config`; each key of `update` is first held against the dataclasses."""
    values = OmegaConf.to_container(update, resolve=False)
    assert isinstance(values, dict)
    for key, value, hint in leaves(values, Config, "", where):
        origin[key] = where
        check_type(value, hint, key, where)
        _clear(config, tuple(key.split(".")), value)
    try:
        config.merge_with(update)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None) or ""
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: {f'{key}: ' if key else ''}{reason}.") from None


def _clear(config: DictConfig, place: interpolation.Place, value: Any) -> None:
    """Empties each mapping that `value` says is empty: a merge would leave it as it was."""
    if value == {}:
        with contextlib.suppress(LookupError, TypeError):
            interpolation.put(config, place, {})
    for name, item in value.items() if isinstance(value, dict) else ():
        _clear(config, (*place, name), item)


def _finish(config: DictConfig, origin: dict[str, str]) -> Config:
    written = interpolation.resolvers(config)
    try:
        OmegaConf.resolve(config)
        result = OmegaConf.to_object(config)
    except (OmegaConfBaseException, RecursionError) as error:
        key = str(getattr(error, "full_key", None) or "")
        reason = str(error).splitlines()[0]
        place = tuple(key.partition("[")[0].split("."))
        secret = next((text for where, text in written.items() if where[: len(place)] == place), None)
        if secret and isinstance(error, ValidationError):  # the reason shows the value
            reason = f"what {secret!r} stands for does not fit"
        raise UserError(f"{origin.get(key, 'config')}: '{key}': {reason}.") from None
    assert isinstance(result, Config)
    plain = dataclasses.asdict(result)
    result.written = {place: (text, interpolation.look(plain, place)) for place, text in written.items()}
    check_values(result, origin)
    return result
