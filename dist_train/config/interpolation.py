"""Values such as `${oc.env:TOKEN}`: used resolved, recorded as written, so that no secret gets out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Place = tuple[Any, ...]  # the keys and positions that lead to a value

REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")  # to another key: `${train.batch_size}`


def texts(values: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """(place, text) of each text in nested mappings and lists."""
    if isinstance(values, str):
        yield place, values
    elif isinstance(values, Mapping):
        for name, value in values.items():
            yield from texts(value, (*place, name))
    elif isinstance(values, (list, tuple)):
        for position, value in enumerate(values):
            yield from texts(value, (*place, position))


def is_resolver(text: str) -> bool:
    """Whether a text asks for more than another key's value."""
    return "${" in REFERENCE.sub("", text)


def resolvers(config: DictConfig) -> dict[Place, str]:
    """What is written at each place whose value comes from a resolver, by itself or through references."""
    plain = OmegaConf.to_container(config, resolve=False)
    written = {place: text for place, text in texts(plain) if "${" in text}
    found = {place: text for place, text in written.items() if is_resolver(text)}
    if not found:
        return {}
    for place in found:
        put(plain, place, "???")  # what refers to it can't be resolved now
    blind = OmegaConf.create(plain)
    for place, text in written.items():
        try:
            value = look(blind, place)
            if isinstance(value, (DictConfig, ListConfig)):
                OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException:
            found[place] = text
    return found


def look(values: Any, place: Place) -> Any:
    """The value at a place. Raises LookupError or TypeError if there is none."""
    for name in place:
        values = values[name]
    return values


def put(values: Any, place: Place, value: Any) -> None:
    """Sets the value at a place that is there."""
    look(values, place[:-1])[place[-1]] = value


def unresolved(values: dict[str, Any], written: Mapping[Place, tuple[str, Any]]) -> dict[str, Any]:
    """`values` with what was written put back wherever the value is still what it was resolved to."""
    for place, (text, value) in written.items():
        with contextlib.suppress(LookupError, TypeError):  # replaced meanwhile by something shorter
            if look(values, place) == value:
                put(values, place, text)
    return values
