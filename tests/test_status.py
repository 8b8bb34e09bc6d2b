"""`dist-train status`: what is told of a run is what is true of it, also when the run can't tell any more."""

from __future__ import annotations

import csv
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_train.cluster.slurm import states as slurm_states
from dist_train.config import UserError
from dist_train.record.history import Followed, last_rows, read_config, read_metrics, read_values
from dist_train.tools import recorded, seen
from dist_train.tools.asked import Comparison
from dist_train.tools.compare.runs import find
from dist_train.tools.status import collect
from tests.processes import Finished

RUNNING = {
    "state": "running", "step": 1200, "total_steps": 4690, "attempts": 2, "reason": "", "host": "elsewhere",
    "pid": 1, "slurm_job": "12", "goodput": 0.97312, "samples_per_second": 10834.2, "trouble": "one\ntwo",
    "metrics": {"eval/loss": 1.08, "eval/accuracy": 0.64851}, "best": {"eval/accuracy": 0.65018},
}  # fmt: skip
HOST = socket.gethostname()
SQUEUE = """#!/bin/sh
echo "$@" >>squeue.calls
echo "31_1 PENDING
12 RUNNING"
"""


def write_run(folder: Path, lock: dict[str, Any] | None = None, age: float = 0, **status: Any) -> Path:
    """A run's folder with a status.json, and a lock that was renewed `age` seconds ago."""
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps(status))
    if lock is not None:
        (folder / "lock").write_text(json.dumps(lock))
        os.utime(folder / "lock", (time.time() - age,) * 2)
    return folder


def state(folder: Path) -> tuple[str, str]:
    """(state, trouble) of one run."""
    (row,) = collect([folder])
    return row["state"], row.get("trouble", "")


@pytest.fixture
def gone() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_whose_process_is_gone_is_lost(tmp_path: Path, gone: int) -> None:
    status = {"state": "running", "step": 5, "total_steps": 10}
    told = ("lost", f"process {gone} on {HOST} is gone")
    assert state(write_run(tmp_path / "a", {"host": HOST, "pid": gone}, **status)) == told
    assert state(write_run(tmp_path / "b", **status, host=HOST, pid=gone)) == told
    started = psutil.Process().create_time()
    ours = {"host": HOST, "pid": os.getpid(), "started": started}
    assert state(write_run(tmp_path / "c", ours, **status))[0] == "running"
    other = {**ours, "started": started - 100}  # another process had this number before us
    assert state(write_run(tmp_path / "d", other, **status))[0] == "lost"
    assert state(write_run(tmp_path / "e", None, **status, host=HOST, pid=os.getpid()))[0] == "running"
    # What says that it ended is believed, whatever has become of its process.
    assert state(write_run(tmp_path / "f", {"host": HOST, "pid": gone}, state="failed"))[0] == "failed"


def test_a_lock_that_nobody_renews_is_lost_too(tmp_path: Path) -> None:
    lock = {"host": "elsewhere", "pid": os.getpid()}
    assert state(write_run(tmp_path / "a", lock, 30, **RUNNING))[0] == "running"
    lost, trouble = state(write_run(tmp_path / "b", lock, 90, **RUNNING))
    assert lost == "lost"
    assert trouble.startswith("no sign of life from elsewhere for 9")
    # A lock that can't be read, as in the moment in which it is replaced, proves nothing.
    half = write_run(tmp_path / "c", lock, **RUNNING)
    (half / "lock").write_text('{"host": "el')
    assert state(half)[0] == "running"


def test_the_table_holds_all_runs_and_tolerates_old_ones(
    cli: Callable[..., Finished], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "new", **RUNNING)
    write_run(runs / "old", state="completed", step=10, total_steps=10, attempts=1, reason="", seconds={})
    write_run(runs / "sweep/0", state="failed", step=3, total_steps=10, reason="OSError: disk full")
    (runs / "broken").mkdir()
    (runs / "broken/status.json").write_text('{"state": "run')
    (runs / "no run").mkdir()
    result = cli("status")
    assert (result.rc, result.err) == (0, ""), result
    heading, _, *lines = [line.strip() for line in result.out.splitlines() if line.strip()]
    assert heading.split() == [
        "run", "state", "step", "last", "best", "samples/s", "goodput", "job", "last", "trouble"
    ]  # fmt: skip
    assert [line.split() for line in lines] == [
        ["runs/broken", "unknown", "-", "-", "-", "-", "-", "-"],
        [
            "runs/new",
            "running",
            "1,200/4,690",
            "accuracy",
            "0.6485",
            "0.6502",
            "10,834",
            "97.3%",
            "12",
            "two",
        ],
        ["runs/old", "completed", "10/10", "-", "-", "-", "-", "-"],
        ["runs/sweep/0", "failed", "3/10", "-", "-", "-", "-", "-", "OSError:", "disk", "full"],
    ]
    named = cli("status", "runs/sweep", "runs/old", "--json")
    rows = json.loads(named.out)
    assert [(row["run"], row["state"]) for row in rows] == [
        ("runs/sweep/0", "failed"),
        ("runs/old", "completed"),
    ]
    assert rows[0]["reason"] == "OSError: disk full"


OTHER = b'5\n[]\nnull\n"x"\n{"a": 1}\n{"kind": "eval", "step": "x"}\n\xff\xfe\x00\n' + b"[" * 100_000
OF_OTHER_KINDS = b"""{"state": 5, "step": "x", "best": [1], "metrics": {"eval/loss": "x", "eval/error": 1},
    "seconds": 3, "goodput": "x", "attempts": [1], "run": "/etc", "asked": 3}"""


@pytest.mark.parametrize("status", [b"[]", b"{", b"[" * 100_000, b"\xff", OF_OTHER_KINDS])
def test_what_no_run_has_written_is_left_out(tmp_path: Path, status: bytes) -> None:
    folder = write_run(tmp_path / "damaged")
    attempt = {"attempt": 1, "step": 0, "config": "x", "machine": [1]}
    row = {"kind": "train", "step": 2, "attempt": 1, "time": 1.0, "train/loss": 3.0}
    (folder / "config.yaml").write_text("train: {steps: 1}")
    (folder / "status.json").write_bytes(status)
    (folder / "metrics.jsonl").write_bytes(OTHER + b"\n" + json.dumps(row).encode() + b"\n")
    (folder / "attempts.jsonl").write_bytes(b"[]\n" + json.dumps(attempt).encode())
    (run,) = collect([folder])
    assert (run["run"], run["state"], run.get("step")) == (str(folder), "unknown", None)
    assert (run.get("metrics") or {}) == ({"eval/error": 1} if status == OF_OTHER_KINDS else {})
    assert read_metrics(folder) == last_rows(folder, {"eval"}) == [row]
    assert read_values(folder, "train/loss") == [3.0] and read_config(folder) == {}
    record = recorded.Recorded.read(folder)
    assert record.attempts == [{"attempt": 1, "step": 0}] and record.rows == [row]
    assert all(part(record) for part in (recorded.overview, recorded.curves, recorded.time, recorded.setting))
    assert find([str(folder)])[0].curve("train/loss", "time")[1].tolist() == [3.0]
    (shown,) = seen.statuses([folder])
    assert seen.look(shown, Followed(folder, seen.KEPT)).curves == {"train/loss": [(2, 3.0)]}


def test_a_long_trouble_is_cut_to_the_width(cli: Callable[..., Finished], tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", state="failed", step=3, total_steps=10, reason=80 * "long words ")
    lines = [line for line in cli("status").out.splitlines() if line.strip()]
    assert len(lines) == 3 and lines[-1].rstrip().endswith("…")
    assert max(map(len, lines)) <= 200


def test_without_runs_it_says_so(cli: Callable[..., Finished]) -> None:
    assert cli("status").out == "no runs in runs/\n"
    assert json.loads(cli("status", "--json").out) == []
    result = cli("status", "runs/nowhere")
    assert (result.rc, result.err) == (2, "dist-train: runs/nowhere: there is no such run.\n")
    with pytest.raises(UserError, match="there is no such run"):
        collect([Path("nowhere")])


def test_squeue_is_asked_once_for_all_jobs(cli: Callable[..., Finished], tmp_path: Path) -> None:
    for job in ("12", "31_1", "9"):
        write_run(tmp_path / "runs" / job, **{**RUNNING, "slurm_job": job, "state": "interrupted"})
    write_run(tmp_path / "runs/none", state="completed", slurm_job=None)
    program = tmp_path / "bin/squeue"
    program.parent.mkdir()
    program.write_text(SQUEUE)
    program.chmod(0o755)
    result = cli("status", "--json", env={"PATH": f"{program.parent}:{os.environ['PATH']}"})
    states = {row["slurm_job"]: row["slurm_state"] for row in json.loads(result.out)}
    assert states == {"12": "RUNNING", "31_1": "PENDING", "9": "ENDED", None: None}
    calls = (tmp_path / "squeue.calls").read_text().splitlines()
    assert [call.split("--jobs=")[1] for call in calls] == ["12,31_1,9"]

    program.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact controller' >&2\nexit 1\n")
    result = cli("status", "--json", env={"PATH": f"{program.parent}:{os.environ['PATH']}"})
    assert {row["slurm_state"] for row in json.loads(result.out)} == {None}


@pytest.fixture
def three(here: Callable[..., Any], small: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Three runs in runs/: their effective rows, by their names."""
    for name, *words in (
        ["slow", "optim.lr=0.01", "model.args.hidden=[8]"],
        ["fast", "optim.lr=0.1", "model.args.hidden=[8]"],
        ["wide", "optim.lr=0.1", "model.args.hidden=[16]", "on_nonfinite=skip"],
    ):
        here(*small, f"run.name={name}", "eval.every=4", *words)
    return {name: read_metrics(Path("runs") / name) for name in ("slow", "fast", "wide")}


def test_runs_are_chosen_and_sorted_by_keys_and_metrics(
    three: dict[str, list[dict[str, Any]]], cli: Callable[..., Finished]
) -> None:
    losses = {
        name: [row["eval/loss"] for row in rows if row["kind"] == "eval"] for name, rows in three.items()
    }

    def listed(*arguments: str) -> list[dict[str, str]]:
        told = cli("status", "--csv", *arguments)
        assert (told.rc, told.err) == (0, ""), told
        return list(csv.DictReader(told.out.splitlines()))

    rows = listed("--sort", "-eval/loss.max", "--show", "train/loss", "--show", "eval/loss.min")
    assert [row["run"] for row in rows] == sorted(
        [f"runs/{name}" for name in three], key=lambda run: max(losses[run[5:]]), reverse=True
    )
    for row in rows:
        name = row["run"][5:]
        assert float(row["eval/loss"]) == losses[name][-1]
        assert float(row["eval/loss.min"]) == min(losses[name])
        assert float(row["train/loss"]) == [r["train/loss"] for r in three[name] if r["kind"] == "train"][-1]
        evaluated = [r["eval/accuracy"] for r in three[name] if r["kind"] == "eval"]
        assert (row["best_metric"], float(row["best"])) == ("eval/accuracy", max(evaluated))
        assert (row["state"], row["step"], row["attempts"]) == ("completed", "12", "1")

    def chosen(*comparisons: str) -> list[str]:
        words = [word for text in comparisons for word in ("--where", text)]
        return [row["run"][5:] for row in listed("--sort", "run", *words)]

    assert chosen("optim.lr=0.1") == ["fast", "wide"]
    assert chosen("optim.lr=1e-1", "model.args.hidden=[8]") == ["fast"]
    assert chosen("optim.lr<0.1") == ["slow"]
    assert chosen("on_nonfinite!=skip", "state=completed", "step>=12") == ["fast", "slow"]
    assert chosen(f"eval/loss<={losses['wide'][-1]}", f"eval/loss>={losses['wide'][-1]}") == ["wide"]
    table = cli("status", "--where", "optim.lr=0.1", "--sort", "eval/loss", "--show", "best")
    heading, _, *lines = table.out.splitlines()
    assert heading.split()[-4:] == ["optim.lr", "eval/loss", "last", "trouble"]
    assert [line.split()[0] for line in lines] == sorted(
        ["runs/fast", "runs/wide"], key=lambda run: losses[run[5:]][-1]
    )
    assert all(line.split()[-2] == "0.1" for line in lines)
    assert cli("status", "--where", "seed=5").out == "none of the runs is so\n"
    asked = json.loads(cli("status", "runs/wide", "--json", "--show", "train.epochs").out)
    assert asked[0]["asked"] == {"train.epochs": None}
    for words, told in (
        (["--sort", "eval/acuracy"], "no run here has 'eval/acuracy' (did you mean 'eval/accuracy'?)"),
        (["--show", "optim.args"], "no run here has 'optim.args' (did you mean 'optim.lr'?)"),
        (["--where", "optim.lrr=1"], "no run here has 'optim.lrr' (did you mean 'optim.lr'?)"),
        (["--where", "optim.lr"], "--where 'optim.lr': write it as KEY=VALUE"),
        (["--where", "state<done"], "< compares numbers, and 'done' is none"),
        (["--csv", "--json"], "give one of --json and --csv"),
    ):
        mistake = cli("status", *words)
        assert mistake.rc == 2 and told in mistake.err and mistake.err.count("\n") == 1, mistake


@pytest.mark.parametrize(
    "text, holds",
    [
        ("lr=0.1", True), ("lr==1e-1", True), ("lr != 0.1", False), ("lr>0.01", True), ("lr<=0.01", False),
        ("name=007", True), ("name=7", True), ("name!=8", True), ("sizes=[8, 4]", True), ("on=true", True),
        ("on<2", True), ("none=null", True), ("none=0", False), ("none<1", False), ("name<9", False),
        ("absent=1", False), ("absent!=1", True), ("absent<1", False), ("word=two words", True),
    ],
)  # fmt: skip
def test_a_comparison_holds_as_a_configuration_would_be_read(text: str, holds: bool) -> None:
    asked = {"lr": 0.1, "name": "007", "sizes": [8, 4], "on": True, "none": None, "word": "two words"}
    assert Comparison.parse(text).holds(asked) is holds


def test_the_end_of_a_history_tells_what_the_whole_of_it_tells(tmp_path: Path) -> None:
    generator = random.Random(3)
    for _ in range(60):
        rows, step = [], 0
        for attempt in range(1, generator.randint(1, 4) + 1):  # each goes on from some step before
            step = generator.randint(0, step)
            for step in range(step + 1, step + generator.randint(1, 40)):  # noqa: B020
                told = {"step": step, "attempt": attempt}
                if generator.random() < 0.7:
                    rows.append({"kind": "train", **told, "train/loss": generator.random()})
                if generator.random() < 0.1:
                    value = generator.random() if generator.random() < 0.8 else None
                    rows.append({"kind": "eval", **told, "eval/loss": value})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "metrics.jsonl").write_text(text[: len(text) - generator.randint(0, 60)])
        whole = read_metrics(tmp_path)
        for kind, name in (("train", "train/loss"), ("eval", "eval/loss")):
            values = [row[name] for row in whole if row["kind"] == kind]
            ends = [row[name] for row in last_rows(tmp_path, {kind}) if row["kind"] == kind]
            assert ends[-1:] == values[-1:]
            assert read_values(tmp_path, name) == [value for value in values if value is not None]


@pytest.mark.slurm
def test_a_real_slurm_tells_the_states_of_jobs(
    slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.variables["SLURM_CONF"])
    sbatch = ["sbatch", "--parsable", "--hold", "--wrap=true"]
    single = slurm.ask(*sbatch, cwd=tmp_path).strip()
    array = slurm.ask(*sbatch, "--array=0-1", cwd=tmp_path).strip()
    try:
        found = slurm_states([single, f"{array}_0", f"{array}_1", "999999"])
        assert found == {
            single: "PENDING",
            f"{array}_0": "PENDING",
            f"{array}_1": "PENDING",
            "999999": "ENDED",
        }
        assert slurm_states(["999999"]) == {"999999": "ENDED"}
    finally:
        slurm.ask("scancel", single, array)
