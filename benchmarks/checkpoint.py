"""What a checkpoint costs the loop, and whether going on costs more the later it is.

    python benchmarks/checkpoint.py                # 25 million parameters; about a minute
    python benchmarks/checkpoint.py --millions 300 # 3.6 GB of state; 12 GB of memory

The state is that of AdamW: weights and two moments in fp32. In each round, in turn:

    memory copy    every tensor copied to memory that is already there: what a save can't do without
    ours           `Checkpoints.save`: what the loop waits for; the file is written behind it
    ours, waited   the same until the file is durable
    torch.save     to a file, and fsync: what the loop would wait for without a thread

Then seconds from the choice of a checkpoint to the first batch after it, at an early and a late step of a
data set of a million samples. Medians of the rounds; for the stall also the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dist_train import checkpoint, data, load, runtime  # noqa: E402
from dist_train import state as states  # noqa: E402

LAYER = 1024  # weights of [1024, 1024], as in a transformer


def make_state(millions: int) -> dict[str, Any]:
    """A state of so many million parameters."""
    count = max(1, round(millions * 1e6 / LAYER**2))

    def tensors() -> dict[str, torch.Tensor]:
        return {f"{number}.weight": torch.rand(LAYER, LAYER) for number in range(count)}

    moments = {number: {"exp_avg": a, "exp_avg_sq": b} for number, (a, b) in enumerate(zip(
        tensors().values(), tensors().values(), strict=True))}  # fmt: skip
    return {"format": checkpoint.FORMAT, "step": 1, "model": tensors(), "optimizer": {"state": moments}}


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def bare_save(state: dict[str, Any], path: Path) -> None:
    """torch.save, durable."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def saves(millions: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round."""
    state, times = make_state(millions), {}
    copy = checkpoint.to_cpu(state)
    pairs = [(copy["model"][name], value) for name, value in state["model"].items()]
    for number, moments in state["optimizer"]["state"].items():
        pairs += [(copy["optimizer"]["state"][number][name], value) for name, value in moments.items()]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        saver = checkpoint.Checkpoints(Path(folder), keep=1, say=print)
        saver.save(state, best=False)  # the first one also allocates
        for step in range(2, rounds + 2):
            saver.wait()
            state["step"] = step
            row = {"memory copy": seconds(lambda: [target.copy_(value) for target, value in pairs])}
            row["ours"] = seconds(lambda: saver.save(state, best=False))
            row["ours, waited"] = row["ours"] + seconds(saver.wait)
            row["torch.save"] = seconds(lambda: bare_save(state, Path(folder) / "bare.pt"))
            for name, value in row.items():
                times.setdefault(name, []).append(value)
    return times


def resumes(rounds: int) -> dict[int, list[float]]:
    """Seconds from the choice of a checkpoint to the first batch, for an early and a late step."""
    times: dict[int, list[float]] = {100: [], 1_000_000: []}
    items = torch.utils.data.TensorDataset(torch.zeros(1_000_000, 1, 2, 2), torch.zeros(1_000_000).long())
    items.classes = ["a", "b"]  # type: ignore[attr-defined]
    words = ["train.steps=1000001", "data.eval_fraction=0.1", "data.workers=0", "wandb.mode=disabled"]
    with tempfile.TemporaryDirectory() as folder:
        config = load([], [*words, "device=cpu", f"run.dir={folder}", "model.args.hidden=[8]"])
        ranks = runtime.start(config)
        sets = data.build(config, items)
        for step in list(times) * rounds:
            for old in checkpoint.newest_first(config.run_dir / "checkpoints"):
                old.unlink()
            state = states.build(config, ranks, sets)
            state.step = step
            saver = checkpoint.Checkpoints(config.run_dir, keep=1, say=print)
            saver.save(states.to_dict(config, state, sets, ranks), best=False)
            saver.wait()
            begin = time.perf_counter()
            path = states.choose(config, print)
            assert path
            states.restore(config, path, state, ranks)
            next(sets.train_batches(config, ranks, state.step, 1_000_001))
            times[step].append(time.perf_counter() - begin)
        runtime.stop()
    return times


def draw(times: dict[str, list[float]], millions: int, path: Path) -> None:
    """A bar for each side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
    names = list(times)[::-1]
    colors = ["tab:blue" if name == "ours" else "lightgray" for name in names]
    axis.barh(names, [statistics.median(times[name]) for name in names], color=colors)
    axis.set_xlabel(f"seconds per save of {millions} million parameters with AdamW, median")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=25, help="parameters")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    times = saves(arguments.millions, arguments.rounds)
    print("| side | seconds | ours stalls |\n| --- | --- | --- |")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["ours"], values, strict=True))
        print(f"| {name} | {statistics.median(values):.3f} | {ratio:.3f} x its time |")
    draw(times, arguments.millions, Path(__file__).with_suffix(".png"))
    print("\n| step | seconds to go on |\n| --- | --- |")
    for step, values in resumes(5).items():
        print(f"| {step:,} | {statistics.median(values):.3f} |")


if __name__ == "__main__":
    main()
