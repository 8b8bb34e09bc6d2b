"""What is written beside each key: what it means, which values it takes, whether it may change on resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OBJECT = "package.module:object"  # among the choices of a key: it takes the name of any object, too


@dataclass(frozen=True)
class Rule:
    """What holds for a key, besides its type; a value of null is bound by none of it."""

    doc: str
    choices: Sequence[str] = ()  # its allowed values, where they are few
    least: float | None = None
    below: float | None = None
    most_from_file: int | None = None  # in a configuration that may come from elsewhere: trust.py
    may_change: bool = False  # when a run goes on: the steps done so far mean the same with another value

    def allows(self, value: Any) -> bool:
        """Whether a value is one of the choices, if there are any."""
        is_object = OBJECT in self.choices and ":" in str(value)
        return not self.choices or is_object or value in self.choices


def option(default: Any, doc: str, **rules: Any) -> Any:
    """A configuration field with its documentation and, by the names of `Rule`, what else holds for it."""
    metadata = {"rule": Rule(doc, **rules)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type, may_change: bool = False) -> Any:
    """A section of the configuration; `may_change` holds for all of its keys."""
    return field(default_factory=cls, metadata={"rule": Rule("", may_change=may_change)})
