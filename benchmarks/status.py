"""How soon `dist-train status` answers, of thousands of runs.

    python benchmarks/status.py                      # two minutes on two cores
    python benchmarks/status.py --runs 200 --rounds 2
    python benchmarks/status.py --make folder        # only makes the runs' folders, to try other commands on

Makes so many run folders, each with the files of a finished run (each tenth was killed and went
on): status.json, config.yaml, attempts.jsonl, 220 rows of metrics.jsonl, a log, three checkpoints. Then each
command runs in turn, round after round, as a person would start it: Python's start and all imports count. The
files are in the memory of the system after the first round, as they are on a machine that has just trained.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from overhead import environment  # noqa: E402

from dist_train.config import load, to_mapping, to_yaml  # noqa: E402

STEPS, EVERY, EVALUATIONS = 4000, 20, 20
RATES = (0.001, 0.01, 0.1)
COMMANDS = {
    "all": [],
    "by a key": ["--where", "optim.lr=0.1"],
    "by its last": ["--where", "optim.lr=0.1", "--sort", "-eval/accuracy"],
    "by its best": ["--sort", "-eval/accuracy.max"],
    "as CSV": ["--csv", "--show", "optim.lr", "--show", "train/loss"],
}
ASKS = {
    "all": "nothing more: status.json",
    "by a key": "the configuration: the end of attempts.jsonl",
    "by its last": "also the end of metrics.jsonl",
    "by its best": "the whole of metrics.jsonl",
    "as CSV": "the configuration and the end of metrics.jsonl",
}


def make_runs(top: Path, count: int) -> None:
    """Writes `count` folders of runs."""
    configs = {rate: load([ROOT / "configs/quickstart.yaml"], [f"optim.lr={rate}"]) for rate in RATES}
    mappings = {rate: to_mapping(config) for rate, config in configs.items()}
    texts = {rate: to_yaml(config) for rate, config in configs.items()}
    generator = random.Random(0)
    for number in range(count):
        rate, folder = RATES[number % len(RATES)], top / f"run-{number:05}"
        (folder / "checkpoints").mkdir(parents=True)
        for step in (3000, 4000):
            (folder / f"checkpoints/step-{step:08}.pt").touch()
        (folder / "checkpoints/best.pt").symlink_to("step-00003000.pt")
        (folder / "config.yaml").write_text(texts[rate])
        (folder / "log.txt").write_text("2026-01-01 00:00:00  a line of the log\n" * 30)
        goes_on = [0, 2000] if number % 10 == 0 else [0]
        config = {**mappings[rate], "seed": number}
        attempts = [
            {"attempt": attempt, "step": step, "processes": 8, "parts": 8, "config": config}
            for attempt, step in enumerate(goes_on, 1)
        ]
        (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in attempts))
        rows = [row for line in attempts for row in history(line["attempt"], line["step"], generator)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        accuracies = [row["eval/accuracy"] for row in rows if row["kind"] == "eval"]
        (folder / "status.json").write_text(
            json.dumps(status(rows[-1], max(accuracies), len(goes_on)), indent=2)
        )


def history(attempt: int, begin: int, generator: random.Random) -> list[dict[str, object]]:
    """The rows of an attempt that begins after a step."""
    rows: list[dict[str, object]] = []
    for step in range(begin + EVERY, STEPS + 1, EVERY):
        told = {"step": step, "epoch": step // 1000, "time": step / 10, "attempt": attempt}
        loss = 2.3 * 0.999**step + generator.random() / 10
        speed = {"perf/samples_per_second": 10834.2, "perf/data_share": 0.02, "perf/seconds_left": 12.5}
        norm = {"train/grad_norm": 1.234, "perf/device_wait_share": 0.02, "perf/memory_gb": 0.812}
        rows.append({"kind": "train", **told, "train/loss": loss, "lr": 0.1, **norm, **speed})
        if step % (STEPS // EVALUATIONS) == 0:
            rows.append({"kind": "eval", **told, "eval/loss": loss, "eval/accuracy": 1 - loss / 3})
    return rows


def status(last: dict[str, object], best: float, attempts: int) -> dict[str, object]:
    """What status.json holds at the end."""
    return {
        "state": "completed", "step": STEPS, "total_steps": STEPS, "attempts": attempts, "processes": 8,
        "reason": "", "trouble": "", "host": "node-1", "pid": 1234, "slurm_job": None, "lost_steps": 0,
        "skipped_steps": 0, "bad_samples": 0, "samples_per_second": 10834.2, "goodput": 0.97,
        "metrics": {name: last[name] for name in ("eval/loss", "eval/accuracy")},
        "best": {"eval/accuracy": best}, "seconds": {"total": 400.0, "productive": 388.0, "lost": 0.0},
    }  # fmt: skip


def seconds(runs: Path, arguments: list[str]) -> float:
    """How long a command takes from its start to its end."""
    words = [sys.executable, "-m", "dist_train", "status", str(runs), *arguments]
    begin = time.perf_counter()
    subprocess.run(words, cwd=ROOT, env=environment(), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def draw(times: dict[str, list[float]], count: int, path: Path) -> None:
    """Draws the rounds of each command."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    axes.boxplot(list(times.values()), orientation="horizontal", tick_labels=list(times), whis=(0, 100))
    axes.axvline(2, color="C3", linewidth=1, linestyle="--")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"seconds until dist-train status has told of {count:,} runs")
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Makes the runs, and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--make", type=Path, help="only make the folders, here")
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    if options.make:
        return make_runs(options.make, options.runs)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        make_runs(Path(folder), options.runs)
        for _ in range(options.rounds):
            for name, arguments in COMMANDS.items():
                times[name].append(seconds(Path(folder), arguments))
    print(f"{options.runs:,} runs, {options.rounds} rounds, Python {platform.python_version()}\n")
    print("| command | reads beside it | seconds: min, median, max |\n| --- | --- | --- |")
    for name, measured in times.items():
        words = " ".join(["dist-train status", *COMMANDS[name]])
        low, middle, high = min(measured), statistics.median(measured), max(measured)
        print(f"| `{words}` | {ASKS[name]} | {low:.2f}, {middle:.2f}, {high:.2f} |")
    draw(times, options.runs, options.plot)


if __name__ == "__main__":
    main()
