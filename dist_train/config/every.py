"""Intervals and lengths of time as a configuration writes them: `500`, `2 epochs`, `3h50m`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Every:
    """An interval such as `500`, `2 epochs, 10 minutes` or `never`: whichever comes first is due."""

    steps: int = 0
    epochs: int = 0
    seconds: float = 0.0
    auto: bool = False

    @classmethod
    def parse(cls, text: int | str) -> Every:
        """Raises ValueError with the grammar for what is no interval."""
        units = {
            "": "steps",
            "step": "steps",
            "epoch": "epochs",
            "second": "seconds",
            "minute": "minutes",
            "hour": "hours",
        }
        scale = {"seconds": 1, "minutes": 60, "hours": 3600}
        if str(text).strip() == "auto":
            return cls(auto=True)
        found: dict[str, Any] = {}
        for part in str(text).split(","):
            match = re.fullmatch(r"\s*(?:(\d+)\s*)?([a-z]*?)s?\s*", part)
            if part.strip() in ("never", "0"):
                continue
            if not match or match[2] not in units or not (match[1] or match[2]):
                raise ValueError("is written as 500, '2 epochs', '10 minutes' or never")
            unit, count = units[match[2]], int(match[1] or 1)
            found["seconds" if unit in scale else unit] = count * scale.get(unit, 1)
        return cls(**found)

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether `step` (optimizer steps done so far) ends an interval of steps or epochs."""
        return bool(
            (self.steps and step % self.steps == 0)
            or (self.epochs and step % (self.epochs * steps_per_epoch) == 0)
        )

    def in_steps(self, steps_per_epoch: int) -> int:
        """The interval as a length in steps."""
        return self.steps + self.epochs * steps_per_epoch


def parse_seconds(text: str) -> float:
    """The seconds in `3h50m`, `90 s`, `1d` or `2 hours`. Raises ValueError with the grammar."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(d|h|m|s)[a-z]*\s*", str(text))
    total = sum(float(number) * units[unit] for number, unit in parts)
    if not total or re.sub(r"(\d+(?:\.\d+)?)\s*(d|h|m|s)[a-z]*\s*", "", str(text)):
        raise ValueError("is written as 3h50m, 45m or '90 s'")
    return total
