"""Losses and metrics: one value per sample; a task of one's own in a few lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train import fit
from dist_train.config import UserError, from_mapping
from dist_train.predict import predict
from dist_train.task import Classification, build
from dist_train.tracking import read_metrics
from tests.conftest import REPO, SMALL

# A whole task: predicting numbers instead of classes.
REGRESSION = '''
import torch


class Regression:
    """Squared error, and the absolute error as a metric."""

    best = "min eval/error"

    def loss(self, outputs, targets):
        return (outputs.squeeze(1) - targets).square()

    def metrics(self, outputs, targets):
        return {"error": (outputs.squeeze(1) - targets).abs()}
'''


def test_the_loss_is_cross_entropy_of_each_sample() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    losses = Classification().loss(logits, torch.tensor([1, 1]))
    assert torch.allclose(losses, torch.tensor([math.log(4 / 3), math.log(4)]))


def test_label_smoothing_spreads_a_share_of_the_target_over_all_classes() -> None:
    logits, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    smooth = build(from_mapping({"train": {"epochs": 1}, "task": {"args": {"label_smoothing": 0.2}}}))
    soft = 0.8 * torch.nn.functional.one_hot(targets, 4) + 0.2 / 4
    expected = -(soft * logits.log_softmax(1)).sum(1)
    assert torch.allclose(smooth.loss(logits, targets), expected, atol=1e-6)


def test_class_numbers_and_one_hot_vectors_mean_the_same() -> None:
    logits, targets = torch.randn(6, 12), torch.arange(6)
    vectors = torch.nn.functional.one_hot(targets, 12).float()
    task = Classification()
    assert torch.allclose(task.loss(logits, targets), task.loss(logits, vectors))
    for name, values in task.metrics(logits, targets).items():
        assert torch.equal(values, task.metrics(logits, vectors)[name])


def test_accuracy_counts_the_first_class_and_top5_the_first_five_where_there_are_more_than_ten() -> None:
    logits = torch.arange(12.0).repeat(4, 1)
    measured = Classification().metrics(logits, torch.tensor([11, 10, 7, 6]))
    assert {name: values.tolist() for name, values in measured.items()} == {
        "accuracy": [1, 0, 0, 0],
        "top5": [1, 1, 1, 0],
    }
    assert list(Classification().metrics(logits[:, :10], torch.zeros(4).long())) == ["accuracy"]


def test_regression_is_plugged_in_by_its_name_in_under_30_lines(
    here: Callable[..., Any], tmp_path: Path
) -> None:
    assert len(REGRESSION.splitlines()) < 30
    (tmp_path / "my_regression.py").write_text(REGRESSION)
    x = np.random.default_rng(0).random((80, 4, 4), dtype=np.float32)
    y = x.mean((1, 2)) * 4
    np.savez(tmp_path / "numbers.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    here(*SMALL, "data.root=numbers.npz", "task.name=my_regression:Regression", "train.steps=150")
    rows = read_metrics(tmp_path / "runs" / "run")
    assert set(rows[-1]) >= {"eval/loss", "eval/error"}
    assert rows[-1]["eval/error"] < 0.15
    saved = torch.load(tmp_path / "runs/run/checkpoints/best.pt", weights_only=True)
    assert saved["best"] == min(row["eval/error"] for row in rows if "eval/error" in row)
    with pytest.raises(UserError, match="my_regression:Regression"):  # it has no classes
        predict("runs/run", [tmp_path / "nothing.png"])


def test_regression_is_plugged_in_through_fit(tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec(REGRESSION, space)
    x = torch.rand(80, 1, 4, 4)
    numbers = torch.utils.data.TensorDataset(x, x.mean((1, 2, 3)) * 4)
    result = fit(
        {
            "run": {"dir": str(tmp_path)},
            "train": {"steps": 150, "batch_size": 16},
            "optim": {"lr": 0.1},
            "wandb": {"mode": "disabled"},
            "device": "cpu",
        },
        model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1)),
        train_data=numbers,
        eval_data=numbers,
        task=space["Regression"](),
    )
    assert (result.state, result.step) == ("completed", 150)
    assert result.metrics["eval/error"] < 0.15


def test_an_unknown_metric_for_the_best_is_told_with_those_there_are(
    here: Callable[..., Any], small: list[str]
) -> None:
    with pytest.raises(UserError, match=r"checkpoint.best: .*'eval/acuracy', only .*eval/accuracy"):
        here(*small, "checkpoint.best=max eval/acuracy")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("regression", "task.name: there is no task 'regression'"),
        ("nowhere:Task", "task.name: there is no module 'nowhere'"),
    ],
)
def test_an_unknown_task_is_refused(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        build(from_mapping({"train": {"epochs": 1}, "task": {"name": name}}))


def test_the_example_of_regression_is_under_30_lines() -> None:
    assert len((REPO / "examples" / "regression.py").read_text().splitlines()) < 30
