"""Starting the ranks of a run as real processes, without a launcher, and looking at what they left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.processes import environment, world
from tests.warm import Process

ROOT = Path(__file__).parents[2]
SMALL = ["wandb.mode=disabled", "device=cpu", "data.workers=0"]


def start(arguments: list[str], processes: int, cwd: Path) -> list[Process]:
    """Starts dist-train on so many ranks; each in a process group of its own, its output in a file."""
    started = []
    for rank, variables in enumerate(world(processes) if processes > 1 else [{}]):
        output = cwd / f"rank{rank}.out"
        started.append(Process(arguments, cwd, environment(**variables), output, output))
    return started


def train_command(*arguments: str) -> list[str]:
    """`dist-train train ...` with what makes tests quick."""
    return ["train", *SMALL, *arguments]


def train(cwd: Path, *arguments: str, processes: int = 1, expect: int = 0) -> None:
    """Trains to the end on so many ranks; each must exit with `expect`."""
    ranks = start(train_command(*arguments), processes, cwd)
    codes = [rank.wait(timeout=240) for rank in ranks]
    assert codes == [expect] * processes, (cwd / "rank0.out").read_text()[-3000:]


def last(cwd: Path, name: str = "run") -> dict[str, Any]:
    """The newest checkpoint of a run."""
    path = cwd / "runs" / name / "checkpoints" / "last.pt"
    return torch.load(path, weights_only=True)


def status(cwd: Path, name: str = "run") -> dict[str, Any]:
    """status.json of a run."""
    return json.loads((cwd / "runs" / name / "status.json").read_text())


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether model, moving average and optimizer of two checkpoints are equal to the last bit."""
    return all(equal(one[part], other[part]) for part in ("model", "average", "optimizer", "metrics"))


def equal(one: Any, other: Any) -> bool:
    """Equality of nested containers with tensors in them."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Relative L2 distance of the weights of two checkpoints."""
    a, b = (torch.cat([v.double().flatten() for v in c["model"].values()]) for c in (one, other))
    return float((a - b).norm() / a.norm())
