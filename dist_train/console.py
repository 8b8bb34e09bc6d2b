"""What a command prints, and who prints it: rank 0, also before the ranks have met."""

from __future__ import annotations

import os
import sys

from dist_train.cluster import slurm
from dist_train.config import printable


def say(text: str) -> None:
    """Prints a line to stderr, from rank 0."""
    if is_main():
        print(printable(text), file=sys.stderr)


def is_main() -> bool:
    """Whether this is rank 0, also before the process group is there."""
    rank = os.environ.get("RANK") or slurm.task(os.environ) or "0"
    return rank == "0"


def flush(fails: bool = True) -> None:
    """Brings out what was printed. Exit code 1 if nobody reads it, as with `head`, or there is no room.

    Args:
        fails: whether that is the exit code; what a training came to does not depend on who reads of it.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again at its end
        if not isinstance(error, BrokenPipeError):
            print(f"dist-train: the output can't be written: {error.strerror}.", file=sys.stderr)
        if fails:
            sys.exit(1)
