"""`dist-train status`: what is told of a run is what is true of it, also when the run can't tell any more."""

from __future__ import annotations

import json
import os
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
