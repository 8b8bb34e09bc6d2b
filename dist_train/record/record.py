"""The record of a run: metrics.jsonl and status.json, written by rank 0, and their mirror in W&B.

attempts.jsonl tells how each attempt began. metrics.jsonl is the truth: one JSON object a line, flushed at
once, each attempt's rows after those of the one before; `read_metrics` takes the last attempt's row of a
step. Nothing waits for W&B: rows go to it through a queue, from a thread, and a server that can't be
reached costs one warning.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.cluster import slurm
from dist_train.config import Config, to_mapping
from dist_train.record import media
from dist_train.record.account import Account
from dist_train.record.history import read_lines, read_status
from dist_train.record.terminal import Progress
from dist_train.record.wandb import Mirror, asked

UNDISTURBED = 6 * 3600.0  # seconds that count as the mean time between interruptions until the first one
LONG_SECONDS = 60.0  # a goodput is told of no shorter run, unless it took more than one attempt
STATUS_SECONDS = 1  # how old status.json may be: replacing a file can wait for the disk


class Begin(NamedTuple):
    """How an attempt begins."""

    step: int  # of the checkpoint it goes on from, or 0
    total: int  # optimizer steps of the whole run
    processes: int  # the world size
    parts: int  # of each step
    machine: dict[str, Any]  # what rank 0 runs on


class Record:
    """The record of one attempt: rank 0 writes and shows it, and on all other ranks it does nothing.

    A full disk or a lost folder doesn't reach the training: lines wait in memory until they can be written.

    Args:
        started: time.monotonic() at the beginning of this attempt.
        is_on: whether this is rank 0.
        on_row: called with each row; False asks to stop.
    """

    def __init__(
        self,
        config: Config,
        begin: Begin,
        started: float,
        is_on: bool = True,
        on_row: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.folder, self.is_on, self.on_row = config.run_dir, is_on, on_row
        self.started, self.total_steps, self.processes = started, begin.total, begin.processes
        before = read_status(self.folder) if self.is_on else {}
        self.attempt = int(before.get("attempts", 0)) + 1
        self.account = Account.after(before, begin.step)
        self.step, self.skipped, self.trouble = begin.step, 0, ""
        self._speed: float | None = None
        self._evaluated: dict[str, float] = before.get("metrics") or {}
        self.best: dict[str, float] = before.get("best") or {}
        self.mirrored: Mirror | None = None
        self._status_at = -math.inf
        if not self.is_on:
            return
        self.progress = Progress(begin.total, begin.step)
        self._metrics = Lines(self.folder / "metrics.jsonl")
        self._log = Lines(self.folder / "log.txt")
        self._histograms = Lines(self.folder / "histograms.jsonl")
        self._bad = Lines(self.folder / "bad_samples.jsonl")
        self._known_bad = {line["sample"] for line in read_lines(self._bad.path)}
        attempts = Lines(self.folder / "attempts.jsonl")
        line = {"attempt": self.attempt, "step": begin.step, "processes": begin.processes}
        machine = {**begin.machine, "host": socket.gethostname()}
        attempts.add(
            json.dumps(line | {"parts": begin.parts, "machine": machine, "config": to_mapping(config)})
        )
        attempts.close()
        self.status("running", begin.step)

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far, over all attempts."""
        return self.account.before + time.monotonic() - self.started

    @property
    def between_interruptions(self) -> float:
        """Mean seconds between interruptions of this run; several hours where there was none."""
        return self.seconds / (self.attempt - 1) if self.attempt > 1 else max(self.seconds, UNDISTURBED)

    def row(self, kind: str, step: int, epoch: int, values: Mapping[str, Any], more: bool = False) -> bool:
        """Records a row of metrics after `step` optimizer steps; False if its reader asks to stop.

        Args:
            kind: `train` or `eval`.
            more: whether an evaluation at the same step follows.
        """
        if not self.is_on:
            return True
        row: dict[str, Any] = {
            "kind": kind,
            "step": step,
            "epoch": epoch,
            "time": round(self.seconds, 3),
            "attempt": self.attempt,
        }
        row |= {name: _finite(value) for name, value in values.items()}
        self._metrics.add(json.dumps(row))
        if kind == "eval":
            self._evaluated = {k: _finite(value) for k, value in values.items() if k != "stopped"}
        self._speed = row.get("perf/samples_per_second", self._speed)
        self.progress.row(step, row)
        if self.mirrored:
            self.mirrored.row(row, more)
        return self.on_row is None or self.on_row(dict(row)) is not False

    def histograms(self, step: int, weights: dict[str, dict[str, Any]]) -> None:
        """Records of each weight `low`, `high` and the `counts` of bins between, ahead of the evaluation."""
        if self.is_on:
            row = {"step": step, "attempt": self.attempt, "weights": weights}
            self._histograms.add(json.dumps(row))
            if self.mirrored:
                self.mirrored.add(step, lambda wandb: media.histograms(wandb, weights))

    def tables(self, step: int, columns: tuple[Any, ...]) -> None:
        """Shows in W&B the tables of an evaluation, as `media.tables` takes them; ahead of its row."""
        if self.mirrored:
            self.mirrored.add(step, lambda wandb: media.tables(wandb, *columns))

    def move(self, step: int) -> None:
        """Moves the progress bar to a step."""
        if self.is_on:
            self.progress.move(step)

    def running(self, step: int, skipped: int, best: dict[str, float]) -> None:
        """Brings status.json up to a step of the loop."""
        if self.mirrored and best != self.best and best.items() <= self._evaluated.items():
            self.mirrored.best({"step": step, **self._evaluated})
        self.skipped, self.best = skipped, best
        self.status("running", step)

    def mirror(self, config: Config, earlier: Mirror | None = None) -> None:
        """Gives Weights & Biases every row to come, unless the configuration or WANDB_MODE says otherwise.

        Args:
            earlier: the mirror of an attempt of this process that ended as `running`; it goes on.
        """
        if self.is_on and asked(config) != "disabled":
            self.mirrored = earlier or Mirror(config, (self.attempt, self.step), self.say)

    def flush(self) -> None:
        """Writes rows that had no room until now: ahead of a checkpoint, which takes them for written."""
        if self.is_on:
            self._metrics.flush()

    def say(self, text: str) -> None:
        """Shows a line and keeps it in log.txt."""
        if self.is_on:
            self.progress.say(text)
            self._log.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def warn(self, text: str) -> None:
        """Says a line that status.json keeps, too, until there is a newer one."""
        self.trouble = text
        self.say(text)

    def bad_samples(self, samples: list[tuple[str, str]]) -> None:
        """Lists samples that could not be read, as (sample, reason), each once."""
        for sample, reason in samples if self.is_on else ():
            if sample not in self._known_bad:
                self._known_bad.add(sample)
                self._bad.add(json.dumps({"sample": sample, "reason": reason}))
                self.warn(f"left out: {reason}")

    def status(self, state: str, step: int, reason: str = "") -> None:
        """Writes status.json: running, completed, interrupted or failed, and why."""
        now = time.monotonic()
        if not self.is_on or (state == "running" and now - self._status_at < STATUS_SECONDS):
            return
        self._status_at, self.step = now, step
        status = {
            "state": state,
            "step": step,
            "total_steps": self.total_steps,
            "attempts": self.attempt,
            "processes": self.processes,
            "reason": reason,
            "trouble": self.trouble,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job": slurm.job_name(os.environ),
            "lost_steps": self.account.lost_steps,
            "skipped_steps": self.skipped,
            "bad_samples": len(self._known_bad),
            "metrics": self._evaluated,
            "best": self.best,
            "samples_per_second": self._speed,
            "goodput": round(self.account.goodput(self.seconds), 4),
            "seconds": {
                "total": round(self.seconds, 3),
                **{name: round(value, 3) for name, value in self.account.seconds.items()},
            },
        }
        temporary = self.folder / "status.json.tmp"
        try:
            temporary.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, self.folder / "status.json")
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self.trouble and self.folder.exists():
                self.warn(f"{self.folder}/status.json could not be written: {error.strerror}.")

    def fail(self, reason: str) -> None:
        """Records, from whichever thread, that the process is about to be ended."""
        self.status("failed", self.step, reason)
        self.say(reason)

    def close(self, state: str, step: int, skipped: int, reason: str = "") -> None:
        """Ends the attempt's record; as `running` where another one of this process follows."""
        if not self.is_on:
            return
        self.skipped = skipped
        self.status(state, step, reason)
        if self.attempt > 1 or (self.seconds >= LONG_SECONDS and self.account.goodput(self.seconds) < 0.9):
            self.say(self.account.in_words(self.seconds, self.attempt))
        self.progress.close()
        if self.mirrored and state != "running":  # else the next attempt of this process has it
            if state == "failed":
                self.mirrored.alert(reason)
            self.mirrored.close(state)
        for lines in (self._metrics, self._log, self._bad, self._histograms):
            lines.close()


class Lines:
    """A file that lines are appended to, each whole; those that can't be written now are written later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._lock = threading.Lock()  # W&B and the checkpoint's writer have something to say, too
        self._file: int | None = None
        self._size = 0

    def add(self, line: str) -> None:
        """Appends a line."""
        with self._lock:
            self._waiting += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Writes what waits, if that is possible now."""
        with self._lock, contextlib.suppress(OSError):
            if not self._waiting:
                return
            if self._file is None:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                self._size = os.fstat(self._file).st_size
                if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
                    self._waiting = b"\n" + self._waiting  # ends a line that a kill cut short
            written = os.write(self._file, self._waiting)
            if written < len(self._waiting):  # the disk is full
                os.ftruncate(self._file, self._size)
                return
            self._size += written
            self._waiting = b""

    def close(self) -> None:
        """Closes the file; what could not be written is lost."""
        with self._lock, contextlib.suppress(OSError):
            if self._file is not None:
                os.close(self._file)
            self._file = None


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
