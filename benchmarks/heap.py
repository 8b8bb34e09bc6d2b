"""What it gives to keep the memory of a step on the CPU (dist_train/heap.py): the same jobs with and without.

    python benchmarks/heap.py --rounds 5

The jobs of peers.py by dist_train, one process and one thread. A variable of glibc's own in the environment,
one that changes nothing, has dist_train leave the heap to glibc. Both sides run at once and take turns of
some steps, each stopped while the other runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from overhead import processor
from peers import JOBS, Side, make_data, take_turns

LEFT = {"GLIBC_TUNABLES": "glibc.malloc.check=0"}


def measure(job: str, folder: Path) -> list[dict[str, Any]]:
    """What the clocks of both sides have written in one round: the heap left to glibc, and kept."""
    with tempfile.TemporaryDirectory(dir=folder) as name, contextlib.ExitStack() as ends:
        running: list[Side] = []
        for side, own in (("left", LEFT), ("kept", {})):
            running.append(Side("ours", job, 1, Path(name) / side, **own))
            ends.callback(running[-1].end)
        take_turns(running, job)
        return [run.ranks[0] for run in running]


def main() -> None:
    """Measures, and prints a line for each job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    given = parser.parse_args()
    print("| job | left to glibc, ms a step | kept | x its time: min, median, max | MB, left | MB, kept |")
    print(f"|{' --- |' * 6}")
    with tempfile.TemporaryDirectory() as name:
        make_data(Path(name))
        for job in given.jobs:
            rounds = [measure(job, Path(name)) for _ in range(given.rounds)]
            sides = list(zip(*rounds, strict=True))
            left, kept = ([statistics.median(run["steps"]) * 1e3 for run in side] for side in sides)
            ratios = [own / others for own, others in zip(kept, left, strict=True)]
            spread = ", ".join(f"{x:.2f}" for x in (min(ratios), statistics.median(ratios), max(ratios)))
            steps = f"{statistics.median(left):.2f} | {statistics.median(kept):.2f}"
            memory = " | ".join(f"{statistics.median(r['memory'] for r in side):,.0f}" for side in sides)
            print(f"| {JOBS[job]} | {steps} | {spread} | {memory} |", flush=True)
    print(f"\n{processor()}, {os.cpu_count()} CPUs, one thread")


if __name__ == "__main__":
    main()
