"""Saving: one file that rank 0 writes, atomically and behind the loop's back."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_train.checkpoint.files import delete, point, write_atomically
from dist_train.checkpoint.memory import Memory
from dist_train.checkpoint.snapshot import is_finite, to_cpu, unreadable
from dist_train.checkpoint.stored import (
    LINKS,
    is_whole,
    links,
    newest_first,
    path_of,
    place_of,
    step_of,
)
from dist_train.config import UserError

FIRST_SECONDS = 60.0  # from the start to the first save whose cost is measured
SHORTEST_SECONDS, LONGEST_SECONDS = 10.0, 3600.0


class Checkpoints:
    """The folder of a run's checkpoints, each one file: rank 0 writes, and on other ranks it does nothing.

    A save that fails, as on a full disk, ends nothing: it is told, and the next one tries again. Each file
    tells by `best_step` which one is the best; the links best.pt and last.pt are made from that.

    Args:
        run: the run's folder; they lie in its `checkpoints`.
        keep: how many of the newest to keep; the best is kept besides.
        say: hears of saves that failed.
        is_on: whether this is rank 0.
    """

    suffix = ".pt"
    memory: Memory | None = None  # where this rank also keeps a copy

    def __init__(self, run: Path, keep: int, say: Callable[[str], None], is_on: bool = True) -> None:
        self.folder, self.keep, self._say, self.is_on = run / "checkpoints", keep, say, is_on
        if is_on:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear()
        self.failure = ""  # why the last save failed, or empty
        self.is_broken = False  # whether the next one would fail like the last one
        self.best: float | None = None  # value of the metric in the best one
        self.best_step: int | None = None
        self.stall_seconds: list[float] = []  # of each save: what the loop waited for it
        self.write_seconds = 0.0  # of the last save
        self._whole: dict[str, bool] = {}  # by name: those that were written or verified by this process
        self._writer: threading.Thread | None = None
        self._copy: Any = None
        self._writes = is_on

    def go_on(self, step: int, best: float | None, best_step: int | None) -> None:
        """Begins with the newest checkpoint, of `step`, which is whole, and the best of those there."""
        self.best, self.best_step = best, best_step
        known = {path_of(self.folder, number).name for number in (step, best_step) if number is not None}
        self._whole = dict.fromkeys(known, True)
        self._link(step)

    def save(self, state: dict[str, Any]) -> None:
        """Copies `state` to memory, then writes it in a thread; waits first for the save before it."""
        if not self._writes:
            return
        begin = time.monotonic()
        self.wait()
        path = self._free(state["step"])
        try:
            copied = self._take(state)
        except UserError as error:
            self.is_broken = True
            self._fail(path, str(error))
            return
        best = state.get("best"), state.get("best_step")
        self._writer = threading.Thread(
            target=self._write, args=(path, copied, best), name="checkpoint", daemon=True
        )
        self._writer.start()
        self.stall_seconds.append(time.monotonic() - begin)

    @property
    def copy_seconds(self) -> float:
        """From copy to copy in memory."""
        return self.memory.every if self.memory else math.inf

    def is_copy_due(self) -> bool:
        """Whether to copy the state to memory; not while a save is in flight, which may come to nothing."""
        is_writing = self._writer is not None and self._writer.is_alive()
        return self.memory is not None and self.memory.is_due() and not is_writing

    def wait(self) -> str:
        """Waits until the save in flight is durable; returns why it failed, or nothing."""
        if self._writer:
            self._writer.join()
            self._writer = None
        return self.failure

    def close(self) -> None:
        """Waits for the save in flight where the run has failed, and other ranks may be gone."""
        self.wait()

    def interval(self, between_interruptions: float) -> float:
        """Seconds from save to save at which least time is lost: sqrt(2 x cost of a save x mean time
        between interruptions), after Young (1974) and Daly (2006), within reason.
        """
        costs = self.stall_seconds[1:] or self.stall_seconds  # the first save also allocates
        if not costs:
            return FIRST_SECONDS
        best = math.sqrt(2 * (sum(costs) / len(costs)) * between_interruptions)
        return min(max(best, SHORTEST_SECONDS, 4 * self.write_seconds), LONGEST_SECONDS)

    def _take(self, state: dict[str, Any]) -> Any:
        """A copy of what is written: the loop goes on changing the weights. Raises UserError."""
        if bad := unreadable(state):
            raise UserError(bad)
        self._copy = to_cpu(state, self._copy)
        return self._copy

    def _put(self, path: Path, state: Any) -> None:
        """Writes what `_take` has copied. Raises whatever happens."""
        if names := [name for name, value in state["model"].items() if not is_finite(value)]:
            raise ValueError(f"the weights are not finite ({names[0]})")
        write_atomically(path, lambda file: torch.save(state, file))

    def _write(self, path: Path, copied: Any, best: tuple[float | None, int | None]) -> None:
        begin = time.monotonic()
        try:
            self._put(path, copied)
            self._whole[path.name] = True
            self.best, self.best_step = best
            self._link(step_of(path))
            self.prune()
            self.failure = ""
        except Exception as error:
            # These may go away by themselves; torch makes a RuntimeError of one of the file system.
            self.is_broken = not isinstance(error, (OSError, RuntimeError, ValueError))
            why = reason_of(error)
            self._fail(path, f"{type(error).__name__}: {why}" if self.is_broken else why)
        self.write_seconds = time.monotonic() - begin

    def _fail(self, path: Path, why: str) -> None:
        self.failure = f"{path} could not be written: {why}"
        end = "" if self.is_broken else ", the next one is tried"
        self._say(f"{self.failure}; the checkpoints before it are untouched{end}.")

    def _free(self, step: int) -> Path:
        """Where the state after `step` is written: over no folder, nor beside another kind of that name."""
        same = [path for path in newest_first(self.folder) if step_of(path) == step]
        if not same or (self.suffix == ".pt" and all(path.suffix == ".pt" for path in same)):
            return same[0] if same else self.folder / f"step-{step:08d}{self.suffix}"
        return self.folder / f"step-{step:08d}-{place_of(same[0])[1] + 1}{self.suffix}"

    def _link(self, newest: int) -> None:
        """Makes the links what the files say, whatever a process that was killed has left."""
        wanted = links(self.folder, newest, self.best_step)
        for name, target in wanted.items():
            point(self.folder / name, target)
        for name in LINKS:
            if name not in wanted and (self.folder / name).is_symlink():
                (self.folder / name).unlink()

    def prune(self) -> None:
        """Deletes what is older than the newest ones and not the best; only after a new one is durable.

        Only whole ones count. A damaged one among them is left as it is.
        """
        kept: set[int] = set()
        for path in newest_first(self.folder) if self.is_on else ():
            step = step_of(path)
            if len(kept) < self.keep and step not in kept:
                if path.name not in self._whole:
                    self._whole[path.name] = is_whole(path)
                if self._whole[path.name]:
                    kept.add(step)
            elif step in kept or step != self.best_step:
                delete(path)

    def _clear(self) -> None:
        """Deletes what a process left that was killed while it wrote."""
        for stray in self.folder.glob("*.tmp"):
            delete(stray)


def reason_of(error: Exception) -> str:
    """What an error says, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
