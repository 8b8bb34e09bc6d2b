"""Where the GPU tests run: on CUDA, or nowhere.

`GPU_TESTS_ON=cpu make test-gpu` tries the tests themselves where there is no GPU: gloo instead of NCCL.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.worlds import SMALL, write_npz

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
HERE = Path(__file__).parent
GPUS = torch.cuda.device_count() if DEVICE == "cuda" else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs more GPUs than there are."""
    for item in items:
        needed = {"test_one.py": 1, "test_two.py": 2}[item.path.name] if item.path.parent == HERE else 0
        if needed > GPUS:
            item.add_marker(pytest.mark.skip(reason=f"there are {GPUS} CUDA devices, {needed} are needed"))


MINE = """
import os, signal
from torch import nn

seen = 0

def dies(image):  # the process, when it reads its n-th sample
    global seen
    seen += 1
    if seen == int(os.environ.get("DIES_AT", "0")):
        os.kill(os.getpid(), getattr(signal, os.environ.get("DIES_OF", "SIGKILL")))
    return image

def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(72, 64), nn.ReLU(), nn.Linear(64, num_classes),
    )
"""


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """Arguments of a training of 24 steps on the GPU: convolutions, BatchNorm, dropout, AdamW, an average."""
    (tmp_path / "mine.py").write_text(MINE)
    write_npz(tmp_path)
    # The CPU's fused kernels round the last few numbers of a shard otherwise.
    fused = [] if DEVICE == "cuda" else ["optim.args.fused=false"]
    return [
        *SMALL, *fused, f"device={DEVICE}", "deterministic=true",
        "data.train_transform=[RandomHorizontalFlip,mine:dies]",
        "model.name=mine:net", "optim.name=AdamW", "optim.lr=0.01", "train.ema=0.9", "train.clip_norm=1",
        "train.steps=24", "checkpoint.every=5", "eval.every=8",
    ]  # fmt: skip
