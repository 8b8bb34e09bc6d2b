"""Training by slurm/*.sbatch on a real Slurm: whatever ends an attempt, the run ends with the same bits."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import ANY

import psutil
import pytest

from tests.distributed.ranks import last, same_bits, status, train
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Jobs
from tests.worlds import write_npz

pytestmark = pytest.mark.slurm

STEPS = 400
SLOW = '''
import os, pathlib, time
from dist_train.tasks import Classification

class Slow(Classification):
    """Steps take 0.2 s as long as there is a file `slow`."""

    def loss(self, outputs, targets):
        if pathlib.Path("slow").exists():
            time.sleep(0.2)
        return super().loss(outputs, targets)

class Failing(Slow):
    """Fails on rank 1 after some steps."""

    steps = 0

    def loss(self, outputs, targets):
        self.steps += 1
        if self.steps == 20 and os.environ["RANK"] == "1":
            raise RuntimeError("this rank fails")
        return super().loss(outputs, targets)
'''
TRAIN = [
    "data.name=arrays", "data.root=arrays.npz", "data.workers=0", "model.args.hidden=[16]",
    "model.args.dropout=0.3", "optim.args.momentum=0.9", "task.name=slow:Slow", "train.batch_size=16",
    f"train.steps={STEPS}", "log.every=5", "checkpoint.every=never", "eval.every=1000", "device=cpu",
    "wandb.mode=disabled",
]  # fmt: skip
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def jobs(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """A folder with data, and `runs/undisturbed`, which two processes made without Slurm."""
    folder = tmp_path_factory.mktemp("jobs")
    write_npz(folder)
    (folder / "slow.py").write_text(SLOW)
    train(folder, *TRAIN, "run.name=undisturbed", processes=2)
    return Jobs(slurm, folder)


@pytest.fixture
def slow(jobs: Jobs) -> Iterator[Callable[[], None]]:
    """Steps are slow until slow() is called."""
    file = jobs.folder / "slow"
    file.touch()
    yield lambda: file.unlink()
    file.unlink(missing_ok=True)


def begin(jobs: Jobs, name: str, *options: str, more: tuple[str, ...] = ()) -> str:
    """Submits a run, on two nodes if not told otherwise; returns the job once it trains."""
    where = options if any(option.startswith("--nodes") for option in options) else (*TWO_NODES, *options)
    arguments = [*TRAIN, f"run.name={name}", *more]
    job = jobs.submit(f"--job-name={name}", "--time=10", *where, arguments=arguments)
    jobs.wait_for_step(job, name, 10)
    return job


def completed(jobs: Jobs, job: str, name: str, attempts: int) -> None:
    """The job completes, the run took so many attempts, and has the bits of the undisturbed one."""
    info = jobs.slurm.wait(job, "COMPLETED")
    assert (info["Restarts"], info["ExitCode"]) == (str(attempts - 1), "0:0"), jobs.said(name)
    assert status(jobs.folder, name)["attempts"] == attempts, jobs.said(name)
    assert same_bits(last(jobs.folder, "undisturbed"), last(jobs.folder, name))
    assert jobs.said(name).count(f"completed at step {STEPS}") == 1  # one file for all attempts


def interrupted(jobs: Jobs, name: str, reason: str) -> None:
    """The run saves in the middle, because of `reason`; Slurm starts no other attempt for some seconds."""
    deadline = time.monotonic() + 120
    while (found := status(jobs.folder, name))["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (found["state"], found["reason"]) == ("interrupted", reason), jobs.said(name)
    assert 10 <= last(jobs.folder, name)["step"] == found["step"] < STEPS


def test_two_nodes_train_like_two_processes(jobs: Jobs) -> None:
    job = begin(jobs, "nodes")
    completed(jobs, job, "nodes", attempts=1)
    assert "2 processes on cpu, 1 CPU thread each" in jobs.said("nodes")


def test_the_time_limit(jobs: Jobs, slow: Callable[[], None]) -> None:
    """By the signal that --signal asks for; and without one, because the run itself knows the limit."""
    reasons = {"warned": "SIGUSR1", "unwarned": "SLURM's time limit is near"}
    unwarned = begin(jobs, "unwarned", "--time=1", "--signal=CONT@1")
    submitted = {"unwarned": unwarned, "warned": begin(jobs, "warned", "--time=2", "--signal=USR1@60")}
    waiting, deadline = dict(submitted), time.monotonic() + 180
    while waiting:  # Slurm looks twice a minute, and may signal so much earlier: either may be the first
        assert time.monotonic() < deadline, waiting
        for name, job in list(waiting.items()):
            # Waiting for one would leave the other no time: it begins again some seconds after it has ended.
            if status(jobs.folder, name)["state"] != "running" and jobs.slurm.state(job) == "PENDING":
                interrupted(jobs, name, reasons[name])
                jobs.slurm.scontrol("update", f"JobId={job}", "TimeLimit=10")
                del waiting[name]
        time.sleep(0.1)
    slow()
    for name, job in submitted.items():
        completed(jobs, job, name, attempts=2)


def test_preemption(jobs: Jobs, slow: Callable[[], None]) -> None:
    job = begin(jobs, "preempted", "--partition=low")
    high = jobs.slurm.sbatch(
        "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", input="#!/bin/bash\nsleep 1\n"
    )
    interrupted(jobs, "preempted", "SIGTERM")
    slow()
    jobs.slurm.wait(high, "COMPLETED")
    completed(jobs, job, "preempted", attempts=2)


def test_requeue_on_the_gpus_of_one_node(jobs: Jobs, slow: Callable[[], None]) -> None:
    job = begin(jobs, "requeued", "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2")
    jobs.slurm.scontrol("requeue", job)
    interrupted(jobs, "requeued", "SIGTERM")
    slow()
    completed(jobs, job, "requeued", attempts=2)


def test_a_cancelled_job_saves_and_is_not_requeued(jobs: Jobs, slow: Callable[[], None]) -> None:
    job = begin(jobs, "cancelled")
    jobs.slurm.ask("scancel", job)
    jobs.slurm.wait(job, "CANCELLED")
    jobs.slurm.wait_until_idle()
    interrupted(jobs, "cancelled", "SIGTERM")
    assert jobs.slurm.job_info(job)["JobState"] == "CANCELLED"
    slow()
    again = jobs.submit("--job-name=again", *TWO_NODES, arguments=[*TRAIN, "run.name=cancelled"])
    jobs.slurm.wait(again, "COMPLETED")
    assert same_bits(last(jobs.folder, "undisturbed"), last(jobs.folder, "cancelled"))


def ranks_of(jobs: Jobs, name: str) -> list[psutil.Process]:
    """The processes of a run, by SLURM's number."""
    found = {}
    for process in jobs.slurm.processes():
        with contextlib.suppress(psutil.Error):  # it has just ended
            words = process.cmdline()
            if words[1:4] == ["-m", "dist_train", "train"] and f"run.name={name}" in words:
                found[process.environ()["SLURM_PROCID"]] = process
    return [process for _, process in sorted(found.items())]


def test_a_killed_rank_ends_the_job(jobs: Jobs, slow: Callable[[], None]) -> None:
    job = begin(jobs, "killed")
    ranks_of(jobs, "killed")[1].kill()
    info = jobs.slurm.wait(job, "FAILED")
    assert (info["Restarts"], info["ExitCode"]) == ("0", "137:0")
    assert status(jobs.folder, "killed")["state"] == "failed"


def test_a_killed_rank_of_one_node_is_replaced(jobs: Jobs, slow: Callable[[], None]) -> None:
    job = begin(jobs, "mended", "--nodes=1", "--ntasks-per-node=2", "--export=ALL,max_restarts=3")
    rank_0 = psutil.Process(json.loads((jobs.folder / "runs/mended/lock").read_text())["pid"])
    forked = sorted(rank_0.parent().children(), key=lambda process: process.pid)  # type: ignore[union-attr]
    forked[forked.index(rank_0) + 1].kill()
    jobs.wait(job, lambda: "going on from the copy of the state in memory" in jobs.said("mended"))
    slow()
    info = jobs.slurm.wait(job, "COMPLETED")
    assert info["Restarts"] == "0" and "another process takes its place" in jobs.said("mended")
    assert same_bits(last(jobs.folder, "undisturbed"), last(jobs.folder, "mended"))


def test_a_failing_rank_is_no_interruption(jobs: Jobs) -> None:
    """srun sends SIGTERM to the other rank; if that ended with 75, so would srun, and the job went on."""
    arguments = [*TRAIN, "run.name=failing", "task.name=slow:Failing"]
    job = jobs.submit("--job-name=failing", *TWO_NODES, arguments=arguments)
    info = jobs.slurm.wait(job, "FAILED")
    assert (info["Restarts"], info["ExitCode"]) == ("0", "1:0"), jobs.said("failing")
    assert "this rank fails" in jobs.said("failing")
    assert status(jobs.folder, "failing")["state"] == "failed"


def test_a_lost_node(jobs: Jobs, slow: Callable[[], None]) -> None:
    """First that of the batch shell, which is cut off but lives on; then the power of another one fails.

    The batch shell and rank 0 see an interruption there, but Slurm has requeued the job already.
    """
    job = begin(jobs, "lost", more=("checkpoint.every=10",))
    jobs.slurm.kill_node("n1")
    interrupted(jobs, "lost", ANY)
    jobs.wait_for_step(job, "lost", status(jobs.folder, "lost")["step"] + 20)
    assert jobs.slurm.job_info(job)["NodeList"] == "n[2-3]"
    jobs.slurm.start_node("n1")
    jobs.slurm.kill_node("n3", jobs=True)
    slow()
    completed(jobs, job, "lost", attempts=3)
    jobs.slurm.start_node("n3")
    jobs.slurm.wait_until_idle()


def test_a_sweep_of_three_with_one_interrupted(jobs: Jobs, slow: Callable[[], None]) -> None:
    """Two at a time; the task that is interrupted goes on with its own run, under its own id."""
    (jobs.folder / "rates.yaml").write_text(
        "method: grid\nparameters:\n  optim.lr: {values: [0.05, 0.1, 0.2]}\n"
    )
    shared = [argument for argument in TRAIN if not argument.startswith("optim.lr=")]
    options = ["--job-name=sweep", "--array=0-2%2", "--time=10"]
    array = jobs.submit(*options, script="sweep.sbatch", arguments=["rates.yaml", *shared])
    jobs.wait_for_step(f"{array}_1", "rates-1", 10)
    jobs.slurm.ask("scancel", "--signal=USR1", f"{array}_1")
    interrupted(jobs, "rates-1", "SIGUSR1")
    slow()
    for task, rate in enumerate((0.05, 0.1, 0.2)):
        info = jobs.slurm.wait(f"{array}_{task}", "COMPLETED")
        assert info["Restarts"] == str(int(task == 1))
        assert status(jobs.folder, f"rates-{task}")["attempts"] == 1 + (task == 1)
        config = last(jobs.folder, f"rates-{task}")["config"]
        assert (config["optim"]["lr"], config["wandb"]["group"]) == (rate, "rates")


def test_ranks_that_would_train_alone_are_refused(slurm: Cluster, tmp_path: Path) -> None:
    """A first node without an address, and a rank that the batch shell filled in once, for all."""
    write_npz(tmp_path)
    wrong = {
        "nowhere": "the address of the first node, nowhere1, can't be found",
        "alike": "RANK is 0 in the task that SLURM numbers 1",
    }
    site = """
    case $SLURM_JOB_NAME in
        nowhere) python=(env "SLURM_STEP_NODELIST=nowhere[1-2]" "${python[@]}") ;;
        alike) export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS ;;
    esac
    """
    jobs = Jobs(slurm, tmp_path, site=site)
    plain = [argument for argument in TRAIN if not argument.startswith("task.")]
    submitted = {
        name: jobs.submit(f"--job-name={name}", *TWO_NODES, arguments=[*plain, f"run.name={name}"])
        for name in wrong
    }
    for name, job in submitted.items():
        info = slurm.wait(job, "FAILED")
        # A rank that srun ends because another has failed may still be starting, and then says 75, which is
        # more than 2: the job is tried once more.
        restarts = int(info["Restarts"])
        assert restarts <= 1 and info["ExitCode"] == "2:0", jobs.said(name)
        assert 1 <= jobs.said(name).count(wrong[name]) <= 1 + restarts, jobs.said(name)
        assert not (tmp_path / "runs").exists()
