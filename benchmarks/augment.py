"""What color, erasing and mixing of whole batches cost, beside torchvision's transforms.

    python benchmarks/augment.py                     # a minute on a CPU
    python benchmarks/augment.py --device cuda

Batches of 64 images of 3 x 224 x 224, one CPU thread. torchvision's MixUp and CutMix get whole batches, too,
its other transforms uint8 images one by one; both sides end with normalized floats. In turn, in rounds;
microseconds an image of CPU time, on a GPU of its own time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from overhead import processor
from torchvision.transforms import v2

from dist_train.data.augment import Augment, CutMix, MixUp
from dist_train.data.batch import Batch
from dist_train.data.normalize import Normalization
from dist_train.data.order import Part

COUNT, SIZE, CLASSES = 64, 224, 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARGUMENTS: dict[str, Any] = {
    "ColorJitter": v2.ColorJitter(0.4, 0.4, 0.4),
    "RandomErasing": v2.RandomErasing(0.5),
    "MixUp": MixUp(0.2),
    "CutMix": CutMix(1.0),
}


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """What a call takes, of the CPU or of a GPU."""
    if device.type == "cpu":
        begin = time.process_time()
        work()
        return time.process_time() - begin
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    work()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000


def sides(name: str, device: torch.device) -> dict[str, Callable[[], Any]]:
    """A transform as we do it, and as torchvision does."""
    pixels = torch.randint(0, 256, (COUNT, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    normalize = Normalization(MEAN, STD)
    images, labels = normalize(pixels), torch.randint(CLASSES, (COUNT,), device=device)
    indices = np.arange(COUNT)
    batch = Batch(images, labels, Part(0, 0, indices, COUNT, COUNT))
    ours = Augment([(name, ARGUMENTS[name])], 0, CLASSES, normalize)
    if name in ("MixUp", "CutMix"):
        theirs = getattr(v2, name)(alpha=ARGUMENTS[name].alpha, num_classes=CLASSES)
        return {"ours": lambda: ours(batch), "torchvision": lambda: theirs(images, labels)}

    def one_by_one() -> torch.Tensor:
        return normalize(torch.stack([ARGUMENTS[name](image) for image in pixels]))

    return {"ours": lambda: ours(batch._replace(inputs=normalize(pixels))), "torchvision": one_by_one}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    print("transform      ours, us an image   torchvision   ours takes (min, median, max of the rounds)")
    for name in ARGUMENTS:
        took: dict[str, list[float]] = {"ours": [], "torchvision": []}
        both = sides(name, device)
        for number in range(arguments.rounds + 1):
            for side in list(both)[:: -1 if number % 2 else 1]:
                each = seconds(both[side], device) / COUNT * 1e6
                took[side] += [each] if number else []  # the first round warms up
        ours, theirs = (statistics.median(took[side]) for side in both)
        ratios = sorted(a / b for a, b in zip(took["ours"], took["torchvision"], strict=True))
        shown = f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f} x its time"
        print(f"{name:<14} {ours:>17.0f} {theirs:>13.0f}   {shown}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    print(f"{name}, load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
