"""The lock of a run's folder: one attempt at a time, whatever was killed, on whichever host.

A file and no `flock`, which network file systems may lack. It tells who holds it, and its time of change
is renewed while the holder lives, so that a lock that was left behind is recognized.
"""

from __future__ import annotations

import contextlib
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
    """The right of this process to write into a run's folder. Only rank 0 takes it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self.token = os.urandom(8).hex()

    def check(self, say: Callable[[str], None]) -> None:
        """Waits until nobody holds the lock; touches nothing. Raises UserError if a living attempt does."""
        holder = read(self.path)
        if holder is None or holder.get("token") == self.token or is_gone(holder):
            return
        what = f"{self.path.parent}: {_named(holder)}"
        if _on_this_host(holder):
            raise UserError(f"{what} is training this run; wait for it, or choose another run.name.")
        say(f"{what} may still be training this run: waiting up to {STALE_SECONDS} s for a sign of life.")
        renewed, deadline = _changed(self.path), time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.5)
            now = _changed(self.path)
            if now is None:  # it has ended
                return
            if now != renewed:
                raise UserError(f"{what} is training this run; wait for it, or choose another run.name.")

    def acquire(self, say: Callable[[str], None]) -> None:
        """Takes the lock. Raises UserError if another attempt has it."""
        if self.is_ours():
            return
        self.check(say)
        mine = self.path.with_name(f"lock.{self.token}")
        mine.write_text(json.dumps(_myself(self.token)) + "\n", encoding="utf-8")
        if not self._create(mine):
            self.check(say)  # of two that found none, the earlier one has it now
            os.replace(mine, self.path)
            time.sleep(0.1)  # of two that found the same stale lock, the later one has replaced the other's
            if not self.is_ours():
                raise UserError(f"{self.path.parent}: another attempt has just started to train this run.")
        for stray in self.path.parent.glob("lock.*"):  # of a process that was killed right here
            stray.unlink(missing_ok=True)

    def _create(self, mine: Path) -> bool:
        """Makes the lock of a file, which only one of several processes can do; False if it was there."""
        try:
            os.link(mine, self.path)
        except OSError:  # also of file systems without hard links
            return False
        return True

    def clear(self) -> None:
        """Removes a lock that a dead process has left, where that is possible."""
        holder = read(self.path)
        if holder and is_gone(holder):
            with contextlib.suppress(OSError):
                self.path.unlink()

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
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return holder if isinstance(holder, dict) else None
    except (OSError, ValueError):
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
