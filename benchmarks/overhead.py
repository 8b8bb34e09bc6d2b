"""What the framework costs: the quickstart job against the tutorial's own loop and against bare loops.

    python benchmarks/overhead.py              # about five minutes on two cores
    python benchmarks/overhead.py --rounds 3   # quicker, noisier

All sides train the 784-512-512-10 MLP by plain SGD (1e-3) on the 60,000 images of Fashion-MNIST in batches
of 64, without evaluation. They run in turn, one epoch each, round after round, every other round in the
opposite order, so that a busy moment of the machine hits all alike; what is reported are medians, and the
medians of the rounds' ratios. The load average is printed too: above the number of processes of our own,
others were at work and the ratios are rough.

    ours      `dist_train.fit` of configs/quickstart.yaml: the step loop with metrics.jsonl, progress lines
              and the epoch's checkpoint. From the first step's start to the last checkpoint on the disk.
    tutorial  a data set of PIL images with ToTensor, a DataLoader of batches of 64, the loss printed every
              100 batches.
    bare      slices of float tensors in memory, forward, backward, step, zero_grad: nothing else.

With two processes (gloo, one thread each): ours against a bare DistributedDataParallel loop over tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dist_train import fit, load  # noqa: E402
from dist_train.data.fashion_mnist import fashion_mnist  # noqa: E402
from dist_train.learner import Learner  # noqa: E402
from dist_train.trainer import Trainer  # noqa: E402

BATCH, LR = 64, 1e-3


def network() -> nn.Module:
    """The tutorial's network, the same weights for all sides."""
    torch.manual_seed(0)
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def ours() -> float:
    """Seconds of an epoch of ours, start-up and evaluation left out: timed around the loop itself."""
    took: list[float] = []
    inner = Trainer.train

    def timed(trainer: Trainer) -> str:
        begin = time.perf_counter()
        reason = inner(trainer)
        took.append(time.perf_counter() - begin)
        return reason

    no_evaluation = mock.patch.object(Learner, "evaluate", lambda *_: ({"eval/accuracy": 0.0}, []))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        overrides = [f"run.dir={folder}", "wandb.mode=disabled", "device=cpu", "train.epochs=1"]
        config = load([ROOT / "configs/quickstart.yaml"], [*overrides, f"threads={torch.get_num_threads()}"])
        with no_evaluation, mock.patch.object(Trainer, "train", timed):
            fit(config)
    return took[0]


def tutorial() -> float:
    """Seconds of an epoch of the tutorial's kind of loop."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import ToTensor

    source = fashion_mnist(train=True)

    class Images(Dataset):
        """PIL images made on the fly, as torchvision's FashionMNIST does."""

        transform = ToTensor()

        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image = Image.fromarray(source.images[index, 0].numpy())
            return self.transform(image), int(source.labels[index])

    loader, model, loss_function = DataLoader(Images(), batch_size=BATCH), network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    begin = time.perf_counter()
    model.train()
    with contextlib.redirect_stdout(io.StringIO()):
        for batch, (inputs, targets) in enumerate(loader):
            loss = loss_function(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if batch % 100 == 0:
                print(f"loss: {loss.item():>7f}  [{(batch + 1) * len(inputs):>5d}/{len(source):>5d}]")
    return time.perf_counter() - begin


def bare(
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model, rank: int = 0, world: int = 1
) -> float:
    """Seconds of an epoch over float tensors in memory; with `world` ranks each takes its part of a batch."""
    source = fashion_mnist(train=True)
    images, labels = source.images.float() / 255, source.labels
    model, loss_function = wrap(network()), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    begin = time.perf_counter()
    model.train()
    for start in range(0, len(images), BATCH):
        part = min(BATCH, len(images) - start) // world
        first = start + rank * part
        loss_function(model(images[first : first + part]), labels[first : first + part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begin


def two_processes(side: str) -> float:
    """Seconds of an epoch of a side on two ranks, each with one thread, started by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds"
        words = [*command, __file__, "--rank-of-two", side, str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            words, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return float(result.read_text())


def as_rank(side: str, result: str) -> None:
    """One of the two ranks; rank 0 writes its time."""
    torch.set_num_threads(1)
    if side == "ours":
        seconds = ours()
    else:
        torch.distributed.init_process_group("gloo")
        seconds = bare(nn.parallel.DistributedDataParallel, torch.distributed.get_rank(), 2)
        torch.distributed.destroy_process_group()
    if os.environ["RANK"] == "0":
        Path(result).write_text(str(seconds))


def environment(**own: object) -> dict[str, str]:
    """This environment with `own`, one thread a process, and this package.

    Python keeps what it compiles, whatever is set here: packages in site-packages were compiled when they
    were installed; ours, which may lie in a clone, would be compiled anew at each start.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    changes = {"OMP_NUM_THREADS": 1, "PYTHONPATH": path, **own}
    return kept | {name: str(value) for name, value in changes.items()}


def processor() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor() or platform.machine()


def report(times: dict[str, list[float]]) -> list[str]:
    """The table, ratios of the same round beside each other."""
    lines = ["| side | seconds per epoch | samples/s | ours takes |", "| --- | --- | --- | --- |"]
    for name, values in times.items():
        own = times["ours, 2 processes" if "2 processes" in name else "ours"]
        ratio = statistics.median(a / b for a, b in zip(own, values, strict=True))
        middle = statistics.median(values)
        lines.append(f"| {name} | {middle:.2f} | {60_000 / middle:,.0f} | {ratio:.3f} x its time |")
    return lines


def draw(times: dict[str, list[float]], path: Path) -> None:
    """A bar for each side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
    names = list(times)[::-1]
    colors = ["tab:blue" if name.startswith("ours") else "lightgray" for name in names]
    axis.barh(names, [statistics.median(times[name]) for name in names], color=colors)
    axis.set_xlabel("seconds per epoch of Fashion-MNIST (quickstart job), median")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the one-process sides")
    parser.add_argument("--rank-of-two", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of_two:
        return as_rank(*arguments.rank_of_two)
    torch.set_num_threads(arguments.threads)
    sides = {
        "ours": ours,
        "tutorial": tutorial,
        "bare": bare,
        "ours, 2 processes": lambda: two_processes("ours"),
        "bare DDP, 2 processes": lambda: two_processes("bare"),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds + 1):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            seconds = sides[name]()
            if number:  # the first round warms up
                times[name].append(seconds)
                print(f"round {number}: {name} {seconds:.2f} s", flush=True)
    load, version = os.getloadavg()[1], torch.__version__
    machine = f"{processor()}, {os.cpu_count()} CPUs, load average {load:.1f}"
    print(f"\n{machine}, threads: {arguments.threads}, torch {version}\n")
    print("\n".join(report(times)))
    draw(times, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
