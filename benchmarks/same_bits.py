"""What it costs that any number of processes gives the same bits: DDP's own all-reduce against ours.

    python benchmarks/same_bits.py              # a few minutes on two cores
    python benchmarks/same_bits.py --rounds 5   # quicker, noisier

Two and four ranks on a CPU, each with one thread, train the quickstart's MLP (batch 64) and a ResNet-18 on
images of 32 x 32 (batch 32), forward, backward and step, by `Learner.train_step`. Both sides run in the same
processes, a few steps each in turn, every other round in the opposite order; what is reported are medians of
a round's seconds per step, and the median of the rounds' ratios.

    DDP     train.same_bits=false: gradients of parts accumulate in place, DDP averages its buckets.
    ours    the tree: parts are merged as they come; then ranks add up in memory that they share.

BatchNorm's buffers follow the tree on both sides. The memory is counted: that of the sums of parts which wait
for others, beside the gradients that both sides hold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from overhead import processor  # noqa: E402

from dist_train import data, load, runtime, tasks  # noqa: E402
from dist_train.config import Config  # noqa: E402
from dist_train.data.batch import Batch  # noqa: E402
from dist_train.data.images import InMemory  # noqa: E402
from dist_train.learner import Learner  # noqa: E402

JOBS = {
    "MLP": ["model.name=mlp", "train.batch_size=64"],
    "ResNet-18": ["model.name=resnet18", "train.batch_size=32"],
}
SHAPES = {"MLP": (1, 28, 28), "ResNet-18": (3, 32, 32)}
STEPS = {"MLP": 40, "ResNet-18": 2}  # in a turn
SIDES = ("DDP", "ours")


def prepared(name: str, per_rank: int) -> tuple[Config, runtime.Runtime, data.Data, list[Batch]]:
    """A job on this rank, with the batches of a step: the same ones again and again, so nothing is loaded."""
    words = [*JOBS[name], "device=cpu", "threads=1", "train.epochs=null", "train.steps=1000000"]
    config = load([ROOT / "configs/quickstart.yaml"], [*words, f"train.accumulate={per_rank}"])
    ranks = runtime.start(config)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (256, *SHAPES[name]), dtype=torch.uint8, generator=generator)
    source = InMemory(images, torch.arange(256) % 10, [str(number) for number in range(10)])
    sets = data.build(config, source, source)
    return config, ranks, sets, list(sets.train_loader(config, ranks, 0, 1))


def as_rank(name: str, per_rank: int, rounds: int, result: str) -> None:
    """One of the ranks; rank 0 writes the seconds per step of each side and round."""
    config, ranks, sets, batches = prepared(name, per_rank)
    learners = {}
    for side in SIDES:
        own = replace(config, train=replace(config.train, same_bits=side == "ours"))
        learners[side] = Learner(own, ranks, sets, tasks.build(config))
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side in SIDES[:: -1 if number % 2 else 1]:
            torch.distributed.barrier()
            begin = time.perf_counter()
            for _ in range(STEPS[name]):
                learners[side].train_step(batches, 1.0)
            torch.distributed.barrier()
            if number:  # the first round warms up
                seconds[side].append((time.perf_counter() - begin) / STEPS[name])
    if ranks.is_main:
        weights = sum(weight.numel() for weight in learners["ours"].model.parameters())
        Path(result).write_text(json.dumps({"seconds": seconds, "weights": weights}))
    del learners
    runtime.stop(ranks.accelerator)


def measure(program: str, processes: int, *words: object) -> dict[str, Any]:
    """What rank 0 of so many processes has measured, which are told `words` and where to write it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, *launcher, program, "--rank", *map(str, words), str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


def held(per_rank: int) -> int:
    """How many sums of gradients wait at most, besides the one that is computed."""
    return max(number.bit_count() for number in range(per_rank))


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        name, per_rank, rounds, result = arguments.rank
        return as_rank(name, int(per_rank), int(rounds), result)
    print(
        "| model | processes | parts a rank | DDP, ms a step | ours, ms a step | ours takes | sums held, MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in JOBS:
        for processes, per_rank in ((2, 1), (2, 4), (4, 1), (4, 4)):
            found = measure(__file__, processes, name, per_rank, arguments.rounds)
            seconds = found["seconds"]
            ddp, ours = (1000 * statistics.median(seconds[side]) for side in SIDES)
            ratio = statistics.median(b / a for a, b in zip(*(seconds[side] for side in SIDES), strict=True))
            memory = held(per_rank) * found["weights"] * 4 / 1e6
            cells = [
                name,
                processes,
                per_rank,
                f"{ddp:.2f}",
                f"{ours:.2f}",
                f"{ratio:.2f} x its time",
                f"{memory:.0f}",
            ]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    load = f"load average {os.getloadavg()[1]:.1f}"
    print(f"\n{processor()}, {os.cpu_count()} CPUs, {load}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
