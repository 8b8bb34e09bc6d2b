"""What a checkpoint costs: how long the loop waits for a save, and how long a resume takes.

    python benchmarks/checkpoint.py    # three minutes; 12 GB of memory, 12 GB in the current folder

The state is that of a model trained by AdamW: its weights and two moments of each, filled once. In every
round each side saves it once, every other round in the opposite order; reported are medians, and the
medians of the rounds' ratios.

    plain copy          the state's tensors copied by `copy_` into memory that is there already
    ours                `Checkpoints.save`, the write before it ended: what the loop waits
    ours, waiting       the same, and `wait`: what it would wait if it saved synchronously
    torch.save + fsync  no copy, no check for finite weights, not atomic

The first save allocates its copy, so it is told apart; while it writes, the loop takes small steps, which
show whether the writer holds the loop up.

Resuming is `choose` (verifies the file), `restore`, and the first batch of the steps to come, for the
quickstart's network on 1,000,000 shuffled images in memory, at two steps of the same job.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from overhead import processor  # noqa: E402

from dist_train import checkpoint, data, load, runtime, tasks  # noqa: E402
from dist_train import state as states  # noqa: E402
from dist_train.data.images import InMemory  # noqa: E402
from dist_train.learner import Learner  # noqa: E402

MODELS = {"ResNet-50": torchvision.models.resnet50, "ViT-L/16": torchvision.models.vit_l_16}
STEPS = (100, 1_000_000)  # after which a run goes on
COPY, OURS, WAITING, BARE = "plain copy", "ours", "ours, waiting", "torch.save + fsync"
Times = dict[str, list[float]]


def state_of(build: Callable[..., torch.nn.Module]) -> dict[str, Any]:
    """A checkpoint's content, shaped as a model's and AdamW's."""
    with torch.device("meta"):  # shapes only
        model = build(weights=None)
    weights = {name: torch.full_like(v, 1, device="cpu") for name, v in model.state_dict().items()}
    moments = [{"exp_avg": v.clone(), "exp_avg_sq": v.clone()} for v in weights.values()]
    return {"step": 0, "model": weights, "optimizer": {"state": dict(enumerate(moments))}}


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def stalls(state: dict[str, Any], folder: Path, rounds: int) -> tuple[Times, float, str]:
    """Seconds of each side; of the first save; and what small steps took beside its writing."""
    saver = checkpoint.Checkpoints(folder, keep=1, say=print)
    sources = list(tensors(state))
    memory = [torch.empty_like(source).copy_(source) for source in sources]
    times: Times = {COPY: [], OURS: [], WAITING: [], BARE: []}

    def plain_copy() -> None:
        for source, target in zip(sources, memory, strict=True):
            target.copy_(source)

    def bare() -> None:
        with (folder / "bare.tmp").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, folder / "bare.pt")  # as ours: the one before it is there until then

    first = took(lambda: saver.save(state))
    beside = steps(lambda: saver.failure != "" or (saver.folder / "last.pt").exists())
    saver.wait()
    end = time.monotonic() + 2
    alone = steps(lambda: time.monotonic() > end)
    for number in range(1, rounds + 1):
        state["step"] = number
        for side in (COPY, OURS, BARE)[:: -1 if number % 2 else 1]:
            if side == OURS:
                times[OURS].append(took(lambda: saver.save(state)))
                times[WAITING].append(times[OURS][-1] + took(saver.wait))
                assert not saver.failure, saver.failure
            else:
                times[side].append(took(plain_copy if side == COPY else bare))
    return times, first, f"{beside} beside the writing, {alone} alone"


def took(action: Callable[[], Any]) -> float:
    """Seconds of an action."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def steps(ended: Callable[[], bool]) -> str:
    """What small steps take until something has ended: median and longest."""
    weights, seconds = torch.ones(512, 512), []
    while not ended():
        seconds.append(took(lambda: [(weights @ weights).softmax(1) for _ in range(4)]))
    return f"median {1000 * statistics.median(seconds):.0f} ms, longest {1000 * max(seconds):.0f} ms"


def resumes(folder: Path, rounds: int) -> Times:
    """Seconds from nothing but the built model to the first batch, after each of STEPS."""
    images = torch.randint(256, (1_000_000, 1, 16, 16), dtype=torch.uint8)
    source = InMemory(images, torch.arange(len(images)) % 10, [str(number) for number in range(10)])
    total = max(STEPS) + 1000
    words = [f"run.dir={folder}", "device=cpu", "optim.name=AdamW", "data.shuffle=true", "threads=1"]
    words += ["train.epochs=null", f"train.steps={total}"]
    configs = {s: load([ROOT / "configs/quickstart.yaml"], [*words, f"run.name=step-{s}"]) for s in STEPS}
    ranks = runtime.start(config := configs[STEPS[0]])
    sets = data.build(config, source, InMemory(images[:64], source.labels[:64], source.classes))
    learner = Learner(config, ranks, sets, tasks.build(config))
    learner.model(torch.ones(1, *sets.train_shape)).sum().backward()
    learner.optimizer.step()  # makes the moments
    state = states.State(learner)
    for step, config in configs.items():
        learner.step = step
        saver = checkpoint.Checkpoints(config.run_dir, 1, print)
        saver.save(states.to_dict(config, state, sets))
        assert not saver.wait()
    times: Times = {f"step {step:,}": [] for step in STEPS}
    for number in range(rounds + 1):
        for step in STEPS[:: -1 if number % 2 else 1]:
            begin = time.perf_counter()
            path = states.choose(configs[step], sys.exit)
            states.restore(configs[step], path, state)
            batch = next(iter(sets.train_loader(configs[step], ranks, state.step, total)))
            seconds = time.perf_counter() - begin
            assert batch.part.step == step
            if number:  # the first round warms up
                times[f"step {step:,}"].append(seconds)
    runtime.stop(ranks.accelerator)
    return times


def draw(stalled: dict[str, Times], resumed: Times, path: Path) -> None:
    """Bars: the stalls of each model, and the seconds to resume."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {f"{name}: the loop waits (s, log)": times for name, times in stalled.items()}
    panels["resume to the first batch (s)"] = resumed
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 2.6), layout="constrained")
    for axis, (title, times) in zip(axes, panels.items(), strict=True):
        names, middles = list(times)[::-1], [statistics.median(times[name]) for name in times][::-1]
        colors = ["lightgray" if name in (COPY, BARE) else "tab:blue" for name in names]
        bars = axis.barh(names, middles, color=colors, log=times is not resumed)
        axis.bar_label(bars, fmt="{:.2f}", padding=2)
        axis.margins(x=0.2)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the tables and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="saves of each side; of the small model x 3")
    wanted = parser.parse_args().rounds
    torch.set_num_threads(1)
    stalled, notes = {}, []
    lines = ["| model | side | seconds | x plain copy |", "| --- | --- | --- | --- |"]
    for name, build in MODELS.items():
        state = state_of(build)
        size = sum(tensor.nbytes for tensor in tensors(state)) / 1e9
        with tempfile.TemporaryDirectory(dir=".") as folder:
            rounds = wanted * (3 if size < 1 else 1)
            times, first, told = stalls(state, Path(folder), rounds)
        stalled[name] = times
        for side, values in [*times.items(), ("ours, the first save", [first] * rounds)]:
            ratio = statistics.median(a / b for a, b in zip(values, times[COPY], strict=True))
            lines.append(
                f"| {name}, {size:.2f} GB | {side} | {statistics.median(values):.3f} | {ratio:.2f} |"
            )
        notes.append(f"{name}: small steps: {told}")
        for side, values in times.items():
            print(f"{name}: {side}:", *(f"{value:.3f}" for value in values), flush=True)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        resumed = resumes(Path(folder), 7)
    machine = f"{processor()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}"
    print(f"\n{machine}, 1 thread, torch {torch.__version__}\n")
    print(*lines, "", *notes, "", "| resumed after | seconds |", "| --- | --- |", sep="\n")
    print("\n".join(f"| {name} | {statistics.median(values):.3f} |" for name, values in resumed.items()))
    draw(stalled, resumed, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
