"""One attempt at a time in a run's folder; what a dead one left behind is no obstacle."""

from __future__ import annotations

import json
import os
import signal
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
