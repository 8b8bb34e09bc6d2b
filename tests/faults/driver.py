"""Injects faults into a real training of two processes, and compares its end with an undisturbed one's.

A job is torchrun with two ranks. It is started again after each fault that ends it, by the same command.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from dist_train.checkpoint import newest_first
from dist_train.record.history import read_lines, read_metrics, read_status
from tests.distributed.ranks import last, same_bits, train
from tests.processes import environment, kill, lives
from tests.worlds import write_npz

SLOW = """
import os, time

if os.environ.get("KILL_AT") and os.environ["RANK"] == "0":
    from tests.faults.operations import watch

    watch(int(os.environ["KILL_AT"]))

def slow(image):  # so that faults hit in the middle; the undisturbed run needs no sleep
    time.sleep(float(os.environ.get("SLEEP", "0")))
    return image
"""
COMMON = [
    "data.name=arrays", "data.root=arrays.npz", "train.batch_size=16", "model.args.hidden=[256,256]",
    "model.args.dropout=0.3", "data.train_transform=[RandomHorizontalFlip,mine:slow]", "data.workers=1",
    "optim.args.momentum=0.9", "train.ema=0.9", "log.every=5", "eval.every=50", "checkpoint.every=5",
    "checkpoint.keep=3", "watchdog_seconds=10",
]  # fmt: skip
PATIENCE = 90.0  # seconds within which whatever is waited for must come


class Driver:
    """A job in `folder`, and the faults that are done to it."""

    def __init__(self, folder: Path, seed: int) -> None:
        print(f"seed {seed}", flush=True)
        self.folder, self.random = folder, random.Random(seed)
        self.run = folder / "runs" / "faults"
        self.process: subprocess.Popen[bytes] | None = None
        self.injected: list[str] = []
        (folder / "mine.py").write_text(SLOW)
        write_npz(folder)

    # --- the job -------------------------------------------------------------------------------------

    def start(self, total: int = 10**6) -> None:
        """Starts the job and waits for a few steps of this attempt."""
        attempts = read_status(self.run).get("attempts", 0)
        self.launch(total)
        self.until(lambda: read_status(self.run).get("attempts", 0) > attempts, "a new attempt")
        if total == 10**6:
            at = self.step()
            self.until(lambda: self.step() > at, "steps")

    def launch(self, total: int = 10**6, **variables: int) -> None:
        """Starts the job, with further variables in its environment."""
        words = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
            "dist_train", "train", *COMMON, "wandb.mode=disabled", "device=cpu", "run.name=faults",
            f"train.steps={total}",
        ]  # fmt: skip
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                words, cwd=self.folder, env=environment(SLEEP=0.002, **variables), stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Waits for a condition."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                tail = (self.folder / "output.txt").read_text()[-3000:]
                raise AssertionError(f"{self.injected[-1:]}: no {what} in {PATIENCE} s\n{tail}")
            time.sleep(0.005)

    def step(self) -> int:
        """The last step that status.json tells."""
        return int(read_status(self.run).get("step", 0))

    def ranks(self) -> list[psutil.Process]:
        """The two ranks, rank 0 first."""
        assert self.process
        launcher = self.process.pid
        self.until(lambda: len(below(launcher)) == 2, "two ranks")
        return sorted(below(launcher), key=lambda process: int(process.environ()["RANK"]))

    def family(self) -> list[psutil.Process]:
        """The launcher, its ranks, and their workers."""
        assert self.process
        ranks = self.ranks()
        workers = [worker for rank in ranks for worker in below(rank.pid)]
        return [psutil.Process(self.process.pid), *ranks, *workers]

    def gone(self, family: list[psutil.Process]) -> None:
        """Waits until all these processes have ended by themselves."""
        assert self.process
        self.until(lambda: not any(map(lives, family)), "end of all processes")
        self.process.wait(PATIENCE)

    def kill_all(self) -> None:
        """SIGKILL for everything, at once."""
        assert self.process
        family = self.family()
        kill(self.process)
        self.gone(family)

    # --- faults --------------------------------------------------------------------------------------

    def inject(self, count: int, of: Sequence[str]) -> None:
        """Injects `count` faults, each of these kinds in turn in a random order, and lets the job end."""
        kinds: list[str] = []
        for number in range(1, count + 1):
            if not kinds:
                kinds = self.random.sample(of, len(of))
            kind = kinds.pop()
            if self.process is None or self.process.poll() is not None:
                self.start()
            time.sleep(self.random.random() / 4)
            self.injected.append(kind)
            begin, step = time.monotonic(), self.step()
            outcome = KINDS[kind](self)
            seconds = time.monotonic() - begin
            print(f"{number:4} {kind:34} step {step:6} {seconds:5.1f} s  {outcome}", flush=True)
        if self.process and self.process.poll() is None:
            self.kill_all()
        self.start(total=self.saved() + 20)
        assert self.process
        self.until(lambda: self.process and self.process.poll() is not None, "end of the run")
        assert self.process.returncode == 0, (self.folder / "output.txt").read_text()[-3000:]

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return int(newest_first(self.run / "checkpoints")[0].stem.split("-")[1])

    def graceful(self, number: signal.Signals, launcher: bool) -> str:
        """A signal after which all ranks save at one step and end."""
        family = self.family()
        victim = family[0] if launcher else self.random.choice(self.ranks())
        victim.send_signal(number)
        self.gone(family)
        status = read_status(self.run)
        assert status["state"] == "interrupted", status
        # Not the greatest step: a damaged one that the run has not come to again may still lie there.
        newest = (self.run / "checkpoints/last.pt").resolve()
        assert newest.name == f"step-{status['step']:08}.pt", status
        return f"interrupted at step {status['step']}: {status['reason']}"

    def kill_rank(self) -> str:
        """SIGKILL for one rank: torchrun ends the other."""
        family = self.family()
        self.random.choice(self.ranks()).kill()
        self.gone(family)
        return "all ended"

    def kill_launcher(self) -> str:
        """SIGKILL for torchrun alone: the ranks notice, save and end."""
        family = self.family()
        family[0].kill()
        self.gone(family)
        status = read_status(self.run)
        assert (status["state"], status["reason"]) == ("interrupted", "the launcher is gone"), status
        return f"interrupted at step {status['step']}"

    def kill_everything(self) -> str:
        """SIGKILL for all at once, as when the power fails."""
        self.kill_all()
        return "all ended"

    def stop_rank(self) -> str:
        """SIGSTOP for a rank: the watchdog of the other one names it."""
        family, ranks = self.family(), self.ranks()
        victim = self.random.randrange(2)
        stacks = self.run / "stacks" / f"rank-{1 - victim}.txt"
        stacks.unlink(missing_ok=True)
        ranks[victim].send_signal(signal.SIGSTOP)
        self.until(stacks.exists, "stacks")
        self.until(lambda: not lives(ranks[1 - victim]), "end")
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks[victim].kill()  # as launcher or SLURM do in the end
        self.gone(family)
        told = (self.folder / "output.txt").read_text().splitlines()
        named = [line for line in told if line.startswith(f"dist-train: rank {1 - victim}: no step for 10 s")]
        assert named, told[-20:]
        if victim == 1:  # rank 0 keeps the record
            assert "rank 1 came last" in named[-1], named[-1]
        return named[-1].split(";")[1].strip()

    def full_disk(self) -> str:
        """No file of rank 0 may grow beyond some kilobytes, for a while: a real failure of the kernel's."""
        rank, before = self.ranks()[0], read_status(self.run).get("trouble")
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        self.until(
            lambda: read_status(self.run).get("trouble", "") not in ("", before), "word of the failure"
        )
        step = self.step()
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, unlimited)
        self.until(lambda: self.saved() > step, "new checkpoint")
        assert rank.is_running()
        return f"went on, saved step {self.saved()}"

    def kill_while_saving(self) -> str:
        """SIGKILL for all in the middle of a checkpoint's writing."""
        family, folder = self.family(), self.run / "checkpoints"
        self.until(lambda: any(folder.glob("step-*.tmp")), "checkpoint in writing")
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.gone(family)
        return f"left behind: {[path.name for path in folder.glob('*.tmp')]}"

    def kill_between_operations(self) -> str:
        """SIGKILL for rank 0 ahead of one of its operations on files, from the start of an attempt on."""
        self.kill_all()
        number = self.random.randrange(1, 100)
        self.launch(KILL_AT=number)
        self.until(lambda: self.process and self.process.poll() is not None, "end of the job")
        assert "Signal 9 (SIGKILL)" in (self.folder / "output.txt").read_text()[-5000:]
        return f"killed ahead of operation {number}"

    def damage(self, how: str) -> str:
        """Damages the newest checkpoint while nothing runs: the one before it is used."""
        self.kill_all()
        checkpoints = newest_first(self.run / "checkpoints")
        content = bytearray(checkpoints[0].read_bytes())
        if how == "truncated":
            content = content[: self.random.randrange(len(content))]
        else:
            content[self.random.randrange(len(content) // 4, len(content) // 2)] ^= (
                1 << self.random.randrange(8)
            )
        checkpoints[0].write_bytes(content)
        self.start()
        log = (self.run / "log.txt").read_text()
        assert f"{checkpoints[0].name}: the checkpoint is" in log, log[-2000:]
        return f"{checkpoints[0].name} {how}: went on from an older one"


KINDS: dict[str, Callable[[Driver], str]] = {
    "SIGKILL of a rank": Driver.kill_rank,
    "SIGKILL of the launcher": Driver.kill_launcher,
    "SIGKILL of everything": Driver.kill_everything,
    "SIGKILL while saving": Driver.kill_while_saving,
    "SIGKILL between file operations": Driver.kill_between_operations,
    "SIGSTOP of a rank": Driver.stop_rank,
    "full disk": Driver.full_disk,
    "truncated checkpoint": lambda driver: driver.damage("truncated"),
    "flipped bit": lambda driver: driver.damage("flipped"),
    **{
        f"{number.name} to {'the launcher' if launcher else 'a rank'}": (
            lambda driver, number=number, launcher=launcher: driver.graceful(number, launcher)
        )
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
        for launcher in (True, False)
    },
}


def below(pid: int) -> list[psutil.Process]:
    """A process's children. (psutil's own `children` compares times of birth, which are rough.)"""
    found = []
    for child in psutil.pids():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            stat = Path(f"/proc/{child}/stat").read_text()
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(psutil.Process(child))
    return found


def check(driver: Driver) -> None:
    """Compares the run with one that nobody disturbed. Raises AssertionError for whatever differs."""
    folder, run = driver.folder, driver.run
    status = read_status(run)
    assert status["state"] == "completed"
    total = status["step"]
    train(
        folder, *COMMON, "watchdog_seconds=600", "run.name=undisturbed", f"train.steps={total}", processes=2
    )
    assert same_bits(last(folder, "undisturbed"), last(folder, "faults"))
    assert history(run) == history(folder / "runs" / "undisturbed")
    rows = list(read_lines(run / "metrics.jsonl"))
    attempts = {row["attempt"] for row in rows}
    assert attempts <= set(range(1, status["attempts"] + 1))
    assert len(rows) >= len(read_metrics(run))  # what was taken back is still there to read
    assert status["lost_steps"] >= 0 and 0 < status["goodput"] <= 1
    left = [path.name for path in run.rglob("*") if path.name == "lock" or path.suffix == ".tmp"]
    assert not left, left
    mine = [p for p in psutil.process_iter(["cmdline"]) if "run.name=faults" in (p.info["cmdline"] or [])]
    assert not mine, mine


def history(run: Path) -> list[str]:
    """The effective rows, each step once, without what a clock tells."""
    rows = [
        {k: v for k, v in row.items() if k not in ("time", "attempt") and not k.startswith("perf/")}
        for row in read_metrics(run)
    ]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps[:-1] == list(range(5, 5 * len(steps), 5)) and steps[-1] > steps[-2]
    return [json.dumps(row, sort_keys=True) for row in rows]
