"""Checkpoints: how they are found, checked and loaded (stored.py), and how they are written (saver.py).

A sharded one, of which each rank writes its part, is for the others what any other is.
"""

from dist_train.checkpoint.files import Damaged, write_atomically
from dist_train.checkpoint.saver import Checkpoints
from dist_train.checkpoint.stored import (
    FORMAT,
    extra_state,
    find,
    is_linked,
    is_whole,
    load,
    load_weights,
    name_of,
    newest_first,
    newest_good,
    path_of,
    save_weights,
    size_of,
    step_of,
    tell,
    verify,
)

__all__ = [
    "FORMAT",
    "Checkpoints",
    "Damaged",
    "extra_state",
    "find",
    "is_linked",
    "is_whole",
    "load",
    "load_weights",
    "name_of",
    "newest_first",
    "newest_good",
    "path_of",
    "save_weights",
    "size_of",
    "step_of",
    "tell",
    "verify",
    "write_atomically",
]
