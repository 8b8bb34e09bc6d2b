"""The lock of a run's folder: one attempt at a time, whatever was killed, on whichever host.

A file and no `flock`, which network file systems may lack; they all make hard links and rename files in one
step. It tells who holds it, and its time of change is renewed while the holder lives, so that a lock that was
left behind is recognized.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from dist_train.cluster import slurm
from dist_train.config import UserError

RENEW_SECONDS = 5  # how often the holder renews it
CLOCK_SECONDS = 60  # by which a clock may be set while a process lives
STALE_SECONDS = 60  # without renewal; more than a network file system caches a file's times


class Lock:
    """The right of this process to write into a run's folder. Only rank 0 takes it.

    Who finds a lock that was left behind claims to come after it, by a file that is named after what the lock
    says: only one process can make that. Then it puts its own in the lock's place. One that was killed in
    between is come after in the same way.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self.token = os.urandom(8).hex()

    def check(self, say: Callable[[str], None]) -> None:
        """Waits until nobody holds the lock; touches nothing. Raises UserError if a living attempt does."""
        self._left_behind(say)

    def acquire(self, say: Callable[[str], None]) -> None:
        """Takes the lock. Raises UserError if another attempt has it."""
        if self.is_ours():
            return
        before = self._left_behind(say)
        text = (json.dumps(_myself(self.token)) + "\n").encode()
        mine = self.path.with_name(f"lock.new-{self.token}")
        mine.write_bytes(text)
        claim = self._after(before)
        _create(claim, mine, text)
        if self._chain() != [*before, text]:  # the answer may have got lost on a network: the files tell
            if _bytes(claim) == text:
                claim.unlink(missing_ok=True)
            mine.unlink(missing_ok=True)
            raise UserError(f"{self.path.parent}: another attempt has just started to train this run.")
        os.replace(mine, self.path)
        for stray in self.path.parent.glob("lock.*"):
            if stray != self._after([text]):
                stray.unlink(missing_ok=True)

    def _left_behind(self, say: Callable[[str], None]) -> list[bytes]:
        """What nobody holds any more: nothing, or what the lock says, and claims to come after it."""
        chain = self._chain()
        if not chain:
            return []
        holder, path = _parsed(chain[-1]), self._after(chain[:-1])
        if holder is None:
            time.sleep(0.5)  # it is being written, or a computer went down meanwhile
            return chain if self._chain() == chain else self._left_behind(say)
        if holder.get("token") == self.token or is_gone(holder):
            return chain
        what = f"{self.path.parent}: {_named(holder)}"
        trained = UserError(f"{what} is training this run; wait for it, or choose another run.name.")
        if _on_this_host(holder):
            raise trained
        say(f"{what} may still be training this run: waiting up to {STALE_SECONDS} s for a sign of life.")
        renewed, deadline = _changed(path), time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.5)
            if self._chain() != chain:  # it has ended, or another one comes after it
                return self._left_behind(say)
            if _changed(path) != renewed:
                raise trained
        return chain

    def _chain(self) -> list[bytes]:
        """What the lock says, then what claims to come after it; the last one has the lock, if it lives."""
        chain: list[bytes] = []
        while (text := _bytes(self._after(chain))) is not None and text not in chain:
            chain.append(text)
        return chain

    def _after(self, chain: list[bytes]) -> Path:
        """The file that only one process can make, to come after these."""
        if not chain:
            return self.path
        return self.path.with_name(f"lock.{hashlib.sha256(chain[-1]).hexdigest()[:16]}")

    def clear(self) -> None:
        """Removes a lock that a dead process has left, where that is possible."""
        holder = read(self.path)
        if holder and is_gone(holder):
            with contextlib.suppress(OSError, UserError):
                self.acquire(lambda text: None)
                self.release()

    def is_ours(self) -> bool:
        """Whether no other attempt has taken the lock."""
        holder = read(self.path)
        return holder is not None and holder.get("token") == self.token

    def renew(self) -> bool:
        """Shows that this process lives. False if another attempt has taken the lock."""
        try:
            os.utime(self.path)
            holder = read(self.path)
        except OSError:  # the file system is away; the lock will be looked at again
            return True
        return holder is None or holder.get("token") == self.token

    def release(self) -> None:
        """Gives the lock back; where that is impossible, it is recognized as left behind."""
        if self.is_ours():
            with contextlib.suppress(OSError):
                self.path.unlink()


def _create(path: Path, mine: Path, text: bytes) -> None:
    """Makes a file with the content of `mine`, unless it is there."""
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # not found: who took the lock cleaned up
        try:
            os.link(mine, path)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError:  # a file system without hard links
            with path.open("xb") as file:
                file.write(text)


def _myself(token: str) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),  # pids are used again
        "slurm_job": slurm.job_name(os.environ),
        "restart": slurm.restarts(os.environ),
        "token": token,
    }


def read(path: Path) -> dict[str, Any] | None:
    """What a lock tells, or None if there is none that can be read."""
    return _parsed(_bytes(path) or b"")


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _parsed(text: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        holder = json.loads(text)
        return holder if isinstance(holder, dict) else None
    return None


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _on_this_host(holder: dict[str, Any]) -> bool:
    return holder.get("host") == socket.gethostname()


def is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder has certainly ended, or SLURM has started this attempt in its place."""
    mine = _myself("")
    same_job = mine["slurm_job"] is not None and holder.get("slurm_job") == mine["slurm_job"]
    if same_job and holder.get("restart", 0) < mine["restart"]:
        return True
    if not _on_this_host(holder):
        return False
    try:
        process = psutil.Process(holder.get("pid", 0))
        started = process.create_time()
        if process.status() == psutil.STATUS_ZOMBIE:  # killed, and nobody has asked for its exit code
            return True
    except psutil.Error:
        return True
    return abs(started - holder.get("started", started)) > CLOCK_SECONDS


def _named(holder: dict[str, Any]) -> str:
    job = f", SLURM job {holder['slurm_job']}" if holder.get("slurm_job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}"
