"""What shards cost and give: images from files, from shards on a disk, and from a real S3 server.

    python benchmarks/shards.py              # some minutes on two cores
    python benchmarks/shards.py --rounds 2   # quicker, noisier

The images and the batches are those of loader.py. The S3 server is SeaweedFS on this machine (of the `dev`
extra), so its work is done by the same CPUs; shards have 4 MB.

    files            `data.name=image_folder`
    shards           `data.name=shards` from a folder
    S3, first pass   from s3://, with nothing copied yet: what is waited for and copied is in it
    S3, copies       from s3://, when all is in `data.download_dir`

Per image: CPU microseconds of one process that makes batches, and for S3 besides those of the process that
copies. Bytes alone: to read them and compare the checksum, nothing decoded. By wall: two threads, with the
first batch. The data set is opened before. All sides run in turn, every other round in the opposite order;
ratios are those of a round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from loader import BATCH, RANK, opened, write_images  # noqa: E402
from overhead import processor  # noqa: E402

from dist_train.config import Config  # noqa: E402
from dist_train.data import Data, remote  # noqa: E402
from dist_train.tools import shard  # noqa: E402
from tests import store  # noqa: E402

SIDES = ("files", "shards", "S3, first pass", "S3, copies")
KINDS = ("CPU, us an image", "of that bytes alone", "by wall, us an image")


def options(side: str, folder: Path) -> dict[str, Any]:
    """What the data of a side is called in the configuration."""
    if side == "files":
        return {}
    root = "s3://pictures/shards" if side.startswith("S3") else str(folder / "shards")
    return {"name": "shards", "root": root, "download_dir": str(folder / "kept"), "download_gb": 1.0}


def cpu() -> float:
    """CPU seconds of this process, and of the one that copies, so far."""
    seconds = time.process_time()
    if remote._copier:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(remote._copier.pid).cpu_times()
            seconds += times.user + times.system
    return seconds


def epoch(config: Config, sets: Data) -> int:
    """Makes the batches of an epoch; returns how many images that were."""
    steps = sets.steps_per_epoch(config)
    return BATCH * sum(1 for _ in sets.train_loader(config, RANK, 0, steps))


def read(config: Config, sets: Data) -> int:
    """Reads the bytes of all images."""
    source = sets.train.source.whole
    for number in range(len(source)):
        if config.data.name == "image_folder":
            source.path(number).read_bytes()
        else:
            source.encoded(number)
    return len(source)


def spent(kind: str, side: str, folder: Path) -> float:
    """Microseconds an image."""
    by_wall = kind == KINDS[2]
    config, sets, _ = opened.__wrapped__(folder, 2 * by_wall, **options(side, folder))
    if side == "S3, first pass":
        for path in (folder / "kept").iterdir():
            path.unlink()
    elif side == "S3, copies":
        read(config, sets)
    clock: Callable[[], float] = time.perf_counter if by_wall else cpu
    begin = clock()
    images = (read if kind == KINDS[1] else epoch)(config, sets)
    return (clock() - begin) / images * 1e6


def measured(folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds of each kind and side in each round; round 0 warms up."""
    found: dict[str, dict[str, list[float]]] = {kind: {side: [] for side in SIDES} for kind in KINDS}
    for number in range(rounds + 1):
        for kind in KINDS:
            for side in SIDES[:: -1 if number % 2 else 1]:
                microseconds = spent(kind, side, folder)
                if number:
                    found[kind][side].append(microseconds)
                    print(f"round {number}: {side}, {kind}: {microseconds:,.0f}", flush=True)
    return found


def table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Medians, and the ratios of rounds to files."""
    lines = ["| " + " | ".join(("", *(f"{kind} | x files: min, median, max" for kind in KINDS))) + " |"]
    lines.append("| --- " * (1 + 2 * len(KINDS)) + "|")
    for side in SIDES:
        cells = [side]
        for kind in KINDS:
            values = found[kind][side]
            ratios = sorted(a / b for a, b in zip(values, found[kind]["files"], strict=True))
            shown = f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f}"
            cells += [f"{statistics.median(values):,.0f}", shown if side != "files" else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Bars of the medians of each kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(KINDS), figsize=(10, 2), layout="constrained", sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        colors = ["lightgray" if side == "files" else "tab:blue" for side in SIDES[::-1]]
        axis.barh(SIDES[::-1], [statistics.median(found[kind][side]) for side in SIDES[::-1]], color=colors)
        axis.set_xlabel(kind)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints the table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="passes of each side")
    parser.add_argument("--images", type=int, default=512, help="how many there are")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as served:
        folder = Path(name)
        size = write_images(folder, arguments.images)
        shard.make(folder, folder / "shards", [], 4_000_000, seed=0)
        with store.s3_server(Path(served)) as port:
            store.upload(port, folder / "shards", "shards")
            os.environ.update(store.reach(port))
            found = measured(folder, arguments.rounds)
    print(
        f"\n{processor()}, load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}; JPEGs of"
        f" {size / 1000:.1f} KB\n"
    )
    print("\n".join(table(found)))
    draw(found, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
