"""What the loop can't notice by itself: hangs, launchers that are gone, deadlines."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from dist_train import fit
from dist_train.cluster import slurm
from dist_train.config import UserError, from_mapping, load, parse_seconds
from dist_train.guard import watchdog
from dist_train.guard.interrupt import Interrupt
from dist_train.guard.lock import Lock
from dist_train.guard.watchdog import check_seconds, last_rank
from dist_train.record.history import read_status
from dist_train.tools.status import collect
from tests.distributed.ranks import last
from tests.processes import REPO, Finished, finish
from tests.warm import Process
from tests.worlds import SMALL

HANGS = """
import ctypes, os, pathlib, time
from dist_train.guard import watchdog

watchdog.LOOK_SECONDS, watchdog.SILENT_SECONDS, watchdog.GIL_SECONDS = 0.5, 2, 3  # all of it sooner

def hangs(image):
    time.sleep(0.002)
    if os.environ.get("RANK", "0") == os.environ["HANGING"] and pathlib.Path("now").exists():
        stuck()
    return image

def stuck():
    if "PAUSES" in os.environ:  # for longer than the watchdog waits, but not for good
        pathlib.Path("now").unlink()
        while not pathlib.Path("runs/run/stacks/rank-0.txt").exists():
            time.sleep(0.01)
        return time.sleep(1)
    if "HOLDS" in os.environ:
        ctypes.PyDLL(None).sleep(600)
    if "DIES" in os.environ:  # when rank 0 has noticed
        while not pathlib.Path("runs/run/stacks/rank-0.txt").exists():
            time.sleep(0.01)
        time.sleep(0.7)
        os._exit(9)
    time.sleep(600)
"""
HANGING = [*SMALL, "data.train_transform=[mine:hangs]", "train.steps=100000", "log.every=5"]
ACCELERATE = [Path(sys.executable).parent / "accelerate", "launch", "--config_file"]


def torchrun(*arguments: Any) -> list[Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launcher, "-m", "dist_train", *arguments]


# --- by a clock of the test's own --------------------------------------------------------------------


class Watched:
    """A watchdog of one rank that looks when the test says so, and what it has done."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.ends: list[str] = []
        self.told: list[str] = []
        self.interrupt = Interrupt()
        self.lock = Lock(folder)
        self.lock.acquire(print)
        alone: Any = SimpleNamespace(rank=0, is_main=True, world_size=1)
        where = {"dir": str(folder.parent), "name": folder.name}
        config = from_mapping({"run": where, "train": {"steps": 1}, **options})
        monkeypatch.setattr(watchdog, "_end", self.ends.append)
        monkeypatch.setattr(watchdog, "LOOK_SECONDS", 10_000)  # its own thread never looks
        self.dog = watchdog.Watchdog(config, alone, self.interrupt, time.monotonic(), self.lock, self.fail)
        monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.001)
        self.began = self.dog.at[0]
        self.moves = False  # whether the step ends while the stacks are written

    def fail(self, reason: str) -> None:
        self.told.append(reason)
        if self.moves:
            self.dog.beat(1, "computing")

    def look(self, seconds: float) -> None:
        """A look so many seconds after the last step, or after the start."""
        self.dog.look(self.began + seconds)


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watched]]:
    """watched(watchdog_seconds=600, stop_after="1h") -> Watched"""
    made: list[Watched] = []
    folder = tmp_path / "run"
    folder.mkdir()

    def make(**options: Any) -> Watched:
        made.append(Watched(folder, monkeypatch, **options))
        return made[-1]

    yield make
    for one in made:
        one.dog.stop()


def test_a_hang_is_ended_after_its_time_and_not_before(
    watched: Callable[..., Watched], tmp_path: Path
) -> None:
    it = watched(watchdog_seconds=600)
    it.look(599)
    assert (it.ends, it.told, it.dog.reason) == ([], [], "")
    it.look(601)
    (reason,) = it.told
    assert reason.startswith("no step for 600 s; it was starting after step 0; the stacks")
    assert it.ends == [f"rank 0: {reason}"]
    assert "in test_a_hang_is_ended" in (tmp_path / "run/stacks/rank-0.txt").read_text()


def test_each_step_gives_the_whole_time_again_and_one_that_ends_late_is_no_hang(
    watched: Callable[..., Watched],
) -> None:
    it = watched(watchdog_seconds=600)
    it.began = time.monotonic()
    it.dog.beat(1, "computing")
    it.look(599)
    assert not it.told
    it.moves = True
    it.look(602)
    assert len(it.told) == 1 and not it.ends and not it.dog.reason


def test_without_a_time_for_hangs_there_are_none(watched: Callable[..., Watched], tmp_path: Path) -> None:
    it = watched(watchdog_seconds=0)
    it.look(10**9)
    assert not it.told and not it.ends and not (tmp_path / "run/stacks").exists()


def test_a_deadline_asks_to_stop_when_it_is_there(watched: Callable[..., Watched]) -> None:
    it = watched(stop_after="1h")
    it.look(3590)
    assert not it.interrupt.is_set()
    it.look(3600)
    assert it.interrupt.reason == "stop_after=1h"


def test_the_lock_is_renewed_and_who_has_lost_it_ends(watched: Callable[..., Watched]) -> None:
    it = watched()
    os.utime(it.lock.path, (1, 1))
    it.look(0)
    assert it.lock.path.stat().st_mtime > 1
    os.utime(it.lock.path, (1, 1))
    it.look(4.9)  # it is renewed each five seconds
    assert it.lock.path.stat().st_mtime == 1
    it.lock.path.write_text('{"token": "of another attempt"}')
    it.look(5)
    assert it.ends == [f"another attempt has taken {it.lock.path}; this one ends."]


# --- hangs -------------------------------------------------------------------------------------------


def test_a_hang_ends_with_the_stacks_and_the_name_of_the_rank_that_came_last(
    begin_ranks: Callable[..., list[Process]], under_way: Callable[..., Process], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(HANGS)
    run = tmp_path / "runs" / "run"
    processes = begin_ranks(2, "train", *HANGING, "watchdog_seconds=3", env={"HANGING": 1})
    under_way(processes[0])
    (tmp_path / "now").touch()
    first, second = (finish(process, 60) for process in processes)
    assert (first.rc, second.rc) == (1, 1)
    status = read_status(run)
    assert status["state"] == "failed"
    assert "no step for 3 s; rank 1 came last: it is waiting for data after step" in status["reason"]
    assert status["reason"] in first.err
    assert "in stuck" in (run / "stacks" / "rank-1.txt").read_text()
    assert "in stuck" not in (run / "stacks" / "rank-0.txt").read_text()


@pytest.mark.long
def test_a_rank_that_hangs_until_it_dies_is_named_under_torchrun(
    start: Callable[..., subprocess.Popen[str]],
    under_way: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    """It dies before the watchdogs have ended anything; torchrun then ends the other one."""
    (tmp_path / "mine.py").write_text(HANGS)
    run = tmp_path / "runs" / "run"
    command = torchrun("train", *HANGING, "watchdog_seconds=3")
    process = under_way(start(*command, env={"HANGING": 1, "DIES": 1}))
    (tmp_path / "now").touch()
    ended = finish(process, 60)
    assert ended.rc == 1
    status = read_status(run)
    assert status["state"] == "failed"
    assert "no step for 3 s; rank 1 came last: it is waiting for data after step" in status["reason"]
    assert status["reason"] in ended.err
    assert "in stuck" not in (run / "stacks" / "rank-0.txt").read_text()


@pytest.mark.long
def test_a_step_that_was_slow_but_ends_is_no_hang(
    begin: Callable[..., Process],
    under_way: Callable[..., Process],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text(HANGS)
    run = tmp_path / "runs" / "run"
    process = under_way(begin("train", *HANGING, "watchdog_seconds=3", env={"HANGING": 0, "PAUSES": 1}))
    (tmp_path / "now").touch()
    wait_for((run / "stacks" / "rank-0.txt").exists, process)
    at = read_status(run)["step"]
    wait_for(lambda: read_status(run)["state"] == "running" and read_status(run)["step"] > at, process)
    time.sleep(4)  # the watchdog would have ended it by now
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "no step for 3 s" in err


@pytest.mark.long
def test_code_that_holds_the_lock_of_python_ends_with_its_stacks(
    begin: Callable[..., Process], under_way: Callable[..., Process], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(HANGS)
    stacks = tmp_path / "runs" / "run" / "stacks"
    process = under_way(begin("train", *HANGING, "watchdog_seconds=1", env={"HANGING": 0, "HOLDS": 1}))
    assert [path.stat().st_size for path in stacks.iterdir()] == [0]
    (tmp_path / "now").touch()
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert "in stuck" in (stacks / "rank-0-gil.txt").read_text()
    (row,) = collect([stacks.parent])
    assert row["state"] == "lost" and row["trouble"].endswith(f"is gone; its stacks are in {stacks}"), row


@pytest.mark.long
def test_a_stopped_rank_is_named_by_the_others(
    ranks_running: tuple[list[Process], Path],
) -> None:
    (first, second), run = ranks_running
    second.send_signal(signal.SIGSTOP)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "rank 1 came last: nothing was heard of it for 2 s or more" in read_status(run)["reason"], err


@pytest.fixture
def ranks_running(
    begin_ranks: Callable[..., list[Process]], under_way: Callable[..., Process], tmp_path: Path
) -> tuple[list[Process], Path]:
    """Two ranks in the middle of a training, without a launcher that would end them, and their run."""
    (tmp_path / "mine.py").write_text(HANGS)
    words = ["train", *HANGING, "watchdog_seconds=4"]
    processes = begin_ranks(2, *words, env={"HANGING": "none"})
    under_way(processes[0])
    return processes, tmp_path / "runs" / "run"


def test_the_last_rank_is_the_silent_one_else_the_one_with_the_fewest_steps() -> None:
    now = 1000.0
    computing, waiting = (now, 7, "computing"), (now, 7, "waiting for data")
    assert "rank 2 came last: nothing was heard" in last_rank({0: computing, 1: computing}, 3, now)
    assert "rank 1 came last: nothing was heard" in last_rank({0: computing, 1: (990.0, 9, "saving")}, 2, now)
    assert "rank 1 came last: it is waiting for data after step 7" in last_rank(
        {0: computing, 1: waiting}, 2, now
    )
    assert "rank 0 came last" in last_rank({0: (now, 6, "saving"), 1: waiting}, 2, now)
    assert last_rank({0: computing, 1: computing}, 2, now) == "all ranks are computing after step 7"
    assert "store does not answer" in last_rank({}, 2, now)
    many = last_rank({0: computing}, 16_384, now)
    assert "rank 1, 2, 3, 4, 5, 6, 7, 8 and 16,375 others came last" in many


def test_a_watch_too_short_for_thousands_of_ranks_is_refused() -> None:
    check_seconds(1, 1000)
    check_seconds(0, 16_384)
    check_seconds(37, 16_384)
    with pytest.raises(UserError, match=r"watchdog_seconds: 20 is too short for 16,384 .* at least 37\.$"):
        check_seconds(20, 16_384)


# --- launchers ---------------------------------------------------------------------------------------


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a launcher has started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] if "train" in child.cmdline() else []
    return found


def saved_because(run: Path, reason: str) -> bool:
    """Whether the run was interrupted for this reason, and has saved its last step."""
    status, step = read_status(run), last(run.parent.parent)["step"]
    return (status["state"], status["reason"], status["step"]) == ("interrupted", reason, step) and step > 0


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.nightly)])
def test_ranks_whose_launcher_is_gone_save_and_end(
    launcher: str,
    start: Callable[..., subprocess.Popen[str]],
    under_way: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    """SIGKILL for torchrun; SIGTERM for `accelerate launch` of one process, which does not pass it on."""
    (tmp_path / "mine.py").write_text(HANGS)
    run = tmp_path / "runs" / "run"
    words = [*HANGING, "checkpoint.every=never"]
    command = torchrun("train", *words)
    if launcher == "accelerate":
        command = [*ACCELERATE, REPO / "launch/cpu.yaml", "-m", "dist_train", "train", *words]
    process = under_way(start(*command, env={"HANGING": "none"}))
    family = children(process)
    assert len(family) == (2 if launcher == "torchrun" else 1)
    process.send_signal(signal.SIGKILL if launcher == "torchrun" else signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert saved_because(run, "the launcher is gone"), read_status(run)


STARTS = """
import os, pathlib, time

def data(train, root):
    pathlib.Path(f"starts-{os.environ['RANK']}").touch()
    time.sleep(600)
"""


@pytest.mark.long
@pytest.mark.parametrize("when", ["while they import", "while one waits for the other"])
def test_ranks_whose_launcher_is_gone_while_they_start_end_at_once(
    when: str, start: Callable[..., Any], wait_for: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(STARTS)
    words = ["data.name=slow:data", "train.steps=9", "device=cpu", "wandb.mode=disabled"]
    if when == "while they import":  # which does not come to its end
        (tmp_path / "accelerate.py").write_text(f"{STARTS}\ndata(True, '')\n")
    process = start(*torchrun("train", *words))
    ranks = 2 if when == "while they import" else 1
    wait_for(lambda: len(list(tmp_path.glob("starts-*"))) == ranks, process)
    family = children(process)
    assert len(family) == 2
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.nightly)])
def test_launchers_pass_sigusr1_on_with_the_variables_of_signals_sh(
    launcher: str,
    start: Callable[..., subprocess.Popen[str]],
    under_way: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text(HANGS)
    run = tmp_path / "runs" / "run"
    words = ["train", *HANGING, "checkpoint.every=never"]
    command = [sys.executable, *torchrun(*words)]
    if launcher == "accelerate":
        command = [*ACCELERATE, REPO / "launch/cpu_2.yaml", "-m", "dist_train", *words]
    sourced = ["bash", "-c", f'. {REPO}/launch/signals.sh; exec "$@"', "bash"]
    process = under_way(start(*sourced, *command, env={"HANGING": "none"}))
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err  # the launcher lived on, and calls what it was told to do a failure
    assert saved_because(run, "SIGUSR1"), read_status(run)


@pytest.mark.long
def test_a_rank_that_dies_is_restarted_with_the_rest_and_nothing_changes(
    start: Callable[..., subprocess.Popen[str]],
    cli: Callable[..., Finished],
    wait_for: Callable[..., None],
    npz: Path,
    tmp_path: Path,
) -> None:
    from tests.distributed.ranks import same_bits, train

    words = ["data.name=arrays", "data.root=arrays.npz", "model.args.dropout=0.3", "train.batch_size=16",
             "train.steps=400", "log.every=5", "checkpoint.every=5", "eval.every=100"]  # fmt: skip
    train(tmp_path, *words, "run.name=undisturbed", processes=2)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=2"]
    options = ["wandb.mode=disabled", "device=cpu"]
    process = start(*launcher, "-m", "dist_train", "train", *words, *options, "run.name=killed")
    run = tmp_path / "runs" / "killed"
    wait_for(lambda: read_status(run).get("step", 0) >= 5, process)
    children(process)[-1].kill()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert (read_status(run)["state"], read_status(run)["attempts"]) == ("completed", 2)
    assert same_bits(last(tmp_path, "undisturbed"), last(tmp_path, "killed"))


def test_the_store_by_which_ranks_met_ends_with_the_run(
    ranks: Callable[..., list[Finished]], npz: Path
) -> None:
    """Else ranks that meet again at this port find what those of the last run left there."""
    finished = ranks(2, train_and_look)
    assert [rank.rc for rank in finished] == [0, 0], finished
    assert finished[0].out.split() == ["refused"]


def train_and_look() -> None:
    """Trains with nobody who frees what refers to itself; then rank 0 asks for the store."""
    gc.disable()
    fit(load([], [*SMALL, "train.steps=2"]))
    if os.environ["RANK"] == "0":
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 5).close()
            print("answers")
            return
        print("refused")


# --- deadlines ---------------------------------------------------------------------------------------


def test_a_run_stops_itself_in_time_with_a_checkpoint(
    cli: Callable[..., Finished], npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(HANGS)
    begin = time.monotonic()
    stopped = cli("train", *HANGING, "stop_after=4 s", env={"HANGING": "none"})
    assert stopped.rc == 75, stopped
    assert time.monotonic() - begin >= 4
    run = tmp_path / "runs" / "run"
    assert saved_because(run, "stop_after=4 s"), read_status(run)


def test_the_time_limit_of_slurm_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "JobId=7 JobName=x StartTime=2026-01-01T00:00:00 EndTime={} Deadline=N/A"
    scontrol = tmp_path / "scontrol"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    for end, expected in (
        ("2030-05-06T07:08:09", datetime(2030, 5, 6, 7, 8, 9).timestamp()),
        ("Unknown", None),
    ):
        scontrol.write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\necho '{answer.format(end)}'\n")
        scontrol.chmod(0o755)
        assert slurm.end_time(job) == expected
        assert (tmp_path / "asked").read_text().split()[-1] == "7_2"
    assert slurm.end_time({}) is None
    assert slurm.end_time({**job, "SLURM_JOB_END_TIME": "1900000000"}) == 1.9e9


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13_800), ("90 s", 90), ("1d", 86_400), ("2 hours", 7200), ("1h 30min", 5400), ("0.5h", 1800)],
)
def test_durations_are_written_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3x", "h", "-5s", "3h50"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="3h50m"):
        parse_seconds(text)
