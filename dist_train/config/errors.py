"""The two error classes of the project, and words that their sentences are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: one sentence; the command line prints it and exits with 2."""

    everywhere = True  # whether all ranks meet it, so that rank 0 can tell it for all


class RunError(Exception):
    """What ends a run on all ranks and is no bug of the program: one sentence, and exit code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, the known word nearest to `word`, or an empty text."""
    known = list(known)
    folded = {item.lower(): item for item in reversed(known)}
    close = difflib.get_close_matches(word.lower(), list(folded), n=1, cutoff=0.6)
    if not close:  # `lr` is meant as `optim.lr`
        close = [item for item in folded if item.rsplit(".", 1)[-1] == word.lower()][:1]
    return f" (did you mean '{folded[close[0]]}'?)" if close else ""


def printable(text: str) -> str:
    """`text` with what could steer a terminal or hide something (control characters) written as `\\x1b`."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def counted(number: int, name: str) -> str:
    """A number with its noun: `1 process`, `4,690 steps`."""
    return f"{number:,} {name}{'' if number == 1 else 'es' if name.endswith('s') else 's'}"
