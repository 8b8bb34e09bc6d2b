"""One attempt at a time in a run's folder; what a dead one left behind is no obstacle."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import UserError
from dist_train.guard import lock as locks
from dist_train.guard.lock import Lock
from dist_train.record.history import read_status
from tests.processes import Finished
from tests.warm import Process
from tests.worlds import SMALL

SLOW = """
import time
from dist_train.guard import watchdog

watchdog.LOOK_SECONDS, watchdog.RENEW_SECONDS = 0.2, 0.5  # who has lost the lock notices it sooner

def slow(image):
    time.sleep(0.01)
    return image
"""
SLOWLY = [*SMALL, "data.train_transform=[mine:slow]", "train.steps=60", "checkpoint.every=5", "log.every=1"]
TAKEN = 6  # times that processes which contend for a lock get it
ENDLESS = ["train", *SLOWLY, "train.steps=100000"]


def hold(folder: Path, **changes: object) -> Path:
    """A lock file of another process."""
    holder = {"host": "elsewhere", "pid": 1, "started": 0.0, "slurm_job": None, "restart": 0, "token": "x"}
    (folder / "lock").write_text(json.dumps(holder | changes))
    return folder / "lock"


def saved(run: Path) -> bool:
    """Whether the run has a checkpoint."""
    return (run / "checkpoints/last.pt").exists()


def test_a_second_attempt_is_refused_and_a_killed_one_is_no_obstacle(
    begin: Callable[..., Process],
    under_way: Callable[..., Process],
    cli: Callable[..., Finished],
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text(SLOW)
    run = tmp_path / "runs" / "run"
    first = under_way(begin(*ENDLESS), until=saved)
    second = cli("train", *SLOWLY)
    assert second.rc == 2, second
    assert second.err.count("\n") == 1 and f"process {first.pid} on" in second.err, second
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (run / "lock").exists()
    step = read_status(run)["step"]
    third = cli("train", *SLOWLY, f"train.steps={step + 10}")
    assert third.rc == 0, third
    assert not (run / "lock").exists()


@pytest.mark.long
def test_a_newer_attempt_of_a_slurm_job_takes_over_and_the_older_one_ends(
    begin: Callable[..., Process],
    under_way: Callable[..., Process],
    cli: Callable[..., Finished],
    tmp_path: Path,
) -> None:
    """As when a node is cut off: SLURM starts the job elsewhere, the old ranks know nothing of it."""
    (tmp_path / "mine.py").write_text(SLOW)
    run = tmp_path / "runs" / "run"
    job = {"SLURM_JOB_ID": 7, "SLURM_JOB_END_TIME": int(time.time()) + 86400}
    old = under_way(begin(*ENDLESS, env=job), until=saved)
    assert cli("train", *SLOWLY, env=job).rc == 2
    words = [*SLOWLY, "train.steps=100000", "stop_after=5 s"]
    new = cli("train", *words, env=job | {"SLURM_RESTART_COUNT": 1})
    assert new.rc == 75, new
    _, err = old.communicate(timeout=30)
    assert old.returncode == 1
    assert "another attempt has taken" in err
    assert {"state": "interrupted", "attempts": 2}.items() <= read_status(run).items()


def test_a_lock_of_another_host_counts_as_long_as_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "STALE_SECONDS", 1.5)
    path = hold(tmp_path)
    told: list[str] = []
    alive = threading.Timer(0.7, os.utime, [path])
    alive.start()
    with pytest.raises(UserError, match="process 1 on elsewhere is training this run"):
        Lock(tmp_path).acquire(told.append)
    assert "waiting up to" in told[0]
    mine = Lock(tmp_path)
    mine.acquire(told.append)  # nobody renews it any more
    assert mine.is_ours()
    assert [item.name for item in tmp_path.iterdir()] == ["lock"]
    hold(tmp_path)
    assert not mine.renew()
    mine.release()  # it is not ours to delete
    assert path.exists()


def test_a_pid_that_another_program_has_now_is_no_holder(tmp_path: Path) -> None:
    mine = Lock(tmp_path)
    mine.acquire(print)
    holder = json.loads(mine.path.read_text())
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        Lock(tmp_path).acquire(print)
    hold(tmp_path, **holder | {"started": holder["started"] - 3600})
    Lock(tmp_path).acquire(print)


@pytest.mark.parametrize("stale", [True, False])
def test_of_attempts_that_find_the_same_stale_lock_or_none_one_goes_on(stale: bool, tmp_path: Path) -> None:
    if stale:
        hold(tmp_path, host=os.uname().nodename, pid=2**22 + 1)
    outcomes: list[str] = []

    def attempt() -> None:
        try:
            Lock(tmp_path).acquire(outcomes.append)
            outcomes.append("taken")
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 3 + ["taken"]


@pytest.mark.parametrize("operation", ["link", "replace"])
def test_an_attempt_that_comes_in_while_another_one_takes_a_stale_lock_is_no_second(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the one waits between any two of its operations."""
    hold(tmp_path, host=os.uname().nodename, pid=2**22 + 1)
    plain = getattr(os, operation)
    taken: list[Lock] = []

    def attempt() -> None:
        mine = Lock(tmp_path)
        try:
            mine.acquire(print)
        except UserError as error:
            assert str(tmp_path) in str(error)
        else:
            taken.append(mine)

    def slow(*paths: Path) -> None:
        monkeypatch.setattr(os, operation, plain)
        attempt()
        plain(*paths)

    monkeypatch.setattr(os, operation, slow)
    attempt()
    assert [mine.is_ours() for mine in taken] == [True]


def contend(folder: Path, seed: int, linked: bool) -> None:
    """Attempt after attempt, each a process of its own, until the lock was taken often enough."""
    chance = random.Random(seed)
    while len((folder / "taken").read_bytes()) < TAKEN:
        number = chance.random()
        if not os.fork():
            try:
                one_attempt(folder, random.Random(number), linked)
            except BaseException as error:
                print(repr(error), flush=True)
            os._exit(0)
        os.wait()


def one_attempt(folder: Path, chance: random.Random, linked: bool) -> None:
    """Takes the lock, slowly, and may be killed ahead of any operation; tells if another one has it, too."""

    def disturb(event: str, values: tuple[Any, ...]) -> None:
        writes = event in ("os.link", "os.rename", "os.remove") or (event == "open" and values[1] != "rb")
        if writes and any(str(value).startswith(f"{folder}/lock") for value in values):
            time.sleep(chance.choice([0, 0.01, 0.15]))
            if not linked and event == "os.link":
                raise OSError(errno.EPERM, "no hard links here")
            if chance.random() < 0.05:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(disturb)
    mine = Lock(folder)
    try:
        mine.acquire(print)
    except UserError:
        return time.sleep(0.02)
    held = os.open(folder / "held", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends
    except OSError:
        print("two of them have it")
    with (folder / "taken").open("a") as taken:
        taken.write("x")
    time.sleep(0.1)
    if chance.random() < 0.3:
        mine.release()


@pytest.mark.long
@pytest.mark.parametrize("linked", [True, False])
def test_of_attempts_that_are_slow_and_killed_anywhere_never_two_hold_the_lock(
    linked: bool, begin: Callable[..., Process], tmp_path: Path
) -> None:
    """Where there are hard links, and where there are none."""
    hold(tmp_path, host=os.uname().nodename, pid=2**22 + 1)
    (tmp_path / "taken").touch()
    contenders = [begin(contend, tmp_path, seed, linked) for seed in range(4)]
    assert [each.communicate(timeout=60) for each in contenders] == [("", "")] * 4
    Lock(tmp_path).acquire(print)
    assert [item.name for item in tmp_path.glob("lock*")] == ["lock"]


def test_an_attempt_that_ends_before_its_first_step_gives_the_lock_back(
    here: Callable[..., Any], npz: Path, tmp_path: Path
) -> None:
    """Also in a process that lives on, as a notebook's does."""
    run = tmp_path / "runs" / "run"
    (run / "config.yaml").mkdir(parents=True)  # in the way of what is written after the lock is taken
    with pytest.raises(UserError, match="can't be written"):
        here(*SMALL, "train.steps=2")
    assert not (run / "lock").exists()
    (run / "config.yaml").rmdir()
    assert here(*SMALL, "train.steps=2").step == 2
