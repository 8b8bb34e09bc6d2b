"""The same jobs by other frameworks: seconds a step, to the first step, memory, and lines of user code.

    python -m pip install lightning transformers pytorch-ignite pytorch-accelerated
    python benchmarks/peers.py                       # about half an hour on two cores
    python benchmarks/peers.py --rounds 1 --jobs mlp --processes 1 --sides ours bare

Each framework has a file in peers/ that does the job as its own documentation says; what they train, and the
clock, are in peers/jobs.py. A process of its own for each side, job and round; sides run in turn, every
other round in the opposite order. The first step counts from the command's start to the second forward pass;
seconds a step are those after the first tenth. Ratios are medians of the rounds' ratios to plain PyTorch.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tokenize
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks/peers"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

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


def measure(side: str, job: str, processes: int, folder: Path) -> dict[str, float] | None:
    """What a run's clock has written; None if it failed, whose last words are printed."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(PEERS / f"with_{side}.py")]
    # Accelerate's variable is what `accelerate launch --cpu` sets: else two processes train each by itself.
    own: dict[str, object] = {
        "JOB": job,
        "RESULT": result,
        "WANDB_MODE": "disabled",
        "ACCELERATE_USE_CPU": "true",
    }
    with tempfile.TemporaryDirectory(dir=folder) as here:
        own |= {"FOLDER": here, "BEGIN": time.time()}
        for name in ("photos", "text.txt"):
            (Path(here) / name).symlink_to(folder / name)
        done = subprocess.run(command, env=environment(**own), cwd=here, capture_output=True, text=True)
    if not result.exists():
        print(f"{side}, {job}, {processes}: {(done.stderr or done.stdout)[-1500:]}", file=sys.stderr)
        return None
    measured: dict[str, float] = json.loads(result.read_text())
    return measured


def make_data(folder: Path) -> None:
    """A folder of JPEGs and a text, as long as a run needs."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for part, count in (("train", 100), ("val", 4)):
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


def row(side: str, rounds: list[dict[str, dict[str, float]]]) -> str:
    """A line of a table, of the rounds in which both this side and the bare one came to an end."""
    both = [(r[side], r["bare"]) for r in rounds if side in r and "bare" in r]
    if not both:
        return f"| {side} | failed | | | | | |"

    def middle(key: str) -> float:
        return statistics.median(own[key] for own, _ in both)

    ratios = sorted(own["step"] / bare["step"] for own, bare in both)
    first = statistics.median(own["first"] / bare["first"] for own, bare in both)
    spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    own = f"{middle('step') * 1e3:.2f} | {spread} | {middle('first'):.2f} | {first:.2f}"
    return f"| {side} | {own} | {middle('memory'):,.0f} | {lines(side)} |"


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
        for job in given.jobs:
            for processes in given.processes:
                rounds: list[dict[str, dict[str, float]]] = []
                for number in range(given.rounds):
                    order = sides[:: -1 if number % 2 else 1]
                    measured = {side: measure(side, job, processes, folder) for side in order}
                    rounds.append({side: times for side, times in measured.items() if times})
                print(f"\n{JOBS[job]}, {processes} process{'es' * (processes > 1)}\n")
                print("| side | ms a step | x bare | first step, s | x bare | MB | lines |")
                print("| --- | --- | --- | --- | --- | --- | --- |")
                print("\n".join(row(side, rounds) for side in sides), flush=True)
    versions = ", ".join(f"{PACKAGES[side][1]} {version(PACKAGES[side][1])}" for side in sides)
    print(f"\n{processor()}, {os.cpu_count()} CPUs, one thread a process; {versions}")
    if missing:
        print(f"Not installed: {', '.join(PACKAGES[side][1] for side in missing)}")


if __name__ == "__main__":
    main()
