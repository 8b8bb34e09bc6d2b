"""dist-train launch: ranks are killed wherever they are, and the run ends as if nothing had been."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dist_train.record.history import read_lines, read_metrics, read_status
from tests.distributed.ranks import last, same_bits
from tests.processes import Finished, finish, lives
from tests.warm import Process

# Ranks kill themselves, once at each of the places that DIE names; copies are taken as often as it goes.
DIES = """
import atexit, fcntl, os, pathlib, signal, sys, time
from dist_train.checkpoint import memory, saver
from dist_train import learner, runtime, trainer
from dist_train.cluster import board
from dist_train.tasks import Classification

memory.SHARE = memory.SHORTEST_SECONDS = 0

SAVED, LATER = "saved-step-00000020.pt-0", "step23-1"  # one dies while it saves beside its steps

def told():
    return pathlib.Path("told.txt").read_text().split()

def at(place):
    rank = int(os.environ.get("RANK", 0))
    place = f"{place}-{rank}"
    if place not in os.environ.get("DIE", "").split() or place in told():
        return
    while place == LATER and SAVED in os.environ["DIE"].split() and SAVED not in told():
        time.sleep(0.01)  # else it might be saved by then
    with open("told.txt", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # one dies at a time
        if "starting" not in place:
            if board.current.generation != len(told()) or not board.current.are_ready([rank]):
                return  # the other is dead: without it nothing comes of this place, and it is reached again
            until = time.monotonic() + 60
            while not board.current.are_ready([1 - rank]) and time.monotonic() < until:
                time.sleep(0.01)  # this may be the first step since it has died, and it may not have begun
        file.write(f"{place} ")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

class Dies(Classification):
    step = 0

    def losses(self, model, batch):
        Dies.step = batch.part.step
        at(f"step{batch.part.step}")
        return super().losses(model, batch)

class Weighs(Dies):
    def losses(self, model, batch):
        return super().losses(model, batch)[0], 1.0 + batch.targets % 2

def summing(sum_soon):
    def function(self, tensor):
        finish = sum_soon(self, tensor)
        at(f"summing{Dies.step}")
        return finish
    return function

def evaluating(evaluate):
    def function(self, batches, *arguments):
        def dying():
            yield from batches
            at(f"evaluating{self.step}")
        return evaluate(self, dying(), *arguments)
    return function

def dying(write, place):
    def function(path, *arguments):
        write(path, *arguments)
        at(f"{place}-{path.name}")
    return function

def copying(copy):
    def function(self):
        if self.learner.step > 15:
            at("copying")
        copy(self)
        if self.learner.step > 25:
            at("copied")
    return function

def settled(is_copy_due):
    def function(self):
        if Dies.step > 25:  # else they are over before a slow disk has what was saved, and no copy is due
            self.wait()
        return is_copy_due(self)
    return function

saver.Checkpoints.is_copy_due = settled(saver.Checkpoints.is_copy_due)
saver.write_atomically = dying(saver.write_atomically, "saved")
saver.point = dying(saver.point, "linked")
trainer.Trainer.copy = copying(trainer.Trainer.copy)
runtime.Runtime.sum_soon = summing(runtime.Runtime.sum_soon)
learner.Learner.evaluate = evaluating(learner.Learner.evaluate)
at("starting")

def tell(known=frozenset(sys.modules)):
    new = [name for name in set(sys.modules) - known if name.startswith(("torch", "accelerate", "numpy"))]
    pathlib.Path(f"imported-{os.environ.get('RANK')}.txt").write_text(" ".join(new))

atexit.register(tell)
"""
JOB = ["task.name=mine:Dies", "train.ema=0.9", "optim.args.momentum=0.9", "train.steps=40", "log.every=4",
       "eval.every=10", "data.shuffle=true"]  # fmt: skip
MLP = ["model.args.hidden=[16]", "model.args.dropout=0.2"]
CNN = ["model.name=cnn", "model.args.widths=[8]"]  # with BatchNorm
WEIGHS = "task.name=mine:Weighs"
PLACES = {"starting-1", "evaluating10-1", "step13-0", "copying-0", "step23-1", "copied-1", "evaluating30-0"}
IN_A_SUM = {"summing12-1", "summing14-0"}  # of what a step's targets weigh, beside its backward pass
IN_A_SAVE = {"saved-step-00000020.pt-0", "linked-best.pt-0"}


@pytest.fixture
def job(tmp_path: Path, small: list[str]) -> list[str]:
    """A training of 40 steps whose ranks die at the places that DIE names."""
    (tmp_path / "mine.py").write_text(DIES)
    (tmp_path / "told.txt").touch()
    return [*small, *JOB]


def history(run: Path) -> list[dict[str, object]]:
    """The rows of metrics that count, without what a clock tells."""
    return [
        {k: v for k, v in row.items() if k not in ("time", "attempt") and not k.startswith("perf/")}
        for row in read_metrics(run)
    ]


def assert_equal(folder: Path, killed: str = "killed") -> None:
    """Weights, average, optimizer, metrics, the best and the history are those of the run `undisturbed`."""
    one, other = last(folder, "undisturbed"), last(folder, killed)
    assert same_bits(one, other)
    assert (one["step"], one["best"], one["best_step"]) == (other["step"], other["best"], other["best_step"])
    assert history(folder / "runs/undisturbed") == history(folder / "runs" / killed)
    names = [
        sorted(p.name for p in (folder / "runs" / name).rglob("best.pt")) for name in ("undisturbed", killed)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("model", "every"),
    [
        pytest.param(MLP, "5", id="mlp"),
        pytest.param([*MLP, WEIGHS], "5", id="weights"),
        pytest.param(CNN, "never", id="batchnorm", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_is_killed_is_replaced_and_no_bit_changes(
    model: list[str], every: str, cli: Callable[..., Finished], job: list[str], tmp_path: Path
) -> None:
    """At the start, in a step, in an evaluation, in a save and around a copy; rank 0 and rank 1."""
    job += [*model, f"checkpoint.every={every}", *(["checkpoint.best=none"] if every == "never" else [])]
    further = IN_A_SUM if WEIGHS in model else IN_A_SAVE
    places = PLACES if every == "never" else PLACES | further
    finished = cli("launch", "--nproc", 2, "--no-spare", *job, "run.name=undisturbed")
    assert (finished.rc, "killed" in finished.err) == (0, False), finished
    finished = cli("launch", "--nproc", 2, *job, "run.name=killed", env={"DIE": " ".join(places)})
    assert finished.rc == 0, finished
    assert set((tmp_path / "told.txt").read_text().split()) == places, finished
    assert finished.err.count("was killed by SIGKILL") == len(places), finished
    assert finished.err.count("all ranks start anew") == 1, finished  # the first time, before they had met
    assert finished.err.count("another process takes its place") == len(places) - 1, finished
    assert_equal(tmp_path)
    if every == "never":  # of a few steps each the copies in memory are all that there is
        assert finished.err.count("going on from the copy of the state in memory") == len(places) - 1
        assert read_status(tmp_path / "runs/killed")["lost_steps"] <= len(places), finished


@pytest.mark.long
def test_the_launcher_has_imported_what_takes_long(
    run: Callable[..., Finished], job: list[str], tmp_path: Path
) -> None:
    """In a Python that has imported nothing before."""
    finished = run("-m", "dist_train", "launch", "--nproc", 2, *job, "train.steps=2")
    assert finished.rc == 0, finished
    for rank in (0, 1):
        assert len((tmp_path / f"imported-{rank}.txt").read_text().split()) < 30


def test_the_other_rank_lives_on(
    begin: Callable[..., Process], wait_for: Callable[..., None], small: list[str], tmp_path: Path
) -> None:
    """Killed from outside, again and again; a signal to the launcher then ends the run as interrupted."""
    run = tmp_path / "runs/run"
    process = begin("launch", "--nproc", 2, *small, "train.steps=1000000", "log.every=1", "eval.every=never")

    def moves(attempt: int) -> bool:
        return any(row["attempt"] == attempt for row in read_metrics(run))

    for attempt in (1, 2, 3):
        wait_for(lambda attempt=attempt: moves(attempt), process)
        pid = read_status(run)["pid"]
        others = [p for p in psutil.Process(process.pid).children() if p.pid != pid and threads(p) > 4]
        assert len(others) == 1, others
        if attempt < 3:
            others[0].kill()
    assert read_status(run)["attempts"] == 3
    assert len({line["attempt"] for line in read_lines(run / "attempts.jsonl")}) == 3
    process.send_signal(signal.SIGTERM)
    finished = finish(process, 60)
    assert finished.rc == 75, finished
    status = read_status(run)
    assert (status["state"], status["pid"]) == ("interrupted", pid)
    assert last(tmp_path)["step"] == status["step"]


def threads(process: psutil.Process) -> int:
    """Those of a rank, and of nothing else that the launcher has started, are many."""
    return process.num_threads()


FAILS = """
import os
from dist_train.tasks import Classification

class Fails(Classification):
    def losses(self, model, batch):
        if batch.part.step == 3 and os.environ["RANK"] == "1":
            raise RuntimeError("a bug")
        return super().losses(model, batch)
"""


@pytest.mark.parametrize(
    ("words", "rc", "told"),
    [
        (["train.batch_size=15"], 2, "train.batch_size"),
        (["optim.lr=1e30"], 1, "is not finite"),
        (["task.name=mine:Fails"], 1, "another rank has failed"),
    ],
)
def test_what_is_wrong_is_told_once_and_not_tried_again(
    words: list[str], rc: int, told: str, cli: Callable[..., Finished], small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(FAILS)
    finished = cli("launch", "--nproc", 2, *small, *words)
    assert finished.rc == rc, finished
    assert finished.err.count("dist-train: ") == 1, finished
    assert finished.err.count(told) >= 1, finished
    assert (
        finished.err.count("Traceback") == finished.err.count("RuntimeError: a bug") == ("Fails" in words[0])
    )
    if rc == 1:
        assert read_status(tmp_path / "runs/run")["state"] == "failed"


def test_when_no_restart_is_left_the_run_has_failed(
    cli: Callable[..., Finished], job: list[str], tmp_path: Path
) -> None:
    finished = cli("launch", "--nproc", 2, "--max-restarts", 0, *job, env={"DIE": "step9-1"})
    assert finished.rc == 1, finished
    assert finished.err.count("rank 1") == 1, finished
    assert finished.err.count("Traceback") == 0, finished
    assert read_status(tmp_path / "runs/run")["state"] == "failed"


@pytest.mark.long
def test_ranks_whose_launcher_is_killed_save_and_end(
    begin: Callable[..., Process], under_way: Callable[..., Process], small: list[str], tmp_path: Path
) -> None:
    process = under_way(begin("launch", "--nproc", 2, *small, "train.steps=1000000"))
    family = psutil.Process(process.pid).children()
    process.kill()
    psutil.wait_procs(family, timeout=30)
    assert not any(map(lives, family))
    assert read_status(tmp_path / "runs/run")["state"] == "interrupted"
