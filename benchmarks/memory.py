"""How much memory a rank needs: DDP against FSDP2, with checkpoints in one file and in parts.

    python benchmarks/memory.py    # five minutes; 12 GB of memory, 5 GB in the current folder

Two processes train a model of 102 million parameters (12 blocks, each LayerNorm and two linear layers) by
AdamW for 4 steps of 8 images of the sample that ships with the package, and save once, at the end. Reported
is the peak of each rank's resident memory (VmHWM), at the beginning of the last step, so after three whole
ones, and at the end, with the save; and the median step. glibc gives memory back at once, as a GPU's
allocator would reuse it: MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
STEPS = 4
SIDES = {
    "DDP": ["parallel.name=ddp"],
    "FSDP2": ["parallel.name=fsdp"],
    "FSDP2, checkpoint in parts": ["parallel.name=fsdp", "checkpoint.sharded=true"],
    "FSDP2, recompute, in parts": [
        "parallel.name=fsdp",
        "checkpoint.sharded=true",
        "parallel.recompute=true",
    ],
}


class Block(nn.Module):
    """Two linear layers beside a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, width] -> [B, width]."""
        return x + self.down(self.act(self.up(self.norm(x))))


class Deep(nn.Module):
    """A classifier of images of 28 x 28; notes the peak of memory and the time at each step."""

    def __init__(self, width: int = 1024, depth: int = 12) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(784, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.seen: list[tuple[float, int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, 28, 28] -> [B, 10]."""
        if self.training:
            self.seen.append((time.monotonic(), peak()))
        x = self.first(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def peak() -> int:
    """The most memory that this process has had, in MB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) // 1024


def job(words: list[str]) -> None:
    """One rank of one side; prints what it needed."""
    from dist_train import fit, load

    config = load([str(ROOT / "configs/quickstart.yaml")], words)
    torch.manual_seed(0)
    model = Deep()
    fit(config, model=model)
    trained = model.seen[-STEPS:]  # before them the model is tried
    times = [after - before for (before, _), (after, _) in pairwise(trained)]
    result = {"training": trained[-1][1], "end": peak(), "step": statistics.median(times)}
    Path(f"{os.environ['RANK']}.json").write_text(json.dumps(result))


def measure(words: list[str]) -> list[dict[str, Any]]:
    """What each of two ranks needed."""
    folder = Path(tempfile.mkdtemp(dir="."))
    given = ["run.name=run", "device=cpu", "threads=1", "wandb.mode=disabled", "data.workers=0",
             f"data.root={ROOT / 'dist_train/assets'}", "optim.name=AdamW", "train.batch_size=8",
             "train.epochs=null", f"train.steps={STEPS}", "eval.batch_size=500", *words]  # fmt: skip
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "job", *given]
    threshold = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env = os.environ | threshold | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[:6000])
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Measures each side, and prints the table."""
    count = sum(weight.numel() for weight in Deep().parameters())
    print(f"{count / 1e6:.0f} million parameters, 2 processes; MB of rank 0 and rank 1")
    print("| side | in training | at the end, saved | seconds a step |\n| --- | --- | --- | --- |")
    for side, words in SIDES.items():
        zero, one = measure(words)
        print(f"| {side} | {zero['training']:,}, {one['training']:,} | {zero['end']:,}, {one['end']:,} |"
              f" {zero['step']:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    job(sys.argv[2:]) if sys.argv[1:2] == ["job"] else main()
