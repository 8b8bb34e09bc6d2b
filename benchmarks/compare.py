"""How soon `dist-train compare` answers, of 50 runs among 2,000.

    python benchmarks/compare.py                      # a minute on two cores
    python benchmarks/compare.py --compared 10 --rounds 2

The folders are those of status.py, with 220 rows of metrics each. Each command runs in turn, round after
round, as a person would start it: Python's start and all imports count; `--version` tells what these cost
alone. The first round is not counted: it fills the memory of the system.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from overhead import environment  # noqa: E402
from status import make_runs  # noqa: E402

FURTHER = {
    "compare": [],
    "compare, by a curve of training": ["--metric", "train/loss", "--x", "time", "--smooth", "0.9"],
    "compare, as a page": ["--out", "page.html"],
    "compare, as a picture": ["--out", "plot.png"],
    "compare, as a table": ["--out", "table.csv"],
}


def seconds(words: list[str], folder: Path) -> tuple[float, float]:
    """How long a command takes from its start to its end: by the clock, and of the CPU."""
    command = [sys.executable, "-m", "dist_train", *words]
    begin, before = time.perf_counter(), os.times()
    subprocess.run(command, cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL)
    took, after = time.perf_counter() - begin, os.times()
    return took, after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Makes the runs, measures, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--compared", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_runs(folder / "runs", options.runs)
        some = sorted(str(path) for path in (folder / "runs").iterdir())[: options.compared]
        commands = {name: ["compare", *some, *words] for name, words in FURTHER.items()}
        commands = {"--version": ["--version"], **commands}
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(options.rounds + 1):
            for name, words in commands.items():
                measured = seconds(words, folder)
                if turn:
                    took[name].append(measured)
    print(f"{options.compared} of {options.runs:,} runs, {options.rounds} rounds, ", end="")
    print(f"Python {platform.python_version()}\n")
    print("| command | seconds: min, median, max | CPU seconds: median |\n| --- | --- | --- |")
    for name, values in took.items():
        walls, cpu = sorted(wall for wall, _ in values), statistics.median(cpu for _, cpu in values)
        print(f"| {name} | {walls[0]:.2f}, {statistics.median(walls):.2f}, {walls[-1]:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
