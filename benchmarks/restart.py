"""How long a run stands still when a rank dies: from its SIGKILL to the next completed step.

    python benchmarks/restart.py             # some minutes on two cores; Linux

The quickstart's network on two ranks, with a checkpoint every 20 steps, in turn under torchrun --max_restarts
and under dist-train launch. Ranks are killed at random times:

    torchrun              one rank; the launcher ends the other and starts both anew
    launch, all anew      both ranks at once, so that only the checkpoint is left: both are forked anew
    launch, rank replaced one rank; another process takes its place, and the other goes on from its copy

Told are the seconds until metrics.jsonl has a row of the new attempt, the steps that are done again, and the
seconds of CPU that all processes took until then, which say more where others run beside.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from overhead import environment, processor  # noqa: E402

PATIENCE = 120.0
LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc_per_node=2 --max_restarts=9 -m dist_train train",
    "launch": "dist_train launch --nproc=2",
}
KILLS = {  # of each launcher: what is told of it, and which ranks are killed
    "torchrun": {"torchrun, rank 0": [0], "torchrun, rank 1": [1]},
    "launch": {
        "launch, all anew": [0, 1],
        "launch, rank 0 replaced": [0],
        "launch, rank 1 replaced": [1],
    },
}
JOB = """
import os
from dist_train.models import mlp

def model(input_shape, num_classes):
    with open("told.txt", "a") as file:
        file.write(f"{os.environ['RANK']} {os.getpid()}\\n")
    return mlp(input_shape, num_classes)
"""


class Restart(NamedTuple):
    """What a death cost."""

    seconds: float
    cpu_seconds: float
    steps: int  # done again


def until(find: Callable[[], Any], what: str) -> Any:
    """What `find` finds, asked every 5 ms."""
    deadline = time.monotonic() + PATIENCE
    while not (found := find()):
        if time.monotonic() > deadline:
            sys.exit(f"no {what} in {PATIENCE:.0f} s")
        time.sleep(0.005)
    return found


@contextlib.contextmanager
def running(launcher: str, folder: Path) -> Any:
    """The job under a launcher, in `folder`; all it says goes to output.txt."""
    (folder / "job.py").write_text(JOB)
    words = [sys.executable, "-m", *LAUNCHERS[launcher].split(), str(ROOT / "configs/quickstart.yaml")]
    words += ["model.name=job:model", "device=cpu", "wandb.mode=disabled", "threads=1", "run.name=restart"]
    words += ["train.epochs=1000", "checkpoint.every=20", "log.every=1", "eval.every=never"]
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(words, cwd=folder, env=environment(), stdout=output, stderr=output)
    try:
        until(lambda: newest_row(folder)["step"] > 50, "50 steps")
        yield process.pid
    finally:
        process.terminate()
        process.wait(PATIENCE)
        if sys.exc_info()[0]:
            print((folder / "output.txt").read_text()[-3000:])


def newest_row(folder: Path) -> dict[str, Any]:
    """The last row of metrics.jsonl, without reading all of it again."""
    path = folder / "runs/restart/metrics.jsonl"
    with contextlib.suppress(OSError, ValueError, IndexError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        row: dict[str, Any] = json.loads(file.read().rsplit(b"\n", 2)[-2])
        return row
    return {"step": 0, "attempt": 0}


def ranks(folder: Path) -> dict[int, int]:
    """The process of each rank, as the job told last."""
    return dict(map(int, line.split()) for line in (folder / "told.txt").read_text().splitlines())


def cpu_seconds(launcher: int) -> dict[int, float]:
    """Seconds of CPU that the launcher and its processes have taken so far, by their ids."""
    found = {}
    for process in [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found[process.pid] = sum(process.cpu_times()[:2])
    return found


def kill(folder: Path, launcher: int, victims: list[int]) -> Restart:
    """Kills ranks in the middle of their steps, and waits until a step of the next attempt is done."""
    row, pids, before = newest_row(folder), ranks(folder), cpu_seconds(launcher)
    killed = time.monotonic()
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    until(lambda: newest_row(folder)["attempt"] > row["attempt"], "step")
    seconds = time.monotonic() - killed
    after = cpu_seconds(launcher)
    spent = sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())
    rows = [json.loads(line) for line in (folder / "runs/restart/metrics.jsonl").open()]
    old, new = ([r["step"] for r in rows if r["attempt"] == row["attempt"] + n] for n in (0, 1))
    return Restart(seconds, spent, max(0, old[-1] + 1 - new[0]))


def report(restarts: dict[str, list[Restart]]) -> list[str]:
    """The table: minimum, median and maximum."""
    lines = ["| killed | seconds to the next step | CPU seconds | steps done again |", "| --- " * 4 + "|"]
    for name, values in restarts.items():
        cells = []
        for column, digits in zip(zip(*values, strict=True), (2, 2, 0), strict=True):
            low, middle, high = min(column), statistics.median(column), max(column)
            cells.append(f"{low:.{digits}f}, **{middle:.{digits}f}**, {high:.{digits}f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def draw(restarts: dict[str, list[Restart]], path: Path) -> None:
    """A point for each kill."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for name in list(restarts)[::-1]:
        seconds = [restart.seconds for restart in restarts[name]]
        color = "tab:blue" if "launch" in name else "gray"
        axis.plot(seconds, [name] * len(seconds), "o", color=color, alpha=0.6)
    axis.set_xscale("log")
    axis.set_xlabel("seconds from SIGKILL to the next completed step")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="kills of each kind")
    parser.add_argument(
        "--pause", type=float, default=8, help="seconds ahead of a kill, in which the reserve reads the data"
    )
    rounds, pause = (arguments := parser.parse_args()).rounds, arguments.pause
    restarts: dict[str, list[Restart]] = {name: [] for kinds in KILLS.values() for name in kinds}
    for number in range(1, rounds + 1):
        for launcher in list(KILLS)[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as name, running(launcher, Path(name)) as pid:
                for kind, victims in KILLS[launcher].items():
                    time.sleep(pause + random.random())
                    restarts[kind].append(kill(Path(name), pid, victims))
                    print(f"round {number}: {kind} {restarts[kind][-1].seconds:.2f} s", flush=True)
    print(f"\n{processor()}, {os.cpu_count()} CPUs, torch {torch.__version__},", end=" ")
    print(f"load average {os.getloadavg()[1]:.1f}; minimum, **median**, maximum of {rounds} kills\n")
    print("\n".join(report(restarts)))
    draw(restarts, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
