"""A real job of two processes, disturbed at random moments, and what must be true of it afterwards.

`series` starts the job by torchrun, injects one fault after the other, starts the same command again after
each that ends the job, lets it go on to its end, and compares it with a run that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from dist_train.checkpoint import newest_first, step_of
from dist_train.tracking import read_lines, read_metrics, read_status
from tests.conftest import environment, write_npz
from tests.distributed.ranks import last, same_bits, train

MINE = """
import os, time

def slow(image):
    time.sleep(float(os.environ.get("SLEEP", "0")))
    return image
"""
JOB = [
    "data.name=arrays", "data.root=arrays.npz", "data.workers=1", "device=cpu", "wandb.mode=disabled",
    "data.train_transform=[RandomHorizontalFlip,{RandomCrop: {size: 8, padding: 1}},mine:slow]",
    "model.args.hidden=[32]", "model.args.dropout=0.3", "optim.lr=0.02", "optim.args.momentum=0.9",
    "train.ema=0.99", "train.batch_size=16", "log.every=5", "eval.every=20",
]  # fmt: skip
DISTURBED = ["run.name=disturbed", "checkpoint.every=5", "checkpoint.keep=3", "watchdog_seconds=6"]
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=2"]
PATIENCE = 90  # seconds after which something counts as never to happen


class Job:
    """The job under test in a folder of its own: one command, started again after whatever ended it."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        (folder / "mine.py").write_text(MINE)
        write_npz(folder)
        self.folder, self.run, self.chance = folder, folder / "runs" / "disturbed", chance
        self.output = folder / "output.txt"
        self.launcher: psutil.Popen | None = None
        self.attempt = 1  # the one that is under way, or next
        self.floor = 0  # the step from which it must go on, or from a later one
        self.rows = b""  # metrics.jsonl when no process was alive

    # --- what is there ---------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """The newest first."""
        return newest_first(self.run / "checkpoints")

    def newest(self) -> int:
        """The step of the newest checkpoint, or 0."""
        return step_of(self.checkpoints()[0]) if self.checkpoints() else 0

    def place(self) -> tuple[int, int]:
        """Attempt and step of the newest row."""
        rows = list(read_lines(self.run / "metrics.jsonl"))
        return (rows[-1]["attempt"], rows[-1]["step"]) if rows else (0, 0)

    def told(self) -> str:
        """All that launchers and ranks have printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def resumed(self) -> int:
        """The step from which the newest attempt went on."""
        log = (self.run / "log.txt").read_text()
        return int(log.rpartition("(step ")[2].partition(")")[0].replace(",", "")) if "(step " in log else 0

    def alive(self) -> list[psutil.Process]:
        """Every process that works in the job's folder: launcher, ranks, loader workers, orphans too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that the launcher has started."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for process in self.launcher.children() if self.launcher else []:
                if "dist_train" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found[int(process.environ()["RANK"])] = process
        return found

    # --- what is done with it --------------------------------------------------------------------

    def start(self, *changes: str) -> None:
        """Starts the command."""
        command = [*LAUNCHER, "-m", "dist_train", "train", *JOB, *DISTURBED, "train.steps=1000000", *changes]
        with self.output.open("ab") as output:
            self.launcher = psutil.Popen(
                [sys.executable, *command], cwd=self.folder, env=environment(SLEEP=0.002),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def has_ended(self) -> bool:
        """Whether the launcher has ended, or was not started."""
        return self.launcher is None or self.launcher.poll() is not None

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Waits until condition(); AssertionError with what was printed if that never comes."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"not {what} in {PATIENCE} s: {self.told()[-6000:]}"
            time.sleep(0.02)

    def wait_for_training(self, steps: int) -> None:
        """Waits until the attempt under way has done so many steps, and has lost none that was saved."""
        if self.has_ended():
            self.start()

        def trains() -> bool:
            assert not self.has_ended(), f"it ended by itself: {self.told()[-6000:]}"
            return self.place()[0] >= self.attempt and self.place()[1] >= self.resumed() + steps

        self.wait(trains, f"{steps} steps further")
        assert self.resumed() >= self.floor, f"step {self.resumed()} instead of {self.floor}: {self.told()}"

    def wait_for_restart(self, before: dict[int, psutil.Process]) -> str:
        """Waits until the launcher has replaced these ranks, or ended with all that it started."""
        old = set(before.values())

        def settled() -> bool:
            new = set(self.ranks().values())
            return self.has_ended() or (len(new) == 2 and not new & old)

        self.wait(settled, "restarted or ended")
        if self.has_ended():
            return self.wait_for_end()
        self.note()
        return "restarted by the launcher"

    def wait_for_end(self) -> str:
        """Waits until no process is left, orphans and loader workers included."""
        self.wait(lambda: self.has_ended() and not self.alive(), "ended")
        rows = (self.run / "metrics.jsonl").read_bytes() if self.place()[0] else b""
        assert rows.startswith(self.rows), "rows of an earlier attempt were changed"
        self.rows = rows
        self.note()
        return "ended"

    def note(self) -> None:
        """Notes between two attempts what the next one must start from."""
        self.attempt, self.floor = read_status(self.run).get("attempts", 0) + 1, self.newest()

    def kill(self) -> None:
        """SIGKILL to everything, rank 0 first."""
        for process in [*self.ranks().values(), *self.alive()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


# --- faults: each injects itself and tells what came of it ---------------------------------------


def to_rank(job: Job, name: str) -> str:
    """A signal to one rank: all of them end, with their state saved unless it was killed."""
    before, number = job.ranks(), job.chance.randrange(2)
    training = job.place()[0] >= job.attempt
    if number not in before:
        return "no rank was there yet"
    before[number].send_signal(getattr(signal, name))
    came = job.wait_for_restart(before)
    return f"rank {number}: {came}{_saved(job) if name != 'SIGKILL' and training else ''}"


def to_launcher(job: Job, name: str) -> str:
    """A signal to the launcher: whether it passes it on or dies of it, the ranks save and end."""
    assert job.launcher
    training = job.place()[0] >= job.attempt
    job.launcher.send_signal(getattr(signal, name))
    return job.wait_for_end() + (_saved(job) if training else "")


def _saved(job: Job) -> str:
    """Checks that an interrupted attempt told the truth and lost nothing."""
    status = read_status(job.run)
    assert status["state"] == "interrupted", (status, job.told()[-6000:])
    assert status["step"] == job.newest(), status
    return f", interrupted by {status['reason']}, saved at step {status['step']}"


def kill_everything(job: Job) -> str:
    job.kill()
    return job.wait_for_end()


def stop_a_rank(job: Job) -> str:
    """SIGSTOP: the watchdog of the other one notices, and names it."""
    before, number, printed = job.ranks(), job.chance.randrange(2), len(job.told())
    before[number].suspend()
    job.wait(lambda: 1 - number not in job.ranks(), "noticed by the other rank")
    told = job.told()[printed:]
    assert f"rank {number} came last" in told, told
    stacks = (job.run / "stacks" / f"rank-{1 - number}.txt").read_text()
    assert "loop.py" in stacks, stacks
    with contextlib.suppress(psutil.NoSuchProcess):
        before[number].kill()  # as the launcher would, after half a minute
    return f"rank {number}: named by the other one; {job.wait_for_restart(before)}"


def fill_the_disk(job: Job) -> str:
    """Rank 0's kernel refuses every write beyond a few kilobytes; the training outlives it."""
    rank = job.ranks()[0]
    # Once the worker of the evaluation is there: one that started later would inherit the limit.
    job.wait(lambda: len(rank.children()) == 2, "evaluated")
    begin = job.newest()
    room = resource.prlimit(rank.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (4096, room[1]))
    job.wait(lambda: _failed_save(job) > begin, "told that a checkpoint could not be written")
    failed = _failed_save(job)
    assert job.ranks()[0] == rank
    resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, room)
    job.wait(lambda: job.newest() > failed, "saved again")
    assert job.ranks()[0] == rank
    return f"step {failed} not saved, step {job.newest()} saved by the same attempt"


def _failed_save(job: Job) -> int:
    trouble = read_status(job.run).get("trouble", "")
    return int(trouble.partition("step-")[2][:8]) if "could not be written" in trouble else 0


def truncate(job: Job) -> str:
    return _damage(job, lambda data: data[: job.chance.randrange(len(data))])


def flip_a_bit(job: Job) -> str:
    def flip(data: bytes) -> bytes:
        place = job.chance.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << job.chance.randrange(8)]) + data[place + 1 :]

    return _damage(job, flip)


def _damage(job: Job, change: Callable[[bytes], bytes]) -> str:
    job.kill()
    job.wait_for_end()
    newest, before = job.checkpoints()[:2]
    newest.write_bytes(change(newest.read_bytes()))
    job.floor = step_of(before)
    return f"{newest.name} damaged, {before.name} is good"


def kill_in_mid_writing(job: Job) -> str:
    """SIGKILL to everything while a checkpoint's temporary file lies there."""
    folder, rank = job.run / "checkpoints", job.ranks()[0]

    def caught() -> bool:
        if not any(name.startswith("step-") and name.endswith(".tmp") for name in os.listdir(folder)):
            return False
        rank.suspend()  # it may have been renamed at this moment
        if any(folder.glob("step-*.tmp")):
            return True
        rank.resume()
        return False

    deadline = time.monotonic() + PATIENCE
    while not caught():
        assert time.monotonic() < deadline, f"no checkpoint was being written: {job.told()[-6000:]}"
    job.kill()
    came, left = job.wait_for_end(), next(folder.glob("step-*.tmp"))
    return f"{came}, {left.name} of {left.stat().st_size:,} bytes left behind"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    name: str
    inject: Callable[[Job], str]
    at_start: bool = True  # whether it may come while the job starts
    after: int = 5  # steps that the attempt has done before, at least


SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
FULL_DISK = Fault("full disk", fill_the_disk, at_start=False)
FAULTS = [
    *(Fault(f"{name} to a rank", lambda job, n=name: to_rank(job, n)) for name in ("SIGKILL", *SIGNALS)),
    *(Fault(f"{name} to the launcher", lambda job, n=name: to_launcher(job, n)) for name in SIGNALS),
    Fault("SIGKILL to the launcher", lambda job: to_launcher(job, "SIGKILL")),
    Fault("SIGKILL to everything", kill_everything),
    Fault("SIGSTOP to a rank", stop_a_rank, at_start=False),
    Fault("checkpoint truncated", truncate, at_start=False, after=20),
    Fault("checkpoint's bit flipped", flip_a_bit, at_start=False, after=20),
    Fault("SIGKILL in mid-writing", kill_in_mid_writing, at_start=False),
    *[FULL_DISK] * 5,  # of which several happen to one attempt
]


def series(folder: Path, count: int, seed: int, say: Callable[[str], None] = print) -> None:
    """Injects `count` faults, every kind in turn in a random order; AssertionError if anything is lost."""
    chance = random.Random(seed)
    job = Job(folder, chance)
    say(f"seed {seed}, {count} faults, in {folder}")
    deck: list[Fault] = []
    try:
        for number in range(1, count + 1):
            deck = deck or chance.sample(FAULTS, len(FAULTS))
            fault = deck.pop()
            if fault.at_start and job.has_ended() and chance.random() < 0.3:
                job.start()
                time.sleep(chance.uniform(0.5, 8))
                moment = "starting"
            else:
                job.wait_for_training(fault.after + chance.randrange(30))
                time.sleep(chance.uniform(0, 0.1))
                moment = f"step {job.place()[1]}"
            say(f"{number:4}  {fault.name:24}  {moment:10}  {fault.inject(job)}")
        if not job.has_ended():
            job.kill()
            job.wait_for_end()
        total = job.newest() + 40
        job.start(f"train.steps={total}")
        job.wait(job.has_ended, "completed")
        job.wait_for_end()
    finally:
        job.kill()
    assert job.launcher and job.launcher.returncode == 0, job.told()[-6000:]
    train(folder, *JOB, f"train.steps={total}", "checkpoint.every=never", "run.name=undisturbed", processes=2)
    check(job, folder / "runs" / "undisturbed", total)
    attempts = read_status(job.run)["attempts"]
    say(f"nothing lost: {total} steps with the same bits as undisturbed, in {attempts} attempts")


def check(job: Job, undisturbed: Path, total: int) -> None:
    """Compares the job that was disturbed with the one that was not."""
    assert same_bits(last(job.folder, "disturbed"), last(job.folder, "undisturbed")), "other weights"
    mine, expected = _history(job.run), _history(undisturbed)
    assert [(row["step"], "train/loss" in row) for row in mine] == [
        (row["step"], "train/loss" in row) for row in expected
    ], "steps missing or doubled"
    assert mine == expected, [pair for pair in zip(mine, expected, strict=True) if pair[0] != pair[1]][:3]
    status = read_status(job.run)
    assert {"state": "completed", "step": total, "total_steps": total}.items() <= status.items(), status
    attempts = [row["attempt"] for row in read_lines(job.run / "metrics.jsonl")]
    assert attempts == sorted(attempts) and attempts[-1] == status["attempts"], (attempts[-1], status)
    assert not psutil.pid_exists(status["pid"]), status
    left = [path for path in job.run.rglob("*") if path.suffix == ".tmp" or path.name.startswith("lock")]
    assert not left, left
    kept = {step_of(path) for path in job.checkpoints()}
    best = {int((job.run / "checkpoints" / "best.pt").readlink().stem.removeprefix("step-"))}
    assert total in kept and len(kept - best) <= 3, kept


def _history(run: Path) -> list[dict[str, Any]]:
    """The effective history without what a clock tells."""
    return [
        {k: v for k, v in row.items() if k not in ("time", "attempt") and not k.startswith("perf/")}
        for row in read_metrics(run)
    ]
