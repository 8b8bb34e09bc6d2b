"""Seconds from the command to 93 % and 94 % of right answers on Fashion-MNIST's 10,000 test images, on a CPU.

    python benchmarks/time_to_accuracy.py                            # all sides, three seeds: hours
    python benchmarks/time_to_accuracy.py --sides ours --seeds 101   # one run of configs/fashion_mnist.yaml
    python benchmarks/time_to_accuracy.py --sides ours --also precision=bf16   # if the CPU has AVX512_BF16
    python benchmarks/time_to_accuracy.py --shares                   # ours without each of its ingredients,
                                                                     # on 10,000 held-out training images
    python benchmarks/time_to_accuracy.py --shares --sides longer    # so of configs/fashion_mnist_94.yaml

    ours        configs/fashion_mnist.yaml, which was tuned on 50,000 of the training images against the other
                10,000; the test images were read at the end only, by seeds that were not used before.
    longer      configs/fashion_mnist_94.yaml, tuned so, too
    wide        configs/fashion_mnist_wide.yaml
    former      the recipe that configs/fashion_mnist.yaml was before
    tensorflow  "2 Conv+pooling" of the list in the data set's README, as in its
                benchmark/convnet.py, which names 91.6 %; but by Adam (1e-3, batches of 64), not plain SGD
    batchnorm   "2 Conv+pooling+BN" of this list, which names 93.4 %; it tells no sizes, so these are ours

All data is Debian's dataset-fashion-mnist, or what `data.root` would find. The last two are bare loops of
PyTorch, measured after each epoch, up to --epochs. Seconds run from the start of the command, imports and the
reading of the data among them, to the row of the evaluation; CPU seconds are those of the whole command, all
threads together: on a busy machine they tell more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from overhead import processor  # noqa: E402

from dist_train.data.fashion_mnist import fashion_mnist  # noqa: E402

FORMER = """
data: {name: fashion_mnist, train_transform: [RandomHorizontalFlip], mean: [0.286], std: [0.353], workers: 0}
model: {name: "time_to_accuracy:former", args: {dropout: 0.2}}
channels_last: true
task: {args: {label_smoothing: 0.05}}
optim: {name: SGD, lr: 0.1, args: {momentum: 0.9, nesterov: true, weight_decay: 5e-4}}
schedule: {name: one_cycle}
train: {batch_size: 256, epochs: 10}
"""
SGD = ["optim.name=SGD", "optim.lr=0.1", "optim.args={momentum: 0.9, nesterov: true, weight_decay: 5e-4}"]
CROP = "{RandomCrop: {size: 28, padding: 1}}"
RECIPES = {
    "ours": "fashion_mnist.yaml",
    "longer": "fashion_mnist_94.yaml",
    "wide": "fashion_mnist_wide.yaml",
}
WITHOUT = {
    "ours": {
        "without the mirror image at the end": ["model.args.mirror=false"],
        "SGD for all weights instead of Muon": SGD,
        "the former network": ["model.name=time_to_accuracy:former", "model.args={}"],
        "without flips": ["data.train_transform=[]"],
        "without label smoothing": ["task.args.label_smoothing=0"],
        "without the rise of the rate": ["schedule.args.rise=0"],
    },
    "longer": {
        "without moved images at the end": ["model.args.shift=0"],
        "without mirror images at the end, too": ["model.args.shift=0", "model.args.mirror=false"],
        "SGD for all weights instead of Muon": SGD,
        "without crops": ["data.train_transform=[RandomHorizontalFlip]"],
        "without flips": [f"data.train_transform=[{CROP}]"],
        "without label smoothing": ["task.args.label_smoothing=0"],
    },
}


class Run(NamedTuple):
    """One command: when each evaluation came, what it found, and what the whole command took."""

    curve: list[tuple[float, float]]  # (seconds since the command, share of right answers)
    cpu: float  # seconds

    def until(self, accuracy: float) -> float | None:
        """Seconds to the first evaluation that reached it."""
        return next((seconds for seconds, found in self.curve if found >= accuracy), None)


# --- networks ----------------------------------------------------------------------------------------


class Residual(nn.Sequential):
    """Layers whose output is added to their input."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` -> the same shape."""
        return inputs + super().forward(inputs)


def former(dropout: float = 0.0) -> nn.Module:
    """The network of the former recipe."""
    layers: list[nn.Module] = []
    for before, width in ((1, 32), (32, 64), (64, 128)):
        layers += [
            nn.Conv2d(before, width, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        if before > 1:
            convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
            layers.append(Residual(convolution, nn.BatchNorm2d(width), nn.ReLU()))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(dropout), nn.Linear(1152, 10)
    )


def tensorflow() -> nn.Module:
    """The network of benchmark/convnet.py."""
    first, second = nn.Conv2d(1, 32, 5, padding=2), nn.Conv2d(32, 64, 5, padding=2)
    layers = [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(3136, 1024), nn.ReLU(), nn.Dropout(0.4), nn.Linear(1024, 10))


def batchnorm() -> nn.Module:
    """Two convolutions with BatchNorm and pooling, two linear layers."""
    layers: list[nn.Module] = []
    for before, width in ((1, 32), (32, 64)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(3136, 256), nn.ReLU(), nn.Dropout(0.4), nn.Linear(256, 10)
    )


LOOPS: dict[str, Callable[[], nn.Module]] = {"tensorflow": tensorflow, "batchnorm": batchnorm}


def loop(name: str, seed: int, epochs: int, started: float) -> None:
    """A bare loop; prints (seconds since `started`, share of right answers) after each epoch."""
    torch.manual_seed(seed)
    train, test = fashion_mnist(train=True), fashion_mnist(train=False)
    model = LOOPS[name]().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(train)).split(64):
            loss = nn.functional.cross_entropy(model(train.images[rows] / 255), train.labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            guesses = [model(images / 255).argmax(1) for images in test.images.split(500)]
        accuracy = (torch.cat(guesses) == test.labels).float().mean().item()
        print(json.dumps([time.time() - started, accuracy]), flush=True)


# --- commands ----------------------------------------------------------------------------------------


def timed(words: list[Any], read: Callable[[str, float], list[tuple[float, float]]]) -> Run:
    """Runs a command of this Python; `read` makes a curve of its output and of its seconds."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, *map(str, words)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env={**os.environ, "PYTHONPATH": python_path},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(read(done.stdout, time.time() - begin), cpu)


def recipe(config: Path, seed: int, changes: list[str]) -> Run:
    """A training by dist-train. Its last evaluation counts when all is saved and the command is done."""
    with tempfile.TemporaryDirectory() as folder:

        def read(_: str, seconds: float) -> list[tuple[float, float]]:
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if row["kind"] == "eval"]
            return [(row["time"], row["eval/accuracy"]) for row in rows[:-1]] + [
                (seconds, rows[-1]["eval/accuracy"])
            ]

        fixed = [f"run.dir={folder}", "run.name=run", "wandb.mode=disabled", "device=cpu", f"seed={seed}"]
        return timed(["-m", "dist_train", "train", config, *fixed, *changes], read)


def measure(side: str, seed: int, epochs: int, changes: list[str]) -> Run:
    """One run of a side."""
    if side in LOOPS:
        words = [__file__, "--loop", side, "--seeds", seed, "--epochs", epochs, "--started", time.time()]
        return timed(words, lambda text, _: [tuple(json.loads(line)) for line in text.splitlines()])
    if side in RECIPES:
        return recipe(ROOT / "configs" / RECIPES[side], seed, changes)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(FORMER)
        file.flush()
        return recipe(Path(file.name), seed, changes)


def report(runs: dict[str, list[Run]]) -> list[str]:
    """The table."""
    lines = [
        "| side | right at the end, % | seconds to 93 % | to 94 % | CPU seconds of all |",
        "| --- " * 5 + "|",
    ]
    for name, mine in runs.items():
        ends = [100 * run.curve[-1][1] for run in mine]
        cells = [f"{statistics.mean(ends):.2f} ({', '.join(f'{end:.2f}' for end in ends)})"]
        for accuracy in (0.93, 0.94):
            reached = [seconds for run in mine if (seconds := run.until(accuracy)) is not None]
            some = f" ({len(reached)} of {len(mine)})" if len(reached) < len(mine) else ""
            cells.append(f"{statistics.mean(reached):.0f}{some}" if reached else "not reached")
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(run.cpu for run in mine):.0f} |")
    return lines


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Right answers by seconds, each run a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for number, (name, mine) in enumerate(runs.items()):
        for run in mine:
            seconds, found = zip(*run.curve, strict=True)
            label = name if run is mine[0] else None
            axis.plot(seconds, [100 * one for one in found], ".-", color=f"C{number}", label=label)
    axis.axhline(93, color="lightgray", zorder=0)
    axis.axhline(94, color="lightgray", zorder=0)
    axis.set(xlabel="seconds since the command", ylabel="right, %", ylim=(90, None), xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the table and draws it."""
    sides = [*RECIPES, "former", *LOOPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides)
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103])
    parser.add_argument("--epochs", type=int, default=15, help="of the bare loops")
    parser.add_argument("--shares", action="store_true", help="ours, or longer, without each ingredient")
    parser.add_argument("--also", nargs="+", default=[], help="further keys of recipes: precision=bf16")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        return loop(arguments.loop, arguments.seeds[0], arguments.epochs, arguments.started)
    jobs = {side: (side, list(arguments.also)) for side in arguments.sides}
    if arguments.shares:
        side = "longer" if arguments.sides == ["longer"] else "ours"
        ways = {side: list[str]()} | WITHOUT[side]
        held = ["data.eval_fraction=0.16667", *arguments.also]
        jobs = {name: (side, [*held, *changes]) for name, changes in ways.items()}
    runs: dict[str, list[Run]] = {name: [] for name in jobs}
    for seed in arguments.seeds:
        for name, (side, changes) in jobs.items():
            runs[name].append(measure(side, seed, arguments.epochs, changes))
            seconds, found = runs[name][-1].curve[-1]
            print(f"seed {seed}: {name}: {100 * found:.2f} % after {seconds:.0f} s", flush=True)
    machine = f"{processor()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[1]:.1f}"
    machine = ", ".join([machine, *arguments.also])
    print(f"\n{machine}, torch {torch.__version__}\n")
    print("\n".join(report(runs)))
    if not arguments.shares:
        draw(runs, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
