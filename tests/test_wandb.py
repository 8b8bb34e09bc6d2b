"""Runs in Weights & Biases: each step once after any number of attempts, online, offline, and by `sync`.

The server is one of this process, which W&B's own client takes for W&B's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from dist_train.config import RunError
from dist_train.record.history import read_lines, read_metrics
from dist_train.record.sent import Sent, by_step
from dist_train.tools.sync import send
from tests.processes import Finished, environment
from tests.wandb_server import Server

# Rows, evaluations and checkpoints come at different steps; what it takes to be killed is waited for.
OFTEN = ["log.every=10", "eval.every=30", "checkpoint.every=200", "wandb.project=p1",
         "wandb.tables=never"]  # fmt: skip
FOREVER = "train.steps=1000000"


@pytest.fixture
def server() -> Iterator[Server]:
    """A server for W&B's client."""
    running = Server()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def killed(begin: Callable[..., Any], under_way: Callable[..., Any], small: list[str]) -> Callable[..., None]:
    """killed(step, *arguments, env={}): an attempt that gets SIGKILL some steps after a checkpoint."""

    def attempt(step: int, *arguments: str, **options: Any) -> None:
        def beyond(run: Path) -> bool:
            return any(row["step"] > step for row in read_metrics(run))

        process = under_way(begin("train", *small, *OFTEN, FOREVER, *arguments, **options), beyond)
        uploading = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        psutil.wait_procs(uploading, timeout=60)  # W&B's own process sends what it has got

    return attempt


class Run:
    """In place of W&B's run: it takes steps as that does."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
        """Takes a row. Fails where W&B would drop it."""
        assert commit and (not self.rows or step > self.rows[-1][0])
        self.rows.append((step, values))


def test_the_rows_of_a_step_are_sent_together_and_only_once() -> None:
    run = Run()
    sent = Sent(run, after=10)

    def row(kind: str, step: int, more: bool = False) -> None:
        sent.row({"kind": kind, "step": step, f"{kind}/loss": step}, more)

    row("train", 10)  # W&B has it
    row("train", 20, more=True)
    assert not run.rows
    row("eval", 20)
    row("train", 30)
    assert [(step, sorted(values)) for step, values in run.rows] == [
        (20, ["eval/loss", "step", "train/loss"]),
        (30, ["step", "train/loss"]),
    ]
    row("train", 40, more=True)  # in whose evaluation the attempt ended; the next one begins before it
    row("train", 30)
    row("train", 40, more=True)
    row("eval", 40)
    assert run.rows[2:] == [(40, {"step": 40, "train/loss": 40, "eval/loss": 40})]


@pytest.mark.long
def test_three_attempts_made_offline_are_sent_as_one_history(
    killed: Callable[..., None],
    cli: Callable[..., Finished],
    small: list[str],
    server: Server,
    tmp_path: Path,
) -> None:
    """Two of them are killed, so their last steps are done again."""
    run, offline = tmp_path / "runs" / "run", "wandb.mode=offline"
    killed(250, offline)
    killed(650, offline)
    done = max(row["step"] for row in read_metrics(run)) + 20
    finished = cli("train", *small, *OFTEN, offline, f"train.steps={done}")
    assert finished.rc == 0, finished
    rows = read_metrics(run)
    assert {row["attempt"] for row in rows} == {1, 2, 3}
    assert len(list(read_lines(run / "metrics.jsonl"))) > len(rows)  # some are done again
    wanted = by_step(rows)
    assert [row["step"] for row in wanted] == sorted({row["step"] for row in rows})
    shown = cli("sync", "runs", "--dry-run")
    assert shown.rc == 0, shown
    assert list(map(json.loads, shown.out.splitlines())) == wanted
    assert not server.requests
    for steps in (len(wanted), 0):  # again: nothing is missing
        sent = cli("sync", "runs/run", "wandb.project=p2", env=server.environment)
        assert (sent.rc, sent.out) == (0, f"runs/run: {steps} steps sent as me/p2/{_id(run)}\n"), sent
        assert _without_clock(server.rows()) == wanted
    best = max((row for row in rows if "eval/loss" in row), key=lambda row: row["eval/accuracy"])
    summary = server.summary()
    assert (summary["best/loss"], summary["best/step"]) == (best["eval/loss"], best["step"])
    assert (summary["eval/loss"], summary["attempts"]) == (rows[-1]["eval/loss"], 3)
    written = cli("sync", "runs/run", env={"WANDB_MODE": "offline"})
    assert written.rc == 0, written
    newest = max((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert _without_clock(inspected(newest, "history")) == wanted  # as W&B's own program reads it


def test_sync_tells_nothing_of_the_machine_that_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 1}\nwandb: {code: true, console: true}\n")
    asked: dict[str, Any] = {}

    def init(**options: Any) -> None:
        asked.update(options)
        raise OSError("unreachable")

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(RunError, match="unreachable; the same command goes on"):
        send(tmp_path)
    settings = asked["settings"]
    assert settings.disable_git and settings.disable_code and not settings.x_save_requirements
    assert settings.console == "off"


@pytest.mark.long
def test_a_killed_run_goes_on_online_with_each_step_once(
    killed: Callable[..., None],
    cli: Callable[..., Finished],
    small: list[str],
    server: Server,
    tmp_path: Path,
) -> None:
    run, online = tmp_path / "runs" / "run", {"env": server.environment}
    killed(250, "wandb.mode=offline")  # what it has done comes, too
    killed(650, "wandb.mode=online", **online)
    done = max(row["step"] for row in read_metrics(run)) + 20
    last = ["wandb.mode=online", "wandb.group=g", "wandb.job_type=j", f"train.steps={done}"]
    finished = cli("train", *small, *OFTEN, *last, **online)
    assert finished.rc == 0, finished
    assert "W&B" not in finished.err
    wanted, rows = by_step(read_metrics(run)), _without_clock(server.rows())
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    losses = ("train/loss", "eval/loss")
    assert [[row.get(name) for name in losses] for row in rows] == [
        [row.get(name) for name in losses] for row in wanted
    ]
    (begun,) = [each for each in server.sent("UpsertBucket") if each["groupName"]]
    assert (begun["groupName"], begun["jobType"], begun["displayName"]) == ("g", "j", "run")
    assert not {begun[name] for name in ("host", "program", "commit", "repo")} - {None, ""}


@pytest.mark.long
def test_what_is_asked_for_is_shown_and_uploaded(
    cli: Callable[..., Finished], small: list[str], tmp_path: Path
) -> None:
    """Offline: W&B's own program tells what its file holds, and the files beside it what was uploaded."""
    (tmp_path / "mine.py").write_text("WIDTH = 8\n")
    keys = ["wandb.code", "wandb.checkpoint", "log.histograms"]
    asked = ["wandb.mode=offline", "wandb.tables=evaluations", "wandb.images=3", "model.args.hidden=[8]"]
    asked += [f"{key}=true" for key in keys]
    finished = cli("train", *small, *asked, "eval.every=6", env={"WANDB_DATA_DIR": tmp_path / "staged"})
    assert finished.rc == 0, finished
    run = tmp_path / "runs" / "run"
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    rows = [row for row in inspected(file, "history") if "eval/loss" in row]
    assert [row["step"] for row in rows] == [6, 12]
    evaluated = [row for row in read_metrics(run) if row["kind"] == "eval"]
    for row, known in zip(rows, evaluated, strict=True):
        classes = _table(file, row["tables/classes.path"])
        assert [line[0] for line in classes] == ["0", "1", "2"]
        assert sum(line[1] for line in classes) == 37
        right = sum(line[3] for line in classes)
        assert right / 37 == pytest.approx(known["eval/accuracy"], abs=1e-6)
        pairs = _table(file, row["tables/confusion_table.path"])
        assert sum(often for _, _, often in pairs) == 37
        assert sum(often for own, said, often in pairs if own == said) == right
        samples = _table(file, row["tables/samples.path"])
        assert [line[:2] for line in samples] == [[0, "Image"], [18, "Image"], [36, "Image"]]
        assert sum(row["weights/1.weight.values"]) == 64 * 8
    artifacts: dict[str, list[dict[str, Any]]] = {}
    for one in inspected(file, "artifact"):
        artifacts.setdefault(one["type"], []).extend(one["manifest"]["contents"])
    pictures = {
        entry["path"]: entry["local_path"] for entry in artifacts["run_table"] if "images" in entry["path"]
    }
    for picture in pictures.values():
        with Image.open(picture) as shown:
            assert shown.size == (8, 8)
    assert len(pictures) == 3
    assert [entry["path"] for entry in artifacts["source"]] == ["mine.py"]
    best = (run / "checkpoints" / "best.pt").resolve()
    assert [entry["local_path"] for entry in artifacts["model"]] == [str(best)]


@pytest.mark.long
def test_a_run_that_fails_raises_an_alert(
    cli: Callable[..., Finished], small: list[str], tmp_path: Path
) -> None:
    finished = cli("train", *small, "wandb.mode=offline", "wandb.tables=never", "optim.lr=1e30")
    assert finished.rc == 1, finished
    (file,) = (tmp_path / "runs" / "run" / "wandb").glob("offline-run-*/*.wandb")
    (alert,) = inspected(file, "alert")
    assert (alert["level"], alert["title"]) == ("ERROR", "run failed") and "not finite" in alert["text"]
    assert inspected(file, "exit")[0]["exit_code"] == 1


def _table(file: Path, path: str) -> list[list[Any]]:
    """The rows of a table that a row of W&B names."""
    return list(json.loads((file.parent / "files" / path).read_text())["data"])


def inspected(file: Path, kind: str) -> list[Any]:
    """The records of one kind in a .wandb file, read by W&B's own program; of `history` the rows."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    records = [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]
    found = [record[kind] for record in records if kind in record]
    return [record["item"] for record in found] if kind == "history" else found


def _without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of W&B without what it adds; its step is ours."""
    assert [row["_step"] for row in rows] == [row["step"] for row in rows]
    return [{name: value for name, value in row.items() if name[0] != "_"} for row in rows]


def _id(run: Path) -> str:
    return (run / "wandb" / "run_id").read_text()
