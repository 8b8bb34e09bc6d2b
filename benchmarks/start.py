"""From the command to the first step: ours against bare scripts that do the same step, each in a new process.

    python benchmarks/start.py              # about ten minutes on two cores; Linux
    python benchmarks/start.py --rounds 3   # quicker, noisier

A step is done when its loss is written: a bare script writes it to a file, as `log.every=1` lets ours write
a row of metrics.jsonl. The benchmark looks for that file every 5 ms, takes the time since it started the
command, and the CPU time of the process, of its children and, under torchrun, of the launcher so far. Then it
kills them. The sides of a job take turns, every other round in the opposite order; ratios are those of the
same round. Others at work on the machine show in the seconds of the clock, hardly in those of the CPU.

    quickstart       the MLP of configs/quickstart.yaml; both parts of Fashion-MNIST are read before the step.
                     "bare" reads them with gzip and numpy; "tutorial" as PyTorch's quickstart does, with
                     torchvision and a DataLoader, from files that are unpacked already; "bare, no collector"
                     is "bare" with Python's garbage collector off, as ours has it while it imports.
    image folder     ResNet-18 of torchvision on a folder of JPEGs; the other side reads them by torchvision's
                     ImageFolder and a DataLoader.
    two processes    the quickstart under torchrun, with DistributedDataParallel, over gloo.

One CPU thread a process. All modules are compiled before: the first round is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from overhead import environment, processor  # noqa: E402

from dist_train.data.fashion_mnist import ASSETS, DEBIAN  # noqa: E402

PATIENCE = 180.0
FASHION_MNIST = DEBIAN if DEBIAN.exists() else ASSETS
NO_COLLECTOR = "import gc\ngc.disable()\n"
READ = f"""
import gzip
import numpy as np
import torch
from torch import nn

def read(part):
    with gzip.open(f"{FASHION_MNIST}/{{part}}-images-idx3-ubyte.gz") as file:
        images = torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=16).copy())
    with gzip.open(f"{FASHION_MNIST}/{{part}}-labels-idx1-ubyte.gz") as file:
        labels = torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).copy())
    return images.view(-1, 1, 28, 28), labels.long()

(images, labels), test = read("train"), read("t10k")
inputs, targets = images[:64].float() / 255, labels[:64]
"""
TUTORIAL = """
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import ToTensor

train = datasets.FashionMNIST("data", train=True, transform=ToTensor())
test = datasets.FashionMNIST("data", train=False, transform=ToTensor())
inputs, targets = next(iter(DataLoader(train, batch_size=64)))
"""
MLP = """
layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
model = nn.Sequential(nn.Flatten(), *layers)
"""
FOLDER = """
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import ToTensor

train, test = (datasets.ImageFolder(f"images/{part}", ToTensor()) for part in ("train", "val"))
inputs, targets = next(iter(DataLoader(train, batch_size=32, shuffle=True)))
model = models.resnet18(num_classes=2)
"""
DDP = """
rank = torch.distributed.get_rank()
model = nn.parallel.DistributedDataParallel(model)
inputs, targets = inputs[rank::2], targets[rank::2]
"""
STEP = """
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
loss = nn.functional.cross_entropy(model(inputs), targets)
loss.backward()
optimizer.step()
optimizer.zero_grad()
with open("first", "w") as file:
    print(loss.item(), file=file)
__import__("time").sleep(600)
"""
GROUP = "import torch.distributed\ntorch.distributed.init_process_group('gloo')\n"
SCRIPTS = {
    "bare": READ + MLP + STEP,
    "bare, no collector": NO_COLLECTOR + READ + MLP + STEP,
    "tutorial": TUTORIAL + MLP + STEP,
    "torchvision": FOLDER + STEP,
    "bare DDP": READ + MLP + GROUP + DDP + STEP,
}
OURS = ["-m", "dist_train", "train", str(ROOT / "configs/quickstart.yaml"), "run.name=run", "log.every=1",
        "device=cpu", "threads=1", "wandb.mode=disabled"]  # fmt: skip
IMAGES = ["data.name=image_folder", "data.root=images", "model.name=resnet18", "train.batch_size=32"]
JOBS = {
    "quickstart": ["ours", "bare", "bare, no collector", "tutorial"],
    "image folder": ["ours", "torchvision"],
    "two processes": ["ours", "bare DDP"],
}


def write_images(folder: Path) -> None:
    """images/{train,val}/{a,b}/*.jpg: 64 and 8 random pictures of 64 x 64 pixels."""
    random = np.random.default_rng(0)
    for part, count in (("train", 32), ("val", 4)):
        for name in ("a", "b"):
            (place := folder / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.jpg")


def unpack(folder: Path) -> None:
    """data/FashionMNIST/raw, as torchvision's download leaves it."""
    (folder / "data/FashionMNIST/raw").mkdir(parents=True)
    for file in FASHION_MNIST.glob("*-ubyte.gz"):
        (folder / "data/FashionMNIST/raw" / file.stem).write_bytes(gzip.decompress(file.read_bytes()))


def measure(job: str, side: str, folder: Path) -> tuple[float, float]:
    """Seconds of the clock and of the CPU from the command to the first step, in an empty folder."""
    words = [*OURS, *(IMAGES if job == "image folder" else [])]
    first = folder / "runs/run/metrics.jsonl"
    if side != "ours":
        (folder / "side.py").write_text(SCRIPTS[side])
        words, first = ["side.py"], folder / "first"
    if job == "image folder":
        write_images(folder)
    if side == "tutorial":
        unpack(folder)
    if job == "two processes":
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    with (folder / "output.txt").open("wb") as output:
        begin = time.perf_counter()
        process = psutil.Popen(
            [sys.executable, *words], cwd=folder, env=environment(), stdout=output, stderr=output
        )
        try:
            while not (first.exists() and first.stat().st_size):
                if process.poll() is not None or time.perf_counter() - begin > PATIENCE:
                    sys.exit(f"{job}, {side}: no first step\n{(folder / 'output.txt').read_text()[-3000:]}")
                time.sleep(0.005)
            return time.perf_counter() - begin, cpu_seconds(process)
        finally:
            end(process)


def cpu_seconds(process: psutil.Popen) -> float:
    """What a process and its children have taken so far, those that have ended among them."""
    return sum(sum(one.cpu_times()[:4]) for one in (process, *process.children(recursive=True)))


def end(process: psutil.Popen) -> None:
    """Kills a process and its children."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def table(times: dict[tuple[str, str], list[tuple[float, float]]]) -> list[str]:
    """A row for each side: medians, and by how much ours takes longer in the same round."""
    lines = [
        "| job | side | seconds | CPU seconds | ours takes, by the CPU (min to max) | by the clock |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (job, side), values in times.items():
        clock, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        cells = ["", ""]
        if side != "ours":
            pairs = list(zip(times[job, "ours"], values, strict=True))
            wall, spent = ([own[i] / other[i] for own, other in pairs] for i in range(2))
            cells = [f"{statistics.median(r):.2f} x ({min(r):.2f} to {max(r):.2f})" for r in (spent, wall)]
        lines.append(f"| {job} | {side} | {clock:.2f} | {cpu:.2f} | {cells[0]} | {cells[1]} |")
    return lines


def draw(times: dict[tuple[str, str], list[tuple[float, float]]], path: Path) -> None:
    """A bar of CPU seconds for each side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    names = [f"{job}: {side}" for job, side in times][::-1]
    colors = ["tab:blue" if name.endswith("ours") else "lightgray" for name in names]
    cpu = [statistics.median(seconds for _, seconds in values) for values in times.values()][::-1]
    axis.barh(names, cpu, color=colors)
    axis.set_xlabel("CPU seconds from the command to the first step, median")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="starts of each side")
    parser.add_argument("--job", choices=JOBS, action="append", help="these only")
    arguments = parser.parse_args()
    sides = [(job, side) for job in arguments.job or JOBS for side in JOBS[job]]
    times: dict[tuple[str, str], list[tuple[float, float]]] = {pair: [] for pair in sides}
    for number in range(arguments.rounds + 1):
        for job, side in sides[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                clock, cpu = measure(job, side, Path(folder))
            if number:  # the first round compiles
                times[job, side].append((clock, cpu))
                print(f"round {number}: {job}, {side}: {clock:.2f} s, CPU {cpu:.2f} s", flush=True)
    print(f"\n{processor()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[1]:.1f},", end=" ")
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}\n")
    print("\n".join(table(times)))
    draw(times, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
