"""How two configurations differ, and whether a run may go on with what has changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dist_train.config.schema import Config, each_key


@dataclass(frozen=True)
class Change:
    """A full key whose value differs."""

    key: str
    old: Any
    new: Any

    @property
    def is_allowed(self) -> bool:
        """Whether the steps done so far mean the same with the new value; longer training is so, too."""
        return any(key == self.key and rule.may_change for key, rule, _ in each_key(Config()))

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    """Each value that differs between two configurations, as nested dicts; arguments count as one."""
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict) and name != "args":
            yield from changes(before, after, f"{prefix}{name}.")
        elif before != after:
            yield Change(f"{prefix}{name}", before, after)
