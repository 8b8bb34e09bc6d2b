"""The record of a run: metrics.jsonl and status.json, and their mirror in W&B, which nothing depends on."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.record.account import Account
from dist_train.record.history import read_lines, read_metrics, read_status
from dist_train.record.record import Lines
from tests.processes import REPO, Finished, environment

TRAIN = ["train", "data.name=arrays", "train.batch_size=8", "train.steps=12", "log.every=3", "eval.every=6",
         "device=cpu", "model.args.hidden=[8]", "wandb.tables=never"]  # fmt: skip
SECRETS = {"WANDB_API_KEY": "", "MY_SECRET": "sesame-9e107d9d372bb6826bd81d3542a419d6"}


def test_rows_hold_what_the_charts_need(npz: Path, tmp_path: Path, cli: Callable[..., Finished]) -> None:
    finished = cli(*TRAIN, f"data.root={npz}", "wandb.mode=disabled")
    assert finished.rc == 0, finished
    run = tmp_path / "runs" / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in trained] == [3, 6, 9, 12]
    assert all({"epoch", "time", "attempt", "lr", "perf/samples_per_second"} <= row.keys() for row in trained)
    evaluated = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluated] == [6, 12]
    assert all(0 <= row["eval/accuracy"] <= 1 for row in evaluated)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["total_steps"], status["attempts"]) == (
        "completed",
        12,
        12,
        1,
    )
    assert 0 < status["seconds"]["productive"] <= status["seconds"]["total"]


def test_a_row_that_a_kill_cut_short_and_rows_taken_back_are_left_out(tmp_path: Path) -> None:
    lines = [
        '{"step": 5, "attempt": 1, "train/loss": 3.0}',
        '{"step": 10, "attempt": 1, "train/loss": 2.0}',
        '{"step": 15, "attempt": 1, "train/lo',
        '{"step": 10, "attempt": 2, "train/loss": 2.5}',
        '{"step": 10, "attempt": 2, "eval/loss": 2.6}',
        '{"step": 15, "attempt": 2, "train/loss": 1.5}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["attempt"]) for row in rows] == [(5, 1), (10, 2), (10, 2), (15, 2)]


def test_lines_that_found_no_room_are_written_when_there_is_some(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "away" / "metrics.jsonl")
    lines.add('{"step": 5}')
    lines.add('{"step": 10}')
    lines.path.parent.mkdir()
    lines.flush()
    assert [row["step"] for row in read_lines(lines.path)] == [5, 10]
    lines.flush()
    lines.add('{"step": 15}')
    assert [row["step"] for row in read_lines(lines.path)] == [5, 10, 15]


def test_an_evaluation_that_is_made_up_for_takes_no_step_back(tmp_path: Path) -> None:
    lines = [
        '{"step": 10, "attempt": 1, "train/loss": 2.0}',  # then a signal came in the middle of the evaluation
        '{"step": 10, "attempt": 2, "eval/loss": 2.6}',
        '{"step": 20, "attempt": 2, "train/loss": 1.5}',
        '{"step": 20, "attempt": 2, "eval/loss": 1.6}',
        '{"step": 20, "attempt": 3, "train/loss": 1.5}',  # the step itself was done again
        '{"step": 20, "attempt": 3, "eval/loss": 1.6}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["attempt"]) for row in rows] == [(10, 1), (10, 2), (20, 3), (20, 3)]


def test_a_clock_that_is_set_back_is_no_matter(
    here: Callable[..., Any], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(told))
    here(*small, "train.steps=6")
    here(*small)  # the second attempt goes on from what the first one has written
    rows = read_metrics(tmp_path / "runs" / "run")
    times = [row["time"] for row in rows]
    assert times == sorted(times) and times[0] > 0
    status = read_status(tmp_path / "runs" / "run")
    assert 0 < status["goodput"] <= 1
    assert min(status["seconds"].values()) >= 0
    assert sum(status["seconds"].values()) <= 2 * status["seconds"]["total"] + 0.01


def test_what_a_wrong_clock_has_left_counts_as_nothing() -> None:
    account = Account.after({"step": 5, "seconds": {"total": -3600.0, "productive": -3500.0}}, resumed=0)
    assert (account.before, account.seconds["productive"], account.lost_steps) == (0, 0, 5)


def test_the_speed_is_that_of_the_samples_really_taken(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    """90 samples in batches of 64: two steps take 90 and not 128; one of 9,000 takes 90, too."""
    for batch, steps in ((64, 2), (9000, 1)):
        name, length = f"run.name={batch}", (f"train.steps={2 * steps}", f"log.every={steps}")
        here(*small, name, f"train.batch_size={batch}", *length)
        rows = [row for row in read_metrics(tmp_path / "runs" / str(batch)) if "train/loss" in row]
        samples = rows[0]["perf/samples_per_second"] * rows[0]["perf/seconds_left"]  # of the other half
        assert samples == pytest.approx(90, rel=0.01)


def test_a_run_whose_folder_is_deleted_under_way_stops_at_once(
    begin: Callable[..., Any], under_way: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    rare = ["log.every=1000000", "eval.every=1000000", "checkpoint.every=never"]
    process = under_way(begin("train", *small, "train.steps=1000000", *rare))
    (tmp_path / "runs" / "run").rename(tmp_path / "away")  # at one blow
    shutil.rmtree(tmp_path / "away")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[2:] == [
        "dist-train: runs/run was deleted or moved under way; this attempt ends, unsaved."
    ]
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.long
def test_wandb_offline_gets_every_row_the_configuration_and_no_secret(
    npz: Path, tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    """With a key in the environment too: mode=offline uploads nothing, and no file may hold the key.

    Nor what the configuration takes from the environment: it is recorded as it is written there.
    """
    (tmp_path / "hidden-place").mkdir()
    npz.rename(tmp_path / "hidden-place" / npz.name)
    secrets = {
        "PLACE": "hidden-place",
        **SECRETS,
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    }
    options = ["wandb.mode=offline", "wandb.group=g1", "wandb.tags=[a,b]", "wandb.project=p1"]
    for steps in (6, 12):  # two attempts of one run
        root = f"data.root=${{oc.env:PLACE}}/{npz.name}"
        finished = cli(*TRAIN, root, *options, f"train.steps={steps}", env=secrets)
        assert finished.rc == 0, finished
    run = tmp_path / "runs" / "run"
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    identity = (run / "wandb" / "run_id").read_text()
    assert all(file.stem == f"run-{identity}" for file in files)
    first, second = (
        [json.loads(x) for x in _inspect(file).splitlines() if x.startswith("{")] for file in files
    )
    text = json.dumps([first, second])
    assert "g1" in text and "p1" in text
    assert "batch_size" in text and "${oc.env:PLACE}" in text
    for records, steps in ((first, [3, 6]), (second, [9, 12])):
        rows = [record["history"]["item"] for record in records if "history" in record]
        assert [(row["step"], row["_step"]) for row in rows] == [(step, step) for step in steps]
        assert all("train/loss" in row for row in rows) and "eval/accuracy" in rows[1]
    assert not any("host" in record.get("run", {}) for record in [*first, *second])
    for file in run.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert not any(secret.encode() in data for secret in secrets.values() if secret), file


SLOW_STARTS = """
import subprocess, threading, time

at, name = (subprocess, "_fork_exec") if hasattr(subprocess, "_fork_exec") else (
    subprocess._posixsubprocess, "fork_exec")
fork_exec = getattr(at, name)

def slow(*arguments):
    if threading.current_thread().name == "wandb":
        time.sleep(0.5)  # there is a pipe already, which is closed when the program has begun
    return fork_exec(*arguments)

setattr(at, name, slow)
"""


@pytest.mark.long
def test_a_worker_process_does_not_keep_wandb_waiting_for_a_program_that_it_started(
    npz: Path, tmp_path: Path, run: Callable[..., Finished]
) -> None:
    """A copy of the pipe, in a worker forked just then, would be open until the end of the run."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_STARTS)
    (tmp_path / "mine.py").write_text("def same(image): return image\n")
    words = ["data.train_transform=[mine:same]", "data.workers=1", "wandb.mode=offline", "wandb.code=true"]
    paths = os.pathsep.join([str(tmp_path), str(REPO)])
    done = run("-m", "dist_train", *TRAIN, f"data.root={npz}", *words, env={"PYTHONPATH": paths})
    assert done.rc == 0, done
    assert "did not finish" not in done.out + done.err, done


def test_without_a_key_it_is_offline_and_says_so_once(
    npz: Path, tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    finished = cli(*TRAIN, f"data.root={npz}", env={"HOME": tmp_path})
    assert finished.rc == 0, finished
    (line,) = [line for line in finished.err.splitlines() if "offline" in line]
    (place,) = re.findall("`dist-train sync (.*)` uploads it[.]", line)
    assert list((tmp_path / place).glob("wandb/offline-run-*"))
    assert finished.err.splitlines().index(line) == 2  # after what came up


@pytest.mark.long
def test_a_server_that_cannot_be_reached_does_not_stop_the_training(
    npz: Path, tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    unreachable = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    finished = cli(*TRAIN, f"data.root={npz}", "wandb.mode=online", env=unreachable, timeout=240)
    assert finished.rc == 0, finished
    assert "completed at step 12" in finished.out
    assert "W&B" in finished.err
    assert "Traceback" not in finished.err
    rows = read_metrics(tmp_path / "runs" / "run")
    # The loop did not wait: all steps were done before W&B had given up.
    assert rows[-1]["step"] == 12 and rows[-1]["time"] < 30


def test_the_environment_can_leave_wandb_out(cli: Callable[..., Finished], npz: Path, tmp_path: Path) -> None:
    """WANDB_MODE=disabled counts where the configuration leaves the mode open; nothing of W&B is there."""
    off = {"WANDB_MODE": "disabled"}
    assert cli(*TRAIN, f"data.root={npz}", "wandb.mode=auto", env=off).rc == 0
    assert not (tmp_path / "runs/run/wandb").exists()
    assert cli(*TRAIN, f"data.root={npz}", "wandb.mode=offline", "run.name=asked", env=off).rc == 0
    assert list((tmp_path / "runs/asked/wandb").glob("offline-run-*"))


def _inspect(file: Path) -> str:
    """The records of a .wandb file as JSON, read by W&B's own tool."""
    wandb = Path(sys.executable).parent / "wandb"
    command = [str(wandb), "leet", "inspect", "--json", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout
