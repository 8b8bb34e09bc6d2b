"""The mirror of a run in Weights & Biases. Nothing waits for it: rows go through a queue, from a thread."""

from __future__ import annotations

import inspect
import os
import queue
import shlex
import threading
from collections.abc import Callable
from typing import Any

from dist_train.config import Config, to_mapping

INIT_SECONDS = 20  # after which a server counts as unreachable; the training goes on meanwhile
FINISH_SECONDS = 30  # how long the end of a run waits for W&B


class Mirror:
    """Weights & Biases, fed from a thread; its errors are told once and never reach the training."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        import wandb  # in this thread: a worker process forked in mid-import would hang

        self.rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._wandb, self._say, self._failed = wandb, say, False
        self._summary: dict[str, Any] = {}
        mode = config.wandb.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_key(wandb) else "offline")
            if mode == "offline" and "WANDB_MODE" not in os.environ:
                say(f"W&B: no API key, logging offline; {_to_sync(config)}.")
        self._to_sync = _to_sync(config)
        self._options = _wandb_options(wandb, config, mode)
        self._thread = threading.Thread(target=self._run, daemon=True, name="wandb")
        self._thread.start()

    def close(self, failed: bool, summary: dict[str, Any]) -> None:
        """Hands over the last rows, and waits for W&B no longer than FINISH_SECONDS."""
        self._failed, self._summary = failed, summary
        self.rows.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._say("W&B: did not finish in time; metrics.jsonl holds every row.")
            self._say = lambda text: None  # the run's record is closed

    def _run(self) -> None:
        try:
            run = self._connect()
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            while (row := self.rows.get()) is not None:
                run.log(row)
            run.summary.update(self._summary)
            run.finish(exit_code=int(self._failed))
        except Exception as error:
            self._say(f"W&B: {_first_line(error)}; the training goes on, metrics.jsonl holds every row.")

    def _connect(self) -> Any:
        try:
            return self._wandb.init(**self._options)
        except Exception as error:
            if self._options["mode"] != "online":
                raise
            self._say(f"W&B: {_first_line(error)}; logging offline; {self._to_sync}.")
            self._wandb.teardown()  # else the run counts as in use
            return self._wandb.init(**{**self._options, "mode": "offline"})


def _to_sync(config: Config) -> str:
    folder = shlex.quote(str(config.run_dir / "wandb"))
    return f"`wandb sync {folder}/offline-run-*` uploads it"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")


def _wandb_options(wandb: Any, config: Config, mode: str) -> dict[str, Any]:
    """The arguments of wandb.init. The id lives in the run's folder: each attempt continues the same run."""
    folder = config.run_dir
    (folder / "wandb").mkdir(exist_ok=True)
    id_file = folder / "wandb" / "run_id"
    if not id_file.exists():
        id_file.write_text(os.urandom(4).hex(), encoding="utf-8")
    return {
        "id": id_file.read_text(encoding="utf-8").strip(),
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


def has_key(wandb: Any) -> bool:
    """Whether W&B knows an API key here; nobody is asked for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        if "prompt" not in inspect.signature(wandb.login).parameters:
            return bool(wandb.api.api_key)
        wandb.setup(wandb.Settings(silent=True))
        return bool(wandb.login(prompt=False, verify=False))  # looks, asks nobody
    except Exception:  # no home folder, an unreadable netrc: as good as no key
        return False
