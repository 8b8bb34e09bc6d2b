"""Objects behind a URL, in a folder of bounded size on this machine, shared by all processes on it.

They are copied there by a process of its own (fetch.py), which answers by files: who needs one waits for it.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dist_train.config import UserError
from dist_train.fetch import Request

SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "https", "http", "file")
PATIENCE_AT_START = 30.0  # seconds for the index: a wrong address is told soon
FORGOTTEN = 600.0  # seconds after which an object that could not be had is tried again
MOST_STARTS = 4  # of the process that copies


class Object(NamedTuple):
    """A file in a store; its bytes never change."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Downloads:
    """Where objects are kept on this machine, and how much of them."""

    folder: str | None = None  # None: one of this user's among the temporary files
    limit: int = 20 * 10**9  # bytes
    patience: float = 120  # seconds after which an object is given up


class Unreachable(Exception):
    """Why an object can't be had."""


class Remote:
    """The objects below a URL. Raises UserError where they could not be fetched at all."""

    def __init__(self, url: str, downloads: Downloads) -> None:
        scheme = url.partition("://")[0]
        if scheme not in SCHEMES:
            raise UserError(
                f"data.root: there is no '{scheme}://' here; give a folder, or one of {', '.join(SCHEMES)}."
            )
        if importlib.util.find_spec("obstore") is None:
            raise UserError(
                "data.root: to read from a URL takes obstore; install it by pip install 'dist-train[cloud]'."
            )
        self.url, self.downloads = url, downloads
        self.folder = _made(downloads.folder)
        for note in self.folder.glob("*.failed"):  # of attempts before this one
            note.unlink(missing_ok=True)
        self._used: dict[str, float] = {}  # when an object was last marked as used

    def open(self, item: Object) -> int:
        """The object as a file to read, once it is here. Raises Unreachable if it doesn't come."""
        file = self._arrived(self._request(item, urgent=True))
        now = time.monotonic()
        if now > self._used.get(item.sha256, 0) + 10:  # what was not used for longest is deleted first
            self._used[item.sha256] = now
            with suppress(FileNotFoundError):
                os.utime(self.folder / item.sha256)
        return file

    def read(self, name: str) -> bytes:
        """A small object that may have changed since it was read last. Raises UserError."""
        entry = secrets.token_hex(32)
        wanted = Request(
            self.url, name, None, None, entry, str(self.folder), self.downloads.limit, PATIENCE_AT_START, True
        )
        try:
            with os.fdopen(self._arrived(wanted), "rb") as file:
                return file.read()
        except (Unreachable, OSError) as error:
            raise UserError(f"data.root: {self.url.rstrip('/')}/{name}: {error}.") from None
        finally:
            (self.folder / entry).unlink(missing_ok=True)

    def fetch(self, items: Iterator[Object], in_use: int) -> None:
        """Has the next objects fetched, in this order, as many as there is room for beside `in_use` bytes."""
        room = self.downloads.limit - in_use
        for item in dict.fromkeys(items):
            room -= item.bytes
            if room < 0:
                break
            with suppress(Unreachable):  # whoever needs it will tell
                _ask(self._request(item, urgent=False))

    def renew(self, item: Object) -> bool:
        """Throws a damaged copy of an object away, so that another one is fetched."""
        (self.folder / item.sha256).unlink(missing_ok=True)
        return True

    def _request(self, item: Object, urgent: bool) -> Request:
        limit, patience = self.downloads.limit, self.downloads.patience
        return Request(self.url, *item, item.sha256, str(self.folder), limit, patience, urgent)

    def _arrived(self, wanted: Request) -> int:
        """The file of an object, open; asks for it and waits where it isn't here. Raises Unreachable."""
        place = self.folder / wanted.entry
        begun, asked = time.monotonic(), -1.0
        while True:
            with suppress(FileNotFoundError):
                return os.open(place, os.O_RDONLY)
            if reason := _failure(place):
                raise Unreachable(reason)
            waited = time.monotonic() - begun
            if waited > 1.5 * wanted.patience:
                raise Unreachable(f"did not come within {waited:.0f} s")
            if waited >= asked + 1:  # again, as whoever was at it may have died
                _ask(wanted)
                asked = waited
            time.sleep(0.02)


def _made(folder: str | None) -> Path:
    """The folder for objects, which is made if it isn't there. Raises UserError if it isn't ours."""
    path = Path(folder or Path(tempfile.gettempdir(), f"dist-train-shards-{os.getuid()}")).absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder is None and path.stat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to somebody else")
        with (path / "lock").open("a"):  # whether files can be written there
            return path
    except OSError as error:
        raise UserError(f"data.download_dir: {path} can't be used: {error.strerror}.") from None


def _failure(place: Path) -> str:
    """Why an object can't be had, if that was found out of late."""
    note = place.with_suffix(".failed")
    try:
        if time.time() - note.stat().st_mtime < FORGOTTEN:
            return note.read_text(encoding="utf-8")
        note.unlink()
    except FileNotFoundError:
        pass
    return ""


# The process that copies: one for this process, and for those that were forked from it.
_copier: subprocess.Popen[bytes] | None = None
_starts = 0


def _ask(request: Request) -> None:
    """Tells the process that copies of a request; starts it where there is none. Raises Unreachable."""
    global _copier, _starts
    line = json.dumps(request).encode() + b"\n"  # short enough that lines of several processes don't mix
    while True:
        if _copier is None:
            if _starts == MOST_STARTS:
                raise Unreachable(f"the process that fetches it has ended {_starts} times")
            _starts += 1
            _copier = subprocess.Popen(
                [sys.executable, "-m", "dist_train.fetch"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # signals to this one's group are no matter to it
            )
        assert _copier.stdin
        try:
            os.write(_copier.stdin.fileno(), line)
            return
        except BrokenPipeError:
            _copier = None
