"""How many images a second become batches: torchvision's reference against ours, from JPEGs and caches.

    python benchmarks/loader.py              # about five minutes on two cores
    python benchmarks/loader.py --rounds 3   # quicker, noisier

The images are made here: smooth random fields of 500 x 375 pixels as JPEGs of about 55 KB, which are decoded
as quickly as photographs of this size. Each is cropped at random, resized to 224 x 224 and flipped at random,
64 to a batch. Nothing is trained.

    reference   torchvision's classification reference: Pillow, transforms (v1), float32 and normalized, a
                DataLoader
    v2          torchvision's decoder and transforms.v2 on uint8 tensors, float32 and normalized, a DataLoader
    ours        `data.name=image_folder` as a training reads it: from JPEGs by each decoder that is installed
                (all other rows by the quickest), from the cache, and from a cache with 256 pixels on the
                shorter side (another data set). Batches are uint8, as they are moved to the device; one row
                has them normalized on the CPU, as they are where it is the device. In the first pass over a
                cache each image is compared to its checksum: a row of its own. One by one: what a transform
                costs that worker processes must do, here one that does nothing
    decode, copy   limits: JPEGs from memory decoded; pixels of 224 x 224 copied

Per core: seconds that the CPU spent in one process that does all by itself, so others on the machine hardly
matter. By wall: with one worker process or thread for each CPU, timed from the first batch on. All sides run
in turn, round after round, every other round in the opposite order; ratios are those of a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from overhead import processor  # noqa: E402

from dist_train import data  # noqa: E402
from dist_train.config import Config, from_mapping  # noqa: E402
from dist_train.data import decode  # noqa: E402

BATCH, SIZE = 64, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
RANK: Any = SimpleNamespace(rank=0, world_size=1, local_world_size=1, device=CPU)


def write_images(folder: Path, count: int) -> float:
    """`count` JPEGs in folders of two classes, below train/ and val/; returns their mean size in bytes."""
    generator, sizes = torch.Generator().manual_seed(0), []
    for number in range(count):
        field = torch.zeros(1, 3, 375, 500)
        for cells, strength in ((4, 60), (12, 40), (40, 22), (125, 12), (500, 5)):
            coarse = torch.randn(1, 3, max(2, cells * 3 // 4), cells, generator=generator)
            field += strength * F.interpolate(coarse, size=(375, 500), mode="bicubic")
        pixels = (field[0] + 118).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        for part in ("train", "val")[: 2 if number < 2 else 1]:
            path = folder / part / f"class{number % 2}" / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=90)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes)


def reference(folder: Path, workers: int, images: int) -> Iterable[Any]:
    """The batches of torchvision's reference."""
    steps = [v1.RandomResizedCrop(SIZE), v1.RandomHorizontalFlip(), v1.PILToTensor()]
    steps += [v1.ConvertImageDtype(torch.float), v1.Normalize(MEAN, STD)]
    return _loader(ImageFolder(folder / "train", v1.Compose(steps)), workers, images)


def second(folder: Path, workers: int, images: int) -> Iterable[Any]:
    """The batches of transforms.v2 on tensors."""
    steps = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return _loader(ImageFolder(folder / "train", v2.Compose(steps), loader=_decoded), workers, images)


def _decoded(path: str) -> torch.Tensor:
    return torchvision.io.decode_image(path, torchvision.io.ImageReadMode.RGB)


def _loader(folder: ImageFolder, workers: int, images: int) -> Iterable[Any]:
    sampler = RandomSampler(folder, num_samples=images)
    return DataLoader(folder, BATCH, sampler=sampler, num_workers=workers)


@cache
def opened(
    folder: Path, workers: int, more: tuple[str, ...] = (), **options: Any
) -> tuple[Config, data.Data, Iterator[int]]:
    """A training's data, which is opened once; and the first steps of its epochs."""
    steps = [{"RandomResizedCrop": {"size": SIZE}}, "RandomHorizontalFlip", *more]
    source = {"name": "image_folder", "root": str(folder), "train_transform": steps, "workers": workers}
    settings = {"mean": list(MEAN), "std": list(STD), "cache_dir": f"{folder}/kept", **options}
    config = from_mapping({"data": source | settings, "train": {"batch_size": BATCH, "steps": 10**9}})
    sets = data.build(config)
    return config, sets, count(0, sets.steps_per_epoch(config))


def ours(
    folder: Path, workers: int, images: int, normalized: bool = False, **options: Any
) -> Iterator[data.Batch]:
    """The batches of a training of ours."""
    config, sets, epochs = opened(folder, workers, **options)
    first = next(epochs)
    batches = sets.train_loader(config, RANK, first, first + images // BATCH)
    return (batch.to(CPU) if normalized else batch for batch in batches)


def first_pass(folder: Path, workers: int, images: int) -> Iterator[data.Batch]:
    """The batches of a cache that this process has not read yet."""
    config, sets, _ = opened.__wrapped__(folder, workers, cache="disk")
    return iter(sets.train_loader(config, RANK, 0, images // BATCH))


def decoding(folder: Path, workers: int, images: int) -> Iterator[Any]:
    """JPEGs from memory, decoded and dropped."""
    files = [bytearray(path.read_bytes()) for path in sorted(folder.glob("train/*/*.jpg"))]
    for first in range(0, images, BATCH):
        yield [decode.decode_jpeg(files[number % len(files)], 3) for number in range(first, first + BATCH)]


def copying(folder: Path, workers: int, images: int) -> Iterator[Any]:
    """As many pixels as a batch has, copied."""
    source, batch = (np.ones((BATCH, SIZE, SIZE, 3), np.uint8) for _ in range(2))
    for _ in range(0, images, BATCH):
        for number in range(BATCH):
            batch[number] = source[number]
        yield batch


def decoded_by(decoder: Callable[[bytearray, int], torch.Tensor]) -> Callable[..., Iterator[data.Batch]]:
    """Ours with one of the decoders that are installed."""

    def side(*given: Any) -> Iterator[data.Batch]:
        with mock.patch.object(decode, "decoders", lambda: [decoder]):
            yield from ours(*given)

    return side


SIDES: dict[str, Callable[..., Iterable[Any]]] = {
    "reference": reference,
    "v2": second,
    **{f"ours, JPEGs {one.__name__.replace('_', ' ')}": decoded_by(one) for one in decode.decoders()},
    "ours, JPEGs, one by one": lambda *given: ours(*given, more=("Identity",)),
    "ours, JPEGs, normalized": lambda *given: ours(*given, normalized=True),
    "ours, cache, first pass": first_pass,
    "ours, cache": lambda *given: ours(*given, cache="disk"),
    "ours, cache of 256": lambda *given: ours(*given, cache="disk", cache_size=256),
    "decode alone": decoding,
    "copy alone": copying,
}
PER_CORE = ("ours, cache, first pass", "decode alone", "copy alone")  # by wall they tell nothing more


def per_core(side: str, folder: Path, images: int) -> float:
    """Images that one core makes a second."""
    batches = iter(SIDES[side](folder, 0, images))
    begin = time.process_time()
    made = sum(1 for _ in batches) * BATCH
    return made / (time.process_time() - begin)


def by_wall(side: str, folder: Path, images: int, workers: int) -> float:
    """Images that the whole machine makes a second, from the first batch on."""
    batches = iter(SIDES[side](folder, workers, images))
    next(batches)
    begin = time.perf_counter()
    made = sum(1 for _ in islice(batches, images // BATCH - 1)) * BATCH
    return made / (time.perf_counter() - begin)


def table(title: str, speeds: dict[str, list[float]]) -> list[str]:
    """Medians, and the ratios of rounds to the reference."""
    lines = [f"| {title} | images/s | x the reference: min, median, max |", "| --- | --- | --- |"]
    for side, values in speeds.items():
        ratios = sorted(a / b for a, b in zip(values, speeds["reference"], strict=True))
        shown = f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f}"
        lines.append(f"| {side} | {statistics.median(values):,.0f} | {shown} |")
    return lines


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Bars for each side, per core and by wall."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    for axis, (title, speeds) in zip(axes, found.items(), strict=True):
        names = [name for name in speeds if name not in PER_CORE][::-1]
        colors = ["tab:blue" if name.startswith("ours") else "lightgray" for name in names]
        axis.barh(names, [statistics.median(speeds[name]) for name in names], color=colors)
        axis.set_xlabel(f"images/s {title}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def measured(folder: Path, rounds: int, images: int, workers: int) -> dict[str, dict[str, list[float]]]:
    """Images a second of each side in each round, per core and by wall; round 0 warms up."""
    titles = ("per core", f"by wall, {workers} CPUs")
    found: dict[str, dict[str, list[float]]] = {
        titles[0]: {side: [] for side in SIDES},
        titles[1]: {side: [] for side in SIDES if side not in PER_CORE},
    }
    for number in range(rounds + 1):
        for title, speeds in found.items():
            for side in list(speeds)[:: -1 if number % 2 else 1]:
                if title == titles[0]:
                    speed = per_core(side, folder, images)
                else:
                    speed = by_wall(side, folder, images * workers, workers)
                if number:
                    speeds[side].append(speed)
                    print(f"round {number}: {side}, {title}: {speed:,.0f} images/s", flush=True)
    return found


def main() -> None:
    """Measures, prints the tables and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="passes of each side")
    parser.add_argument("--images", type=int, default=512, help="how many there are")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        size = write_images(Path(name), arguments.images)
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found = measured(Path(name), arguments.rounds, arguments.images, workers)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {Image.__version__}"
    print(
        f"\n{processor()}, load average {os.getloadavg()[0]:.1f}, {versions}; JPEGs of {size / 1000:.1f} KB"
    )
    for title, speeds in found.items():
        print("\n" + "\n".join(table(title, speeds)))
    draw(found, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
