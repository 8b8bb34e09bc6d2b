"""The record of a run: metrics.jsonl and status.json, written by rank 0, and their mirror in W&B.

metrics.jsonl is the truth: one JSON object a line, flushed at once, each attempt's rows after those of the
one before; `read_metrics` takes the last attempt's row of a step. Nothing waits for W&B: rows go to it
through a queue, from a thread, and a server that can't be reached costs one warning.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.config import Config, to_mapping
from dist_train.progress import Progress

INIT_SECONDS = 20  # after which a server counts as unreachable; the training goes on meanwhile
FINISH_SECONDS = 30  # how long the end of a run waits for W&B
STATUS_SECONDS = 1  # how old status.json may be: replacing a file can wait for the disk


class Tracker:
    """Rank 0's record of one attempt. `progress` shows what is recorded."""

    def __init__(self, config: Config, progress: Progress, total_steps: int) -> None:
        self.folder, self.progress, self.total_steps = config.run_dir, progress, total_steps
        before = read_status(self.folder)
        self.attempt = int(before.get("attempts", 0)) + 1
        self._seconds_before = float(before.get("seconds", {}).get("total", 0.0))
        self._productive = float(before.get("seconds", {}).get("productive", 0.0))
        self._start = time.monotonic()
        self._metrics = _open_lines(self.folder / "metrics.jsonl")
        self._log = (self.folder / "log.txt").open("a", encoding="utf-8")
        self._mirror = Mirror(config, self.say) if config.wandb.mode != "disabled" else None
        self._status_at = -math.inf
        self.status("running", 0)

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far, over all attempts."""
        return self._seconds_before + time.monotonic() - self._start

    def log(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Records a row of metrics after `step` optimizer steps."""
        row = {
            "step": step,
            "epoch": epoch,
            "time": round(self.seconds, 3),
            "attempt": self.attempt,
        }
        row |= values
        self._metrics.write(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n")
        self._metrics.flush()
        self.progress.row(step, row)
        if self._mirror:
            self._mirror.rows.put(row)

    def say(self, text: str) -> None:
        """Shows a line and keeps it in log.txt."""
        self.progress.say(text)
        if not self._log.closed:  # W&B's thread may have the last word
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
            self._log.flush()

    def productive(self, seconds: float) -> None:
        """Counts seconds of training steps, for the share of productive time."""
        self._productive += seconds

    def status(self, state: str, step: int, reason: str = "") -> None:
        """Writes status.json: running, completed, interrupted or failed, and why."""
        now = time.monotonic()
        if state == "running" and now - self._status_at < STATUS_SECONDS:
            return
        self._status_at = now
        status = {
            "state": state,
            "step": step,
            "total_steps": self.total_steps,
            "attempts": self.attempt,
            "reason": reason,
            "seconds": {
                "total": round(self.seconds, 3),
                "productive": round(self._productive, 3),
            },
        }
        temporary = self.folder / "status.json.tmp"
        temporary.write_text(json.dumps(status, indent=2) + "\n")
        os.replace(temporary, self.folder / "status.json")

    def close(self, state: str, step: int, reason: str = "") -> None:
        """Ends the attempt's record."""
        self.status(state, step, reason)
        self.progress.close()
        if self._mirror:
            self._mirror.close(failed=state == "failed")
        self._metrics.close()
        self._log.close()


def read_status(folder: Path) -> dict[str, Any]:
    """status.json of a run, or an empty dict."""
    try:
        return json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The effective history of a run: of each step the values of the last attempt, in the order of steps.

    Rows that a later attempt took back, because it went on from an earlier step, are left out.
    """
    rows: list[dict[str, Any]] = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        while rows and rows[-1]["attempt"] < row["attempt"] and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows


class Mirror:
    """Weights & Biases, fed from a thread; its errors are told once and never reach the training."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        import wandb  # in this thread: a worker process forked in mid-import would hang

        self.rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._wandb, self._say, self._failed = wandb, say, False
        mode = config.wandb.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(wandb) else "offline")
            if mode == "offline" and "WANDB_MODE" not in os.environ:
                say("W&B: no API key, so the run is logged offline; `wandb sync` uploads it later.")
        self._options = _wandb_options(wandb, config, mode)
        self._thread = threading.Thread(target=self._run, daemon=True, name="wandb")
        self._thread.start()

    def close(self, failed: bool) -> None:
        """Hands over the last rows, and waits for W&B no longer than FINISH_SECONDS."""
        self._failed = failed
        self.rows.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._say("W&B: did not finish in time; metrics.jsonl holds every row.")
            self._say = lambda text: None  # log.txt is about to be closed

    def _run(self) -> None:
        try:
            run = self._connect()
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            while (row := self.rows.get()) is not None:
                run.log(row)
            run.finish(exit_code=int(self._failed))
        except Exception as error:
            self._say(f"W&B: {_first_line(error)}; the training goes on, metrics.jsonl holds every row.")

    def _connect(self) -> Any:
        try:
            return self._wandb.init(**self._options)
        except Exception as error:
            if self._options["mode"] != "online":
                raise
            self._say(f"W&B: {_first_line(error)}; logging offline, `wandb sync` uploads it later.")
            self._wandb.teardown()  # else the run counts as in use
            return self._wandb.init(**{**self._options, "mode": "offline"})


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")


def _wandb_options(wandb: Any, config: Config, mode: str) -> dict[str, Any]:
    """The arguments of wandb.init. The id lives in the run's folder: each attempt continues the same run."""
    folder = config.run_dir
    (folder / "wandb").mkdir(exist_ok=True)
    id_file = folder / "wandb" / "run_id"
    if not id_file.exists():
        id_file.write_text(os.urandom(4).hex())
    return {
        "id": id_file.read_text().strip(),
        "resume": "allow",
        "dir": str(folder),
        "mode": mode,
        "config": to_mapping(config),
        "name": config.wandb.name or config.run.name,
        **{name: getattr(config.wandb, name) for name in ("project", "entity", "group", "tags", "notes")},
        # Nothing of the machine beyond its load: no code, no git remote, no console, no command line.
        "settings": wandb.Settings(
            disable_git=True,
            disable_code=True,
            console="off",
            x_disable_meta=True,
            silent=True,
            init_timeout=INIT_SECONDS,
        ),
    }


def _has_key(wandb: Any) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        if "prompt" not in inspect.signature(wandb.login).parameters:
            return bool(wandb.api.api_key)
        wandb.setup(wandb.Settings(silent=True))
        return bool(wandb.login(prompt=False, verify=False))  # looks, asks nobody
    except Exception:  # no home folder, an unreadable netrc: as good as no key
        return False


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_lines(path: Path) -> Any:
    """A file of lines to append to; a last line that a kill cut short is ended first."""
    file = path.open("a+", encoding="utf-8")
    if file.tell():
        with path.open("rb") as tail:
            tail.seek(-1, os.SEEK_END)
            if tail.read() != b"\n":
                file.write("\n")
    return file
