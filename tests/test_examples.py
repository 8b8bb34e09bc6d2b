"""The examples run and are as short as they say; what `fit` is given from Python is used on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import load
from dist_train.record.history import read_metrics
from tests.processes import REPO, Finished

EXAMPLES = REPO / "examples"
QUIET = {"WANDB_MODE": "disabled"}


def last_metrics(run: Path) -> dict[str, Any]:
    return read_metrics(run)[-1]


@pytest.mark.long
def test_own_model_data_and_loss_need_less_than_20_lines_and_are_recorded(
    tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    assert len((EXAMPLES / "own_model.py").read_text().splitlines()) < 20
    finished = cli(EXAMPLES / "own_model.py", env=QUIET)
    assert finished.rc == 0, finished
    assert last_metrics(tmp_path / "runs/own-model")["eval/accuracy"] > 0.85
    config = load([tmp_path / "runs/own-model/config.yaml"])
    assert config.model.name == "object:torch.nn.modules.container.Sequential"
    assert config.data.name == "object:torch.utils.data.dataset.TensorDataset"
    assert config.task.name == "object:__main__.Focal"
    # The same images and model can't be had from that, and no others are taken in their place.
    evaluated = cli("eval", "runs/own-model")
    assert evaluated.rc == 2, evaluated
    assert evaluated.err.count("\n") == 1, evaluated


def test_a_task_that_is_no_classification_needs_less_than_30_lines(
    tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    assert len((EXAMPLES / "regression.py").read_text().splitlines()) < 30
    finished = cli(EXAMPLES / "regression.py", env=QUIET)
    assert finished.rc == 0, finished
    last = last_metrics(tmp_path / "runs/regression")
    assert last["eval/error"] < 0.05
    assert "eval/accuracy" not in last


SCRIPT = """
import os, torch, dist_train
from dist_train.data.images import InMemory
images = torch.rand(320, 1, 4, 4, generator=torch.Generator().manual_seed(0))
data = InMemory(images, (images[:, 0, 0].mean(1) > 0.5).long(), ["dark", "bright"])
torch.manual_seed(int(os.environ.get("RANK", 0)))  # as programs do that seed nothing
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
config = {"device": "cpu", "train": {"steps": 4, "ema": 0.999}, "wandb": {"mode": "disabled"}}
name = "w" + os.environ.get("WORLD_SIZE", "1")
dist_train.fit(config | {"run": {"name": name}}, model=model, train_data=data, eval_data=data)
"""


def test_a_model_that_each_rank_made_otherwise_is_that_of_rank_0(
    tmp_path: Path, cli: Callable[..., Finished], ranks: Callable[..., list[Finished]]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    finished = [cli("script.py"), *ranks(2, "script.py")]
    assert [process.rc for process in finished] == [0, 0, 0], finished
    one, two = (last_metrics(tmp_path / "runs" / name) for name in ("w1", "w2"))
    assert one["eval/accuracy"] == two["eval/accuracy"]
    assert one["eval/loss"] == pytest.approx(two["eval/loss"], rel=1e-6)


def test_a_loss_of_ones_own_that_the_configuration_names_can_be_predicted_with(
    tmp_path: Path, small: list[str], image_folder: Path, cli: Callable[..., Finished]
) -> None:
    (tmp_path / "mine.py").write_text("from dist_train.tasks import Classification as Mine\n")
    trained = cli("train", *small, "task.name=mine:Mine")
    assert trained.rc == 0, trained
    predicted = cli("predict", "runs/run", image_folder / "val", "--format", "json")
    assert predicted.rc == 0, predicted
    assert {row["class"] for row in json.loads(predicted.out)} <= {"0", "1", "2"}
