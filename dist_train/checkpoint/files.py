"""Files that are there whole or not at all, and durable; what is damaged has a class of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.config import UserError


class Damaged(UserError):
    """A checkpoint that is truncated, altered, or no checkpoint of ours."""


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes a file that is there whole or not at all, whatever happens, and durable on return."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_output(path: Path, data: bytes) -> None:
    """Writes what a command was asked for: whole or not at all, but into a device or pipe as it comes.

    Raises UserError if that is impossible.
    """
    try:
        if (path.exists() and not path.is_file()) or Path("/dev") in path.absolute().parents:
            path.write_bytes(data)
        else:
            write_atomically(path.resolve(), lambda file: file.write(data))  # a link stays one
    except OSError as error:
        raise UserError(f"--out: {path} can't be written: {error.strerror}.") from None


def point(link: Path, name: str) -> None:
    """Makes `link` a symbolic link to the file `name` beside it, replacing an older one at once."""
    if link.is_symlink() and os.readlink(link) == name:
        return
    temporary = link.with_name(f"{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, link)


def delete(path: Path) -> None:
    """Deletes a file, or a folder, which is first no longer there under its name."""
    if path.is_dir() and not path.is_symlink():
        gone = path if path.suffix == ".tmp" else path.rename(path.with_name(f"{path.name}.tmp"))
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes durable which names a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
