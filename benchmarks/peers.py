"""The same jobs by other frameworks: seconds a step, to the first step, memory, and lines of user code.

    python -m pip install lightning transformers pytorch-ignite pytorch-accelerated
    python benchmarks/peers.py                       # about half an hour on two cores
    python benchmarks/peers.py --rounds 1 --jobs mlp --processes 1 --sides ours bare

Each framework has a file in peers/ that does the job as its own documentation says; what they train, and the
clock, are in peers/jobs.py. In each round each side starts alone: its first step is over when the second
forward pass begins. Then all start once more and take turns of some steps, each stopped while the others run.
Ratios are medians over all turns, and over all rounds, to plain PyTorch in the same turn or round.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
import tokenize
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks/peers"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(PEERS)]

from jobs import TURNS  # noqa: E402
from overhead import environment, processor  # noqa: E402

PACKAGES = {  # what is imported, and what is installed
    "bare": ("torch", "torch"),
    "ours": ("dist_train", "dist-train"),
    "accelerate": ("accelerate", "accelerate"),
    "ignite": ("ignite", "pytorch-ignite"),
    "lightning": ("lightning", "lightning"),
    "pytorch_accelerated": ("pytorch_accelerated", "pytorch-accelerated"),
    "transformers": ("transformers", "transformers"),
}
JOBS = {
    "mlp": "MLP in memory",
    "resnet": "ResNet-18, 32 x 32, in memory",
    "jpeg": "ResNet-18 on a folder of JPEGs",
    "gpt": "small GPT on bytes",
}
NOT_A_LINE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


class Side:
    """A run of a side's program, which stops itself after each turn; `more` is added to its environment."""

    def __init__(self, side: str, job: str, processes: int, folder: Path, **more: str) -> None:
        self.here = folder / side
        self.here.mkdir(parents=True)
        self.result = self.here / "result"
        for name in ("photos", "text.txt"):
            (self.here / name).symlink_to(folder.parents[1] / name)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(PEERS / f"with_{side}.py")]
        # Accelerate's is what `accelerate launch --cpu` sets: else two processes train each by itself.
        own = {"JOB": job, "RESULT": self.result, "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true"}
        own |= {"FOLDER": self.here, "BEGIN": time.time(), **more}
        self.side, self.processes, self.said = side, processes, self.here / "said.txt"
        with self.said.open("w") as said:
            self.started = psutil.Popen(
                command,
                env=environment(**own),
                cwd=self.here,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.ranks: list[dict[str, Any]] = []
        self.alive = self.stops()

    def go_on(self) -> None:
        """Lets it take its next turn, if it hasn't failed before."""
        if self.alive:
            for rank in self.ranks:
                os.killpg(os.getpgid(rank["pid"]), signal.SIGCONT)
            self.alive = self.stops(len(self.ranks[0]["steps"]) + 1)

    def stops(self, turns: int = 0) -> bool:
        """Waits until each rank has stopped after so many turns; False if the program ends before."""
        files = [Path(f"{self.result}.{rank}") for rank in range(self.processes)]
        while self.started.poll() is None:
            if all(file.exists() for file in files):
                self.ranks = [json.loads(file.read_text()) for file in files]
                if all(len(rank["steps"]) == turns and stopped(rank["pid"]) for rank in self.ranks):
                    return True
            time.sleep(0.02)
        print(f"{self.side} failed: {self.said.read_text()[-1500:]}", file=sys.stderr)
        return False

    def end(self) -> None:
        """Ends it, whatever it is at; its memory is free before another one starts."""
        ended: list[psutil.Process] = []
        for pid in [self.started.pid, *(rank["pid"] for rank in self.ranks)]:
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                ended.append(psutil.Process(pid))
                os.killpg(os.getpgid(pid), signal.SIGKILL)
        psutil.wait_procs([self.started, *ended])


def stopped(pid: int) -> bool:
    """Whether a process waits to go on."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def take_turns(running: list[Side], job: str) -> None:
    """Lets one after the other go on, there and back, until all turns of the job are done."""
    for turn in range(TURNS[job]):
        for run in running[:: -1 if turn % 2 else 1]:
            run.go_on()


def measure(sides: list[str], job: str, processes: int, folder: Path) -> dict[str, dict[str, Any]]:
    """What the clocks of a round have written.

    Sides start one by one, each alone: with many in memory the last ones start slower. Then all start once
    more, and take turns, there and back.
    """
    running: list[Side] = []
    with tempfile.TemporaryDirectory(dir=folder) as name, contextlib.ExitStack() as ends:
        alone = {side: started_alone(side, job, processes, Path(name)) for side in sides}
        for side in sides:
            running.append(Side(side, job, processes, Path(name) / "turns"))
            ends.callback(running[-1].end)
        take_turns(running, job)
        return {run.side: run.ranks[0] | {"first": alone[run.side]} for run in running if run.alive}


def started_alone(side: str, job: str, processes: int, folder: Path) -> float:
    """Seconds until the second step of a side begins; not a number if it fails."""
    run = Side(side, job, processes, folder / "alone")
    run.end()
    return float(run.ranks[0]["first"]) if run.alive else math.nan


def make_data(folder: Path) -> None:
    """A folder of JPEGs and a text, as long as a run needs."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for part, count in (("train", 110), ("val", 4)):
        for label in range(10):
            (folder / f"photos/{part}/{label}").mkdir(parents=True)
            for number in range(count):
                coarse = draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
                image.save(folder / f"photos/{part}/{label}/{number}.jpg", quality=90)
    (folder / "text.txt").write_bytes(draw.integers(97, 123, 300_000, dtype=np.uint8).tobytes())


def lines(side: str) -> int:
    """Lines of a side's program, without comments, docstrings and empty ones."""
    text = (PEERS / f"with_{side}.py").read_text()
    counted: set[int] = set()
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT)
        if token.type not in NOT_A_LINE and not is_docstring and token.string:
            counted.update(range(token.start[0], token.end[0] + 1))
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            before = token.type
    return len(counted)


Rounds = list[dict[str, dict[str, Any]]]  # what `measure` gave


def ratios(side: str, rounds: Rounds) -> list[list[float]]:
    """Of each round in which a side and the bare one came to an end: the ratio of their steps in a turn."""
    both = [(r[side]["steps"], r["bare"]["steps"]) for r in rounds if side in r and "bare" in r]
    return [[own / bare for own, bare in zip(*turns, strict=True)] for turns in both]


def row(side: str, rounds: Rounds) -> str:
    """A line of a table."""
    of_rounds = ratios(side, rounds)
    if not of_rounds:
        return f"| {side} | failed | | | | | | |"
    own = [r[side] for r in rounds if side in r]
    step = statistics.median(seconds for run in own for seconds in run["steps"])
    middles = sorted(map(statistics.median, of_rounds))
    middle = statistics.median(ratio for turns in of_rounds for ratio in turns)
    first = statistics.median(
        r[side]["first"] / r["bare"]["first"] for r in rounds if side in r and "bare" in r
    )
    spread = f"{middle:.3f} | {middles[0]:.3f} to {middles[-1]:.3f}"
    start = f"{statistics.median(run['first'] for run in own):.2f} | {first:.2f}"
    memory = statistics.median(run["memory"] for run in own)
    return f"| {side} | {step * 1e3:.2f} | {spread} | {start} | {memory:,.0f} | {lines(side)} |"


def draw(found: dict[str, Rounds], sides: list[str], path: Path) -> None:
    """A point for each side in each job, with the least and the greatest median of its rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.55 * len(found)), layout="constrained")
    others = [side for side in sides if side != "bare"]
    for number, side in enumerate(others):
        for place, rounds in enumerate(found.values()):
            middles = sorted(map(statistics.median, ratios(side, rounds)))
            if middles:
                height, color = place + (number + 1) / (len(others) + 1) - 0.5, f"C{number}"
                size = 7 if side == "ours" else 4
                label = side if not place else None
                axis.plot(statistics.median(middles), height, "o", ms=size, color=color, label=label)
                axis.plot([middles[0], middles[-1]], [height] * 2, color=color, lw=1)
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.axvline(1, color="gray", lw=0.8)
    axis.set_xlabel("a step, of plain PyTorch's time")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="center right", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, and prints a table for each job and number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--sides", nargs="*", default=list(PACKAGES), choices=list(PACKAGES))
    given = parser.parse_args()
    missing = [side for side in given.sides if importlib.util.find_spec(PACKAGES[side][0]) is None]
    sides = [side for side in given.sides if side not in missing]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        found: dict[str, Rounds] = {}
        for job in given.jobs:
            for processes in given.processes:
                title = f"{JOBS[job]}, {processes} process{'es' * (processes > 1)}"
                found[title] = rounds = [
                    measure(sides[:: -1 if number % 2 else 1], job, processes, folder)
                    for number in range(given.rounds)
                ]
                print(f"\n{title}\n")
                print("| side | ms a step | x bare | rounds | first step, s | x bare | MB | lines |")
                print(f"|{' --- |' * 8}")
                print("\n".join(row(side, rounds) for side in sides), flush=True)
    versions = ", ".join(f"{PACKAGES[side][1]} {version(PACKAGES[side][1])}" for side in sides)
    print(f"\n{processor()}, {os.cpu_count()} CPUs, one thread a process; {versions}")
    draw(found, sides, Path(__file__).with_suffix(".png"))
    if missing:
        print(f"Not installed: {', '.join(PACKAGES[side][1] for side in missing)}")


if __name__ == "__main__":
    main()
