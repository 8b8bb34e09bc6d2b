"""Making a cache: by threads, once, however many processes want it; a build that was killed goes on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dist_train.config import UserError
from dist_train.data.ahead import ahead
from dist_train.data.cache import (
    BY_FILE,
    KEPT,
    MISSING,
    RECORD,
    Cached,
    CachedMasks,
    Files,
    checksum,
    fingerprint,
    flat,
    open_maps,
    sizes,
)
from dist_train.data.images import BadSample
from dist_train.data.masks import ImageMasks
from dist_train.runtime import allowed_cpus

TASK = 16  # images that a thread does in one go
TELL_SECONDS = 30.0  # between two lines about the progress where there is no terminal
LOOK_SECONDS = 0.1  # how often a process looks whether another one has made the cache


def kept_in(files: Files, place: Path, in_memory: bool = False) -> Cached:
    """The files with their cache in a folder below `place`, which is made first where it isn't whole.

    Args:
        in_memory: whether the last process that uses the cache deletes it.

    Raises UserError where that is impossible.
    """
    folder = place / fingerprint(files, threads=min(16, 2 * allowed_cpus()))
    release: Callable[[], None] | None = None
    try:
        place.mkdir(mode=0o700 if in_memory else 0o777, parents=True, exist_ok=True)
        if in_memory:
            _take_over(place, folder)
            release = partial(_release, _used(folder), folder, os.getpid())
        folder.mkdir(exist_ok=True)
        if not _is_whole(folder, files):
            with _alone(folder):
                if not _is_whole(folder, files):  # else another process has made it meanwhile
                    _build(files, folder, allowed_cpus())
        kind = CachedMasks if isinstance(files, ImageMasks) else Cached
        return kind(files, folder, release)
    except BaseException as error:
        if release:
            release()
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"data.cache: {folder} can't hold the images ({error.strerror}); give another data.cache_dir, or"
            " fewer pixels by data.cache_size."
        ) from None


def _is_whole(folder: Path, files: Files) -> bool:
    try:
        open_maps(folder, files)
    except FileNotFoundError:
        return False
    except ValueError as error:
        _say(f"data.cache: {folder}: {error}; it is made again.")
        return False
    return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process makes the cache. A lock ends with the process that has it."""
    with (folder / "lock").open("w", encoding="utf-8") as lock:
        told = os.environ.get("LOCAL_RANK", "0") != "0"
        while not _locked(lock.fileno(), fcntl.LOCK_EX):
            if not told:
                _say(f"data.cache: another process decodes the images into {folder}; waiting for it.")
            told = True
            time.sleep(LOOK_SECONDS)
        yield


def _build(files: Files, folder: Path, threads: int) -> None:
    """Decodes what isn't there yet; the index appears when all is durable."""
    part = folder / "index.part"
    wanted = len(files) * RECORD.itemsize
    (folder / "index").unlink(missing_ok=True)
    if not part.exists() or part.stat().st_size != wanted:
        (folder / "pixels").unlink(missing_ok=True)
        with part.open("wb") as file:
            file.truncate(wanted)
    records = np.memmap(part, RECORD, "r+")
    descriptor = os.open(folder / "pixels", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        writer = _Writer(files, descriptor, records)
        done = np.flatnonzero(records["state"] == KEPT)
        for _ in ahead(writer.check, _tasks(done), threads, 4 * threads):
            pass
        missing = np.flatnonzero(records["state"] == MISSING)
        made = ahead(writer.add, _tasks(missing), threads, 4 * threads)
        for _ in _shown(made, len(missing), f"data.cache: decoding images into {folder}"):
            pass
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    whole = np.asarray(records).view(np.uint8)
    with part.open("ab") as file:
        file.write(checksum(whole))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / "index")


class _Writer:
    """Appends images to the file of pixels, from several threads.

    The record of an image follows its pixels, so a kill between the two leaves it missing; `check` finds
    what a machine that lost its power did not write.
    """

    def __init__(self, files: Files, descriptor: int, records: np.ndarray) -> None:
        self.files, self.descriptor, self.records = files, descriptor, records
        ends = records["offset"] + sizes(records, files)
        self.end, self.lock = int(ends.max(initial=0)), threading.Lock()

    def check(self, indices: np.ndarray) -> None:
        """Forgets those of the images that are not in the file as their records say."""
        lengths = sizes(self.records[indices], self.files)
        for index, size in zip(indices, lengths.tolist(), strict=True):
            pixels = os.pread(self.descriptor, size, int(self.records["offset"][index]))
            if zlib.crc32(pixels) != self.records["crc"][index]:
                self.records["state"][index] = MISSING

    def add(self, indices: np.ndarray) -> int:
        """Decodes images and writes them; returns how many."""
        for index in indices.tolist():
            try:
                image, target = self.files[index]
                pixels = flat(image, target)
            except (BadSample, OSError, SyntaxError):  # told when it is read
                pixels = None
            if pixels is None:
                self.records[index] = (0, 0, 0, 0, BY_FILE)
                continue
            with self.lock:
                offset, self.end = self.end, self.end + len(pixels)
            _write(self.descriptor, pixels, offset)
            self.records[index] = (offset, *image.shape[1:], zlib.crc32(pixels), KEPT)
        return len(indices)


def _write(descriptor: int, rest: memoryview, offset: int) -> None:
    """All of it: a call may write less, as on a disk that is nearly full."""
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _tasks(indices: np.ndarray) -> Iterator[np.ndarray]:
    return (indices[first : first + TASK] for first in range(0, len(indices), TASK))


def _shown(counts: Iterable[int], total: int, text: str) -> Iterator[None]:
    """Goes through `counts` of images that are done; a bar or lines tell how many of them there are."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(text, total=total)
            for count in counts:
                bar.advance(task, count)
                yield
        return
    done, told = 0, time.monotonic()
    _say(f"{text}: {total:,}")
    for count in counts:
        done += count
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            _say(f"{text}: {done:,} of {total:,}")
        yield


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


# --- caches in memory: who uses one has a shared lock on the file `used` ------------------------------


def _take_over(place: Path, folder: Path) -> None:
    """Deletes the caches of processes that were killed, but for the one in `folder`.

    Raises UserError where they are not this user's.
    """
    if place.stat().st_uid != os.getuid():
        raise UserError(f"data.cache: {place} belongs to another user; use data.cache=disk.")
    for other in place.iterdir():
        if other != folder:
            _delete_unused(other)


def _used(folder: Path) -> int:
    """A descriptor that tells others, as long as it is open, that this process uses the cache."""
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / "used", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / "used")):
                return descriptor
        os.close(descriptor)  # another process has deleted it meanwhile


def _release(descriptor: int, folder: Path, process: int) -> None:
    """Ends the use of a cache; the last one deletes it."""
    if os.getpid() != process:  # a forked worker, which shares the lock
        return
    os.close(descriptor)
    _delete_unused(folder)


def _delete_unused(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder / "used", os.O_RDWR)
        try:
            if _locked(descriptor, fcntl.LOCK_EX):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    """Takes a lock, if nobody has one that is in its way."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
