"""When a run ends before its last step: rules such as `eval/loss not better for 5 evaluations`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NUMBER = r"(-?\d+(?:\.\d*)?(?:e[+-]?\d+)?)"
NOT_BETTER = re.compile(rf"(?:(min|max) )?(eval/\S+) not better(?: by {NUMBER})? for (\d+) evaluations?")
BOUND = re.compile(rf"(eval/\S+) (above|below) {NUMBER}")


@dataclass(frozen=True)
class StopWhen:
    """A rule, which is a function of the values that a metric had in all evaluations so far."""

    metric: str
    sign: int  # of better values, and of those beyond the bound: 1 or -1
    count: int = 0  # evaluations without a better value; 0: there is a bound instead
    by: float = 0.0  # what is better is so by more than this, or lies beyond this bound

    @classmethod
    def parse(cls, text: str, best: str = "") -> list[StopWhen]:
        """The rules in a text, between commas. Raises ValueError with the grammar for what is none.

        Args:
            best: which values are better where a rule doesn't say so, as `max eval/accuracy`.
        """
        rules = []
        for part in filter(None, (" ".join(part.split()) for part in text.split(","))):
            if match := BOUND.fullmatch(part):
                rules.append(cls(match[1], 1 if match[2] == "above" else -1, by=float(match[3])))
            elif (match := NOT_BETTER.fullmatch(part)) and int(match[4]):
                known = {"eval/loss": "min", **dict([best.split(" ")[::-1]] if " " in best else [])}
                direction = match[1] or known.get(match[2])
                if best and not direction:
                    raise ValueError(f"must tell what is better, as `min {part}` or `max {part}`")
                rules.append(
                    cls(match[2], 1 if direction == "max" else -1, int(match[4]), float(match[3] or 0))
                )
            else:
                raise ValueError(
                    "is written as `eval/loss not better for 5 evaluations`, `max eval/accuracy not better by"
                    " 0.001 for 5 evaluations` or `eval/accuracy above 0.9`"
                )
        return rules

    def reached(self, history: Mapping[str, Sequence[float]]) -> str:
        """Why the run ends after these evaluations, or nothing."""
        values = history.get(self.metric, ())
        if not self.count:
            word = "above" if self.sign > 0 else "below"
            is_reached = bool(values) and self.sign * values[-1] > self.sign * self.by
            return f"{self.metric} {values[-1]:.6g} is {word} {self.by:g}" if is_reached else ""
        best, since = best_and_since(values, self.sign, self.by)
        if since < self.count:
            return ""
        evaluations = f"{self.count} evaluation{'' if self.count == 1 else 's'}"
        least = f" by {self.by:g}" if self.by else ""
        return f"{self.metric} was not better than {best:.6g}{least} for {evaluations}"


def best_and_since(values: Sequence[float], sign: int, by: float = 0.0) -> tuple[float, int]:
    """The best of the values, and how many came since that were not better by more than `by`.

    A value that is not a number is never better. `sign` 1: the greatest one is the best, -1: the smallest.
    """
    best, since = math.nan, 0
    for value in values:
        best, since = (value, 0) if is_better(value, best, sign, by) else (best, since + 1)
    return best, since


def is_better(value: float, best: float, sign: int, by: float = 0.0) -> bool:
    """Whether a value is the first number, or better than the best so far by more than `by`."""
    return not math.isnan(value) and (math.isnan(best) or sign * (value - best) > by)
