"""How long a run stands still when a rank dies: from its SIGKILL to the next completed step.

    python benchmarks/restart.py             # about two minutes on two cores; Linux

The quickstart's network under `torchrun --max_restarts`, on two ranks with a checkpoint every 20 steps. One
rank is killed, again and again; the launcher ends the other and starts both anew. What is reported are
medians of the kills. The parts end at:

    the launcher          two new child processes of torchrun are there
    Python, imports       both of them handle SIGHUP, as /proc tells: what `fit` does first
    process group         the data set, a function of the job's own, is asked for: it writes the time
    data, model           the model, a function of the job's own, is made
    restore               the run's lock tells a new process: the state is filled from the checkpoint
    first step            metrics.jsonl has a row of the new attempt
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from overhead import processor  # noqa: E402

from dist_train.guard.lock import read as read_lock  # noqa: E402

PARTS = ("the launcher", "Python, imports", "process group", "data, model", "restore", "first step")
PATIENCE = 120.0
JOB = """
import os, time
from dist_train.data.fashion_mnist import fashion_mnist
from dist_train.models import mlp

def tell(what):
    with open("told.txt", "a") as file:
        file.write(f"{os.getpid()} {what} {time.monotonic()}\\n")

def data(train):
    if train:
        tell("data")
    return fashion_mnist(train=train)

def model(input_shape, num_classes):
    made = mlp(input_shape, num_classes)
    tell("model")
    return made
"""


def until(find: Callable[[], Any], what: str) -> Any:
    """What `find` finds, asked every 5 ms."""
    deadline = time.monotonic() + PATIENCE
    while not (found := find()):
        if time.monotonic() > deadline:
            sys.exit(f"no {what} in {PATIENCE:.0f} s")
        time.sleep(0.005)
    return found


def start(folder: Path) -> subprocess.Popen[bytes]:
    """torchrun with the job of two ranks; all it says goes to output.txt."""
    (folder / "job.py").write_text(JOB)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += ["--max_restarts=100", "-m", "dist_train", "train", str(ROOT / "configs/quickstart.yaml")]
    words += ["data.name=job:data", "model.name=job:model", "device=cpu", "wandb.mode=disabled", "threads=1"]
    words += ["train.epochs=1000", "checkpoint.every=20", "log.every=1", "run.name=restart"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(words, cwd=folder, env=environment, stdout=output, stderr=output)


def ranks(launcher: int) -> list[int]:
    """The process ids of the living ranks, rank 0 first. (psutil's `children` compares times of birth.)"""
    found = {}
    for process in psutil.process_iter(["ppid", "status"]):
        if process.info["ppid"] == launcher and process.info["status"] != psutil.STATUS_ZOMBIE:
            with contextlib.suppress(psutil.Error, KeyError):
                if "torch.distributed.run" not in process.cmdline():  # else forked, and not yet itself
                    found[int(process.environ()["RANK"])] = process.pid
    return [found[rank] for rank in sorted(found)]


def newest_row(run: Path) -> dict[str, Any]:
    """The last row of metrics.jsonl, without reading all of it again."""
    with contextlib.suppress(OSError, ValueError, IndexError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        return json.loads(file.read().rsplit(b"\n", 2)[-2])
    return {"step": 0, "attempt": 0}


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


def told(folder: Path, what: str, pids: list[int]) -> list[float]:
    """When these processes told this."""
    lines = [line.split() for line in (folder / "told.txt").read_text().splitlines()]
    return [float(when) for pid, name, when in lines if name == what and int(pid) in pids]


def kill_one(run: Path, launcher: int, victim: int) -> list[float]:
    """Kills a rank in the middle of its steps; seconds of each part until the next step is done."""
    row = newest_row(run)
    until(lambda: newest_row(run)["step"] > row["step"] + 200, "200 steps")
    old = ranks(launcher)
    killed = time.monotonic()
    os.kill(old[victim], signal.SIGKILL)
    new = until(lambda: len(found := ranks(launcher)) == 2 and not {*found} & {*old} and found, "new ranks")
    started = time.monotonic()
    until(lambda: all(handles(pid, signal.SIGHUP) for pid in new), "handlers")
    imported = time.monotonic()
    until(lambda: (read_lock(run / "lock") or {}).get("pid") == new[0], "lock")
    restored = time.monotonic()
    until(lambda: newest_row(run)["attempt"] > row["attempt"], "step")
    done = time.monotonic()
    grouped = min(told(run.parents[1], "data", new))  # rank 0 reads first, the other waits for it
    built = max(told(run.parents[1], "model", new))
    marks = (killed, started, imported, grouped, built, restored, done)
    return [after - before for before, after in itertools.pairwise(marks)]


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="kills of each rank")
    rounds = parser.parse_args().rounds
    kills: dict[int, list[list[float]]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "runs" / "restart"
        launcher = start(Path(name))
        try:
            until(lambda: newest_row(run)["step"], "first step")
            for _ in range(rounds):
                for victim in kills:
                    kills[victim].append(kill_one(run, launcher.pid, victim))
                    print(f"rank {victim}:", " ".join(f"{s:.2f}" for s in kills[victim][-1]), flush=True)
        finally:
            launcher.terminate()
            launcher.wait(PATIENCE)
            if sys.exc_info()[0]:
                print((Path(name) / "output.txt").read_text()[-3000:])
    print(f"\n{processor()}, {os.cpu_count()} CPUs, torch {torch.__version__},", end=" ")
    print(f"load average {os.getloadavg()[0]:.1f}\n")
    print("| seconds | rank 0 was killed | rank 1 was killed |\n| --- | --- | --- |")
    for part, *columns in zip(PARTS, *(zip(*kills[victim], strict=True) for victim in kills), strict=True):
        print(f"| {part} | " + " | ".join(f"{statistics.median(column):.2f}" for column in columns) + " |")
    totals = [statistics.median(map(sum, kills[victim])) for victim in kills]
    print("| **to the next step** | " + " | ".join(f"**{total:.2f}**" for total in totals) + " |")


if __name__ == "__main__":
    main()
