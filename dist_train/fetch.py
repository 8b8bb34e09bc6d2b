"""A process that copies objects from a store (S3, GCS, Azure, HTTPS) into a folder of bounded size.

`python -m dist_train.fetch` reads requests, a line of JSON each, from stdin, and lives until nobody can
write there any more. It is a process of its own since the client's threads do not survive a fork, and the
workers of a DataLoader are forked. Each answer is a file: an object, named by its checksum, that was renamed
when it was whole and checked; or `NAME.failed` with the reason. Several such processes share a folder: who
holds the lock of `NAME.part` copies that object. Imports nothing of ours.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

THREADS = 4
RANGE = 2**24  # bytes asked for at a time: what a cut connection costs
FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0  # seconds before an object is asked for again
MOST_WRONG = 3  # times that what came is not what the checksum says
ENTRY = re.compile("[0-9a-f]{64}")  # the names of what may be deleted


class Request(NamedTuple):
    """An object that is wanted."""

    url: str  # of the folder of objects
    name: str
    bytes: int | None  # None: not known, nor is the checksum
    sha256: str | None
    entry: str  # the name that it gets in `folder`
    folder: str
    limit: int  # bytes that the folder may hold
    patience: float  # seconds after which it is given up
    urgent: bool  # whether somebody waits for it


class Lost(Exception):
    """Why an object can't be had."""


class Pending:
    """Requests in the order in which they are served: urgent ones first, none twice."""

    def __init__(self) -> None:
        self.urgent: OrderedDict[str, Request] = OrderedDict()
        self.later: OrderedDict[str, Request] = OrderedDict()
        self.busy: set[str] = set()
        self.changed = threading.Condition()

    def put(self, request: Request) -> None:
        """Adds a request, unless it is served already."""
        with self.changed:
            if request.entry in self.busy or request.entry in self.urgent:
                return
            if request.urgent:
                self.later.pop(request.entry, None)
            (self.urgent if request.urgent else self.later)[request.entry] = request
            self.changed.notify()

    def take(self) -> Request:
        """The next request; waits for one."""
        with self.changed:
            while not (self.urgent or self.later):
                self.changed.wait()
            entry, request = (self.urgent or self.later).popitem(last=False)
            self.busy.add(entry)
            return request

    def done(self, request: Request) -> None:
        """Forgets a request that was served."""
        with self.changed:
            self.busy.discard(request.entry)


def main() -> None:
    """Serves requests until the last process that could make one has ended."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):  # whoever asks decides when all is over
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    pending = Pending()
    for _ in range(THREADS):
        threading.Thread(target=_serve, args=(pending,), daemon=True).start()
    for line in sys.stdin:
        pending.put(Request(*json.loads(line)))
    os._exit(0)  # in the midst of copies: nobody waits for them


def _serve(pending: Pending) -> None:
    while True:
        request = pending.take()
        try:
            fetch(request)
        except Exception as error:
            reason = str(error) if isinstance(error, Lost) else _in_short(error)
            _answer(Path(request.folder) / f"{request.entry}.failed", reason)
        finally:
            pending.done(request)


def _answer(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(path)
    except OSError:  # the folder is gone, or full: who waits will say that nothing came
        temporary.unlink(missing_ok=True)


def fetch(request: Request) -> None:
    """Copies an object into the folder, unless it is there or somebody else is at it. Raises Lost."""
    target = Path(request.folder) / request.entry
    if target.exists():
        os.utime(target)  # it will be used
        return
    part = target.with_suffix(".part")
    with _locked(target.parent):
        if target.exists():  # another one was quicker
            return
        file = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
        if not _lock(file):  # another one is at it
            os.close(file)
            return
    try:
        deadline = time.monotonic() + request.patience
        store = _store(request.url, request.patience)
        size = request.bytes
        if size is None:
            size = int(_tried(lambda: _client().head(store, request.name), deadline)["size"])
        _reserve(file, size, request, deadline)
        _copy(request, store, file, size, deadline)
        with _locked(target.parent):  # else who adds up the folder could find it under neither name
            os.rename(part, target)
    except BaseException:
        with _locked(target.parent):  # else another one could take the lock of a file without a name
            part.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)  # and with it the lock


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time looks through the folder, or changes what it would find."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(file: int) -> bool:
    """Takes the lock of a file that is copied; False if somebody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _copy(request: Request, store: Any, file: int, size: int, deadline: float) -> None:
    """Copies all bytes of an object into `file`, and checks them. Raises Lost."""
    for _ in range(MOST_WRONG):
        digest, offset = hashlib.sha256(), 0
        while offset < size:
            length = min(RANGE, size - offset)
            data = _tried(functools.partial(_range, store, request.name, offset, length, size), deadline)
            written = os.pwrite(file, data, offset)  # perhaps less than all: the rest is asked for again
            digest.update(data[:written])
            offset += written
        if request.sha256 in (None, digest.hexdigest()):
            return
    raise Lost("not what the index says (checksum): it is damaged, or was changed")


def _range(store: Any, name: str, offset: int, length: int, size: int) -> memoryview:
    """So many bytes of an object. Raises Lost if it is of another size, else what the client raises."""
    try:
        data = memoryview(_client().get_range(store, name, start=offset, length=length))
    except FileNotFoundError:
        raise
    except Exception:
        if (there := int(_client().head(store, name)["size"])) != size:
            raise Lost(f"has {there:,} bytes, not the {size:,} that the index says") from None
        raise
    if len(data) != length:
        raise Lost(f"ends after {offset + len(data):,} bytes, not after the {size:,} that the index says")
    return data


def _tried(function: Any, deadline: float) -> Any:
    """What the function returns, tried again after pauses until the deadline. Raises Lost."""
    wait, tries = FIRST_WAIT, 1
    errors = _client().exceptions
    refused = (errors.PermissionDeniedError, errors.UnauthenticatedError, errors.NotSupportedError)
    while True:
        try:
            return function()
        except FileNotFoundError:
            raise Lost("there is no such object") from None
        except (Lost, *refused):
            raise
        except Exception as error:
            if time.monotonic() + wait > deadline:
                raise Lost(f"could not be read, tried {tries} times: {_in_short(error)}") from None
            time.sleep(wait * random.uniform(0.5, 1))  # or all would come back at once
            wait, tries = min(2 * wait, LONGEST_WAIT), tries + 1


def _in_short(error: Exception) -> str:
    """The first line of an error, without what may be a secret in a URL."""
    line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(" :.")
    if "169.254.169.254" in line:  # where a machine of a cloud would find its own
        line += " (no credentials were given)"
    return re.sub(r"\?\S*", "", line)


def _client() -> Any:
    import obstore

    return obstore


@functools.lru_cache(maxsize=8)
def _store(url: str, patience: float) -> Any:
    """The client of a store; credentials come from the environment, as its own tools take them."""
    from obstore.store import LocalStore, from_url

    if url.startswith("file://"):
        return LocalStore(url.removeprefix("file://"))
    seconds = f"{max(1, round(patience / 4))}s"
    options: Any = {"timeout": seconds, "connect_timeout": "5s"}
    endpoints = (url, *(os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT")))
    options["allow_http"] = any(place.startswith("http://") for place in endpoints)  # as it was written
    return from_url(url, client_options=options, retry_config={"max_retries": 0})


def _reserve(file: int, size: int, request: Request, deadline: float) -> None:
    """Makes room for an object, whose file then has its size. Raises Lost where there is none."""
    folder = Path(request.folder)
    while True:
        with _locked(folder):
            if _make_room(folder, request.limit - size):
                try:
                    _allocate(file, size)
                except OSError as error:
                    raise Lost(f"no room for it in {folder}: {error.strerror}") from None
                return
        if time.monotonic() > deadline:
            raise Lost(f"no room for it in {folder}: what is being copied takes all of it")
        time.sleep(0.1)


def _allocate(file: int, size: int) -> None:
    os.ftruncate(file, size)
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise


def _make_room(folder: Path, limit: int) -> bool:
    """Deletes what was not used for longest until the folder holds no more than `limit` bytes.

    Who reads an object that is deleted has it open, and reads on.
    """
    found = []
    for item in os.scandir(folder):
        try:
            if ENTRY.fullmatch(item.name) or item.name.endswith(".part"):
                found.append((item.stat().st_mtime, item.stat().st_size, Path(item.path)))
        except FileNotFoundError:
            continue
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            break
        if path.suffix != ".part" or _is_left(path):
            path.unlink(missing_ok=True)
            total -= size
    return total <= limit


def _is_left(part: Path) -> bool:
    """Whether nobody copies into it any more."""
    with suppress(FileNotFoundError), part.open("rb") as file:
        return _lock(file.fileno())
    return False


if __name__ == "__main__":
    main()
