"""Each recipe in configs/ that can't be trained here: its model has its source's size, and it takes steps."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_train import fit, load
from dist_train.models import build
from dist_train.record.history import read_metrics
from tests.distributed.ranks import last
from tests.processes import REPO, Finished
from tests.worlds import CLASSES, write_images

pytestmark = pytest.mark.long

# file: classes and millions of weights of its source's model, and what makes that small enough for a test
RECIPES: dict[str, tuple[int, float, list[str]]] = {
    "cifar10_resnet18": (10, 11.17, []),
    "cifar10_vit": (10, 6.3, []),
    "imagenet/resnet50": (1000, 25.56, ["model.args.width_per_group=8"]),
    "imagenet/resnet50_a1": (1000, 25.56, ["model.args.base_width=8"]),
    "imagenet/resnet50_a2": (1000, 25.56, ["model.args.base_width=8"]),
    "imagenet/resnet50_a3": (1000, 25.56, ["model.args.base_width=8"]),
    "imagenet/vit_b16_deit3": (1000, 86.6, ["model.args.depth=2"]),
    "imagenet/convnext_tiny": (1000, 28.59, []),
}
JOB = ["data.name=image_folder", "data.root=images", "data.workers=0", "device=cpu", "train.batch_size=4",
       "train.steps=2", "schedule.warmup=1", "log.every=1", "eval.every=never", "checkpoint.best=none",
       "wandb.mode=disabled"]  # fmt: skip


def text_of(recipe: str) -> str:
    return (REPO / f"configs/{recipe}.yaml").read_text()


def here() -> list[str]:
    """The recipes whose packages are installed."""
    has_timm = importlib.util.find_spec("timm") is not None
    return [recipe for recipe in RECIPES if has_timm or "timm/" not in text_of(recipe)]


def test_models_have_the_size_of_those_in_their_sources() -> None:
    for recipe in here():
        classes, millions, _ = RECIPES[recipe]
        config = load([REPO / f"configs/{recipe}.yaml"])
        size = 32 if "cifar" in recipe else 192 if "vit" in recipe else 224
        with torch.device("meta"):
            model = build(config.model.name, config.model.args, (3, size, size), classes)
        count = sum(weight.numel() for weight in model.parameters()) / 1e6
        assert count == pytest.approx(millions, rel=0.005), recipe


def train_each(recipes: list[str]) -> None:
    """Trains each recipe for two steps, in this process."""
    for recipe in recipes:
        name = Path(recipe).name
        fit(load([f"{name}.yaml"], [*JOB, *RECIPES[recipe][2]]))


def test_recipes_take_steps_on_two_processes(ranks: Callable[..., list[Finished]], tmp_path: Path) -> None:
    """On images of 32 x 32 pixels; all else is as the file has it, but for what takes too long."""
    for part, count in (("train", 12), ("val", 4)):
        for path, name in write_images(tmp_path / "loose", count, size=32):
            (tmp_path / "images" / part / name).mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / "images" / part / name / path.name)
    for recipe in here():
        small = re.sub(r"\b(size|img_size): \d+", r"\1: 32", text_of(recipe))
        (tmp_path / f"{Path(recipe).name}.yaml").write_text(small)
    done = ranks(2, train_each, here(), timeout=600)
    assert [rank.rc for rank in done] == [0, 0], done[0].err
    for recipe in here():
        name = Path(recipe).name
        rows = [row for row in read_metrics(tmp_path / "runs" / name) if row["kind"] == "train"]
        assert [row["step"] for row in rows] == [1, 2], recipe
        assert all(math.isfinite(row["train/loss"]) for row in rows), recipe
        saved = last(tmp_path, name)
        assert saved["classes"] == sorted(CLASSES)
        assert (saved["average"] is not None) == ("ema:" in text_of(recipe)), recipe
