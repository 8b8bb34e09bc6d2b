"""The mirror of a run in Weights & Biases. Nothing waits for it: a thread sends what is in a queue."""

from __future__ import annotations

import functools
import inspect
import os
import queue
import shlex
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_train.config import Config, to_mapping
from dist_train.record.history import read_metrics
from dist_train.record.sent import Sent, best, summary

INIT_SECONDS = 20  # after which a server counts as unreachable; the training goes on meanwhile
FINISH_SECONDS = 30  # how long the end of a run waits for W&B
UPLOAD_SECONDS = 600  # the same, where a complete run's checkpoint is to be uploaded

Send = Callable[[Sent], None]


def _start_programs_between_forks() -> None:
    """No process is forked while a thread starts a program, as W&B's does: git, uname, its service.

    `subprocess` reads from a pipe whether the program has begun. A worker process of a DataLoader that was
    forked just then has a copy of that pipe, so the thread would wait until the worker ends: with the run.
    """
    lock, begin = threading.RLock(), subprocess.Popen.__init__

    @functools.wraps(begin)
    def alone(self: subprocess.Popen[Any], *arguments: Any, **options: Any) -> None:
        with lock:
            begin(self, *arguments, **options)

    subprocess.Popen.__init__ = alone  # type: ignore[method-assign]
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


_start_programs_between_forks()


class Mirror:
    """Weights & Biases, fed from a thread; its errors are told once and never reach the training.

    Args:
        attempt: its number, and the step from which it goes on.
    """

    def __init__(self, config: Config, attempt: tuple[int, int], say: Callable[[str], None]) -> None:
        import wandb  # in this thread: a worker process forked in mid-import would hang

        self._queue: queue.SimpleQueue[Send | None] = queue.SimpleQueue()
        self._wandb, self._say, self._failed = wandb, say, False
        self.config, self.folder = config, config.run_dir
        self.attempt, self.step = attempt
        self.to_sync = f"`dist-train sync {shlex.quote(str(self.folder))}`"
        mode = asked(config)
        if mode == "auto":
            mode = "online" if has_key(wandb) else "offline"
            if mode == "offline":
                say(f"W&B: no API key, logging offline; {self.to_sync} uploads it.")
        self._options = options(wandb, config, self.folder, mode)
        if config.wandb.code:
            self.extra(lambda sent: upload_code(wandb, sent.run))
        self._thread = threading.Thread(target=self._run, daemon=True, name="wandb")
        self._thread.start()

    def send(self, send: Send) -> None:
        """Calls `send` from the thread, when all before it is sent."""
        self._queue.put(send)

    def extra(self, send: Send) -> None:
        """Calls `send` for what rows do without: where it fails, they go on."""

        def tried(sent: Sent) -> None:
            try:
                send(sent)
            except Exception as error:
                self._say(f"W&B: {first_line(error)}; it goes on without.")

        self.send(tried)

    def row(self, row: Mapping[str, Any], more: bool) -> None:
        """Sends a row of metrics; `more` of the same step are to come."""
        self.send(lambda sent: sent.row(row, more))

    def add(self, step: int, make: Callable[[Any], dict[str, Any]]) -> None:
        """Sends with the rows of a step what `make` makes of the module wandb: pictures, tables."""
        self.extra(lambda sent: sent.add(step, make(self._wandb)) if sent.needs(step) else None)

    def best(self, row: Mapping[str, Any]) -> None:
        """Shows an evaluation as the best one."""
        self.send(lambda sent: sent.run.summary.update(best(row)))

    def alert(self, reason: str) -> None:
        """Tells whom W&B's settings say that the run has failed, if the configuration wants it."""
        name = self.config.wandb.name or self.config.run.name
        if self.config.wandb.alert:
            self.send(lambda sent: sent.run.alert(f"{name} failed", reason, level="ERROR", wait_duration=0))

    def close(self, state: str) -> None:
        """Hands over the last rows, and waits for W&B no longer than FINISH_SECONDS, or UPLOAD_SECONDS.

        Args:
            state: completed, interrupted or failed; status.json tells it already.
        """
        self._failed, seconds = state == "failed", FINISH_SECONDS
        self.send(lambda sent: sent.run.summary.update(summary(self.folder)))
        if self.config.wandb.checkpoint and state == "completed":
            self.extra(lambda sent: upload_best(self._wandb, sent.run, self.folder))
            seconds = UPLOAD_SECONDS
        self._queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say(f"W&B: did not finish in time; {self.to_sync} uploads what is missing.")
            self._say = lambda text: None  # the run's record is closed

    def _run(self) -> None:
        try:
            run = self._connect()
            sent = begin(run, self.step - 1 if run.offline else run.starting_step - 1)
            if not run.offline:
                self._catch_up(sent)
            while send := self._queue.get():
                send(sent)
            run.finish(exit_code=int(self._failed))
        except Exception as error:
            self._say(f"W&B: {first_line(error)}; the training goes on, metrics.jsonl holds every row.")

    def _connect(self) -> Any:
        try:
            return self._wandb.init(**self._options)
        except Exception as error:
            if self._options["mode"] != "online":
                raise
            self._say(f"W&B: {first_line(error)}; logging offline; {self.to_sync} uploads it.")
            self._wandb.teardown()  # else the run counts as in use
            return self._wandb.init(**{**self._options, "mode": "offline"})

    def _catch_up(self, sent: Sent) -> None:
        """Sends what earlier attempts have recorded and not sent: killed, offline, or amid an evaluation."""
        for row in read_metrics(self.folder):
            if row["step"] <= self.step and row["attempt"] < self.attempt:
                sent.row(row, more=True)


def asked(config: Config) -> str:
    """The mode that the configuration asks for; where it is `auto`, that of W&B's own variable."""
    mode = config.wandb.mode
    return (os.environ.get("WANDB_MODE") or mode) if mode == "auto" else mode


def begin(run: Any, after: int) -> Sent:
    """What is sent to a run that `options` began, of steps above `after`."""
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Sent(run, after)


def options(wandb: Any, config: Config, folder: Path, mode: str) -> dict[str, Any]:
    """The arguments of wandb.init. The id lives in the run's folder: each attempt continues the same run."""
    (folder / "wandb").mkdir(exist_ok=True)
    id_file = folder / "wandb" / "run_id"
    if not id_file.exists():
        id_file.write_text(os.urandom(4).hex(), encoding="utf-8")
    code = config.wandb.code
    return {
        "id": id_file.read_text(encoding="utf-8").strip(),
        "resume": "allow",
        "dir": str(folder),
        "mode": mode,
        "config": to_mapping(config),
        "name": config.wandb.name or config.run.name,
        "job_type": config.wandb.job_type or "train",
        **{name: getattr(config.wandb, name) for name in ("project", "entity", "group", "tags", "notes")},
        # Nothing of the machine beyond its load: not its name, no code, no git remote, no command line.
        "settings": wandb.Settings(
            disable_git=not code,
            disable_code=not code,
            console="wrap" if config.wandb.console else "off",
            x_disable_meta=True,
            x_save_requirements=code,
            host="",
            program="",
            silent=True,
            init_timeout=INIT_SECONDS,
        ),
    }


def upload_code(wandb: Any, run: Any) -> None:
    """Uploads the program's source: Python and YAML files here, as git knows them, ignored ones left out."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py", "*.yaml"]
    listed = subprocess.run(listing, capture_output=True, text=True)
    outside = (str(path) for pattern in ("*.py", "*.yaml") for path in Path().glob(pattern))
    names = outside if listed.returncode else listed.stdout.split("\0")
    code = wandb.Artifact(f"source-{run.id}", type="source")
    for name in names:
        if Path(name).is_file():
            code.add_file(str(name), name=str(name))
    run.log_artifact(code)


def upload_best(wandb: Any, run: Any, folder: Path) -> None:
    """Uploads the best checkpoint, or the last one where none is the best, as a version of an artifact."""
    names = ("best.pt", "best.sharded", "last.pt", "last.sharded")
    links = (folder / "checkpoints" / name for name in names)
    path = next(link.resolve() for link in links if link.exists())
    model = wandb.Artifact(f"best-{run.id}", type="model", metadata={"file": path.name})
    add = model.add_dir if path.is_dir() else model.add_file
    add(str(path), policy="immutable")  # which is not copied first
    run.log_artifact(model, aliases=["latest", "best"])


def first_line(error: Exception) -> str:
    """What an error says, without a full stop."""
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")


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
