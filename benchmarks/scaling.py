"""What share of a step is communication: measured on a few processes, and a model of many.

    python benchmarks/scaling.py

Measured: 1, 2 and 4 processes on a CPU, each with one thread, take steps of the quickstart's MLP (64 images a
process) and of a ResNet-18 (32 images of 32 x 32 a process) by `Learner.train_step`; some as they are, some
with the sum over ranks left out, in turn. The share is what the sum adds to a step, so what the backward pass
hides of it counts as nothing. Where there are more processes than CPUs they also wait for these.

The model, which is arithmetic: GPUs whose step takes a given time, links of a given speed, a sum that moves
2 (n - 1) / n times the gradients and takes 2 log2(n) delays, of which the backward pass, two thirds of a
step, hides what it can but for the last bucket of 25 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from overhead import processor
from same_bits import JOBS, STEPS, measure, prepared

from dist_train import parallel, runtime, tasks
from dist_train.learner import Learner

# Weights, and seconds of a step of a GPU, as a batch of a usual size might take.
MODELS = {"ResNet-50": (25.6e6, 0.1), "ViT-B": (86e6, 0.2), "ViT-L": (304e6, 0.5)}
LINK, DELAY, BUCKET = 25e9, 20e-6, 25e6  # bytes a second of a GPU (200 Gb/s), seconds, bytes


def as_rank(name: str, rounds: int, result: str) -> None:
    """One of the ranks; rank 0 writes the seconds per step with and without the sum."""
    config, ranks, sets, batches = prepared(name, 1)
    learner = Learner(config, ranks, sets, tasks.build(config))
    without = mock.patch.object(parallel.BucketSum, "__call__", lambda _, bucket: alone(bucket))
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(rounds + 1):
        for side in list(seconds)[:: -1 if number % 2 else 1]:
            if ranks.world_size > 1:
                dist.barrier()
            begin = time.perf_counter()
            if side == "without":
                without.start()
            for _ in range(STEPS[name]):
                learner.train_step(batches, 0.0)
            if side == "without":
                without.stop()
            if number:  # the first round warms up
                seconds[side].append((time.perf_counter() - begin) / STEPS[name])
    if ranks.is_main:
        Path(result).write_text(json.dumps(seconds))
    del learner
    runtime.stop(ranks.accelerator)


def alone(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP gets of a bucket where nobody adds it up."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def modelled(weights: float, step: float, processes: int) -> float:
    """The share of communication in a step on so many GPUs."""
    moved = 2 * (processes - 1) / processes * weights * 4 / LINK
    summed = moved + 2 * math.log2(processes) * DELAY
    last = min(1.0, BUCKET / (weights * 4)) * summed
    seen = max(last, summed - step * 2 / 3)
    return seen / (step + seen)


def draw(shares: dict[str, dict[int, list[float]]], path: Path) -> None:
    """The measured shares of each round, and lines of the model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    for number, (name, counts) in enumerate(shares.items()):
        points = [(count, share) for count, rounds in counts.items() for share in rounds]
        left.plot(*zip(*points, strict=True), "o", color=f"C{number}", alpha=0.5)
        middles = [statistics.median(rounds) for rounds in counts.values()]
        left.plot(list(counts), middles, color=f"C{number}", label=name)
    left.set_xticks([1, 2, 4])
    left.set_xlabel("processes on 2 CPUs, measured")
    for name, (weights, step) in MODELS.items():
        gpus = [2**power for power in range(11)]
        right.plot(gpus, [modelled(weights, step, count) for count in gpus], label=name)
    right.set_xscale("log", base=2)
    right.set_xlabel("GPUs, by the model")
    for axis in (left, right):
        axis.yaxis.set_major_formatter("{x:.1%}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    left.set_ylabel("share of communication")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints both tables and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        name, rounds, result = arguments.rank
        return as_rank(name, int(rounds), result)
    print("| model | processes | ms a step | without the sum | share of communication |")
    print("| --- | --- | --- | --- | --- |")
    shares: dict[str, dict[int, list[float]]] = {}
    for name in JOBS:
        shares[name] = {1: [0.0]}
        for processes in (1, 2, 4):
            seconds = measure(__file__, processes, name, arguments.rounds)
            if processes > 1:
                pairs = zip(seconds["with"], seconds["without"], strict=True)
                shares[name][processes] = [1 - without / both for both, without in pairs]
            share = statistics.median(shares[name][processes])
            both, without = (1000 * statistics.median(values) for values in seconds.values())
            found = f"{without:.2f} | {share:.0%}" if processes > 1 else "| none"
            print(f"| {name} | {processes} | {both:.2f} | {found} |", flush=True)
    print(f"\n{processor()}, {os.cpu_count()} CPUs, torch {torch.__version__}\n")
    counts = (8, 64, 1024)
    print(f"| modelled | ms a step of one GPU | {' | '.join(f'{count:,} GPUs' for count in counts)} |")
    print("| --- " * (2 + len(counts)) + "|")
    for name, (weights, step) in MODELS.items():
        row = " | ".join(f"{modelled(weights, step, count):.1%}" for count in counts)
        print(f"| {name} | {step * 1e3:.0f} | {row} |")
    draw(shares, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
