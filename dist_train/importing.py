"""Importing thousands of modules at once, as torch is, in five sixths of the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing(for_good: bool = True) -> Iterator[None]:
    """Within it Python's collector is off, and what was made until its end is never looked at again.

    Modules are a million objects, and hardly any garbage. The collector would look through all of them again
    and again: half a second while torch is imported, some of it in the training, and as much at the end.

    Args:
        for_good: false in a program of someone else, whose garbage is to be found later on.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        if was_on:
            gc.enable()
