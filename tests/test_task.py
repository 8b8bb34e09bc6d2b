"""Losses and metrics: one value per sample; a task of one's own in a few lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import fit
from dist_train.config import UserError, from_mapping
from dist_train.data.images import InMemory
from dist_train.models import probe
from dist_train.predict import predict
from dist_train.record.history import read_metrics
from dist_train.tasks import Classification, build
from tests.processes import REPO
from tests.worlds import SMALL

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


def a_task(
    loss: Any = None, metrics: Any = None, best: str = "max eval/accuracy", **members: Any
) -> Classification:
    """A classification whose loss or metrics are these functions of outputs and targets."""
    given = {"loss": loss, "metrics": metrics}
    methods = {name: lambda self, o, t, f=f: f(o, t) for name, f in given.items() if f}
    task = type("Mine", (Classification,), {**methods, "best": best})()
    vars(task).update(members)
    return task


class Net(nn.Sequential):
    """A linear model whose outputs are passed through `give`."""

    def __init__(self, give: Any = None, outputs: int = 3) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, outputs))
        self.give = give

    def forward(self, images: torch.Tensor) -> Any:
        outputs = super().forward(images)
        return self.give(outputs, self.training) if self.give else outputs


def each(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (a_task(nn.functional.cross_entropy), r"the loss of 'Mine' is of shape \[\] .* reduction=\"none\""),
        (a_task(lambda o, t: each(o, t).mean().item()), "the loss of 'Mine' is a float for 5 samples"),
        (a_task(lambda o, t: each(o, t).detach()), "the loss of 'Mine' has no gradient"),
        (a_task(lambda o, t: (o[:, :1] - t).square()), r"the loss of 'Mine' is of shape \[5, 5\]"),
        (a_task(lambda o, t: (o[:, :2] - 1).square().sum(0)), r"the loss .* \[2\] for 5 samples"),
        (
            a_task(lambda o, t: o.view(5, 7)),
            r"'Mine' can't take outputs \[5, 3\] of .* targets \[5\] of torch.int64",
        ),
        (a_task(metrics=lambda o, t: o.mean(1)), "the metrics of 'Mine' are a Tensor, not a dict"),
        (a_task(metrics=lambda o, t: {"f1": o.mean()}), r"the metric 'f1' of 'Mine' is of shape \[\]"),
        (a_task(metrics=lambda o, t: {"map": o[:, :, None] > 0}), r"the metric 'map' .* \[5, 3, 1\]"),
        (a_task(metrics=lambda o, t: {"loss": o[:, 0]}), "calls a metric 'loss'"),
        (a_task(metrics=lambda o, t: {"top 1": o[:, 0]}), "calls a metric 'top 1'"),
        (a_task(metrics=lambda o, t: {1: o[:, 0]}), "calls a metric 1;"),
        (a_task(best="accuracy"), "its `best` is written as .*, not 'accuracy'"),
        (a_task(best="max eval/f1"), "the evaluation has no 'eval/f1', only eval/loss, eval/accuracy"),
        (a_task(margins=nn.Linear(3, 3)), "'Mine' has weights of its own"),
        (object(), "'object' has no `loss`; a task has loss, metrics and best"),
    ],
)
def test_what_a_task_gives_is_checked_before_the_first_step(
    task: Any, told: str, here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        here(*small, task=task)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Net(lambda o, training: {"logits": o}), "Net' gives a dict for 2 images"),
        (Net(lambda o, training: (o, o)), "Net' gives a tuple for 2 images"),
        (Net(lambda o, training: o.flatten()), r"Net' gives outputs of shape \[6\] for 2 images"),
        (Net(outputs=2), r"it gives outputs of shape \[2\] for an image, .* each of the 3 classes"),
        (Net(lambda o, training: o[:, :, None]), r"it gives outputs of shape \[3, 1\] for an image"),
        (
            Net(lambda o, training: (o, o) if training else o),
            "it gives a tuple, but a task works with one tensor",
        ),
    ],
)
def test_what_a_model_gives_is_checked_before_the_first_step(
    model: nn.Module, told: str, here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        here(*small, model=model)
    assert not list(tmp_path.glob("runs/run/checkpoints/*"))


@pytest.mark.parametrize(
    ("outputs", "give", "told"),
    [
        (
            1,
            None,
            r"its task is 'object:.*Mine', and its model gives \[1\] for an image, not one .* 3 classes",
        ),
        (9, None, r"its model gives \[9\] for an image"),  # an embedding, perhaps
        (3, lambda outputs, training: outputs[:, :, None], r"its model gives \[3, 1\] for an image"),
    ],
)
def test_a_run_that_is_no_classification_predicts_no_classes(
    outputs: int, give: Any, told: str, here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.flatten(1).mean(1) - targets).square()

    task = a_task(loss, lambda outputs, targets: {"error": loss(outputs, targets)}, best="min eval/error")
    here(*small, model=Net(give, outputs), task=task)
    with pytest.raises(UserError, match=told):
        predict("runs/run", [tmp_path / "nothing.png"], model=Net(give, outputs))


def _in_place(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.sub_(nn.functional.one_hot(targets, 3)).square().sum(1)


@pytest.mark.parametrize(
    "task",
    [
        a_task(_in_place),
        a_task(metrics=lambda o, t: {"accuracy": torch.from_numpy(o.numpy().argmax(1) == t.numpy())}),
    ],
    ids=["a loss that works in place", "a metric by NumPy"],
)
def test_the_trial_refuses_nothing_that_training_would_take(
    task: Any, here: Callable[..., Any], small: list[str]
) -> None:
    assert here(*small, task=task).state == "completed"


def test_a_frozen_part_of_a_task_is_no_state(here: Callable[..., Any], small: list[str]) -> None:
    task = a_task(weights=nn.Linear(3, 3).requires_grad_(False))
    assert here(*small, task=task).state == "completed"


def test_metrics_that_not_all_batches_have_are_told(here: Callable[..., Any], small: list[str]) -> None:
    def metrics(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        short = {"short": outputs[:, 1]} if len(outputs) == 5 else {}
        return {"accuracy": outputs[:, 0], **short}

    with pytest.raises(UserError, match="'Mine' gives some metrics for a part of the batches only"):
        here(*small, "eval.batch_size=16", task=a_task(metrics=metrics))  # of 16, 16 and 5 samples


def test_targets_that_are_no_tensor_are_told(here: Callable[..., Any], small: list[str]) -> None:
    data = [(torch.zeros(1, 8, 8), {"label": "cat"})] * 20
    with pytest.raises(UserError, match="data: a target is of type dict"):
        here(*small, model=Net(), train_data=data, eval_data=data, task=a_task())
    data = [(torch.zeros(1, 8, 8), {"label": 1, "box": 2})] * 20
    with pytest.raises(UserError, match="task: classification needs one label for each image, not a dict"):
        here(*small, model=Net(), train_data=data, eval_data=data, task=a_task())


def test_a_task_by_samples_takes_targets_of_several_parts(here: Callable[..., Any], small: list[str]) -> None:
    class Both:
        best = "min eval/loss"

        def loss(self, outputs: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
            return each(outputs, targets["label"]) + (outputs[:, 0] - targets["size"]).square()

        def metrics(self, outputs: torch.Tensor, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"size": (outputs[:, 0] - targets["size"]).abs()}

    data = [(torch.rand(1, 8, 8), {"label": n % 3, "size": n / 20}) for n in range(20)]
    result = here(*small, model=Net(), train_data=data, eval_data=data, task=Both())
    assert set(result.metrics) == {"eval/loss", "eval/size"}


@pytest.mark.parametrize("in_memory", [True, False])
def test_labels_beyond_the_outputs_are_told_where_classes_have_no_names(
    in_memory: bool, here: Callable[..., Any], small: list[str]
) -> None:
    images, labels = torch.zeros(40, 1, 8, 8), torch.arange(40) % 3
    labels[31] = 3
    data = InMemory(images, labels, []) if in_memory else list(zip(images, labels, strict=True))
    with pytest.raises(UserError, match="sample 31 is 3, but the 3 classes are numbered from 0"):
        here(*small, model=Net(), train_data=data, eval_data=data)


def test_a_task_is_tried_without_a_trace(here: Callable[..., Any], small: list[str], tmp_path: Path) -> None:
    """BatchNorm's averages and the initial weights are those of the model that nobody has tried."""
    here(*small, "model.name=cnn", "model.args.widths=[8]", "optim.lr=0", "train.steps=1")
    saved = torch.load(tmp_path / "runs/run/checkpoints/last.pt", weights_only=True)["model"]
    assert [value.item() for name, value in saved.items() if name.endswith("num_batches_tracked")] == [1]


def test_a_model_is_tried_without_a_trace_in_buffers_that_each_pass_changes() -> None:
    class Counting(nn.Flatten):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            return super().forward(images)

    model = nn.Sequential(Counting(), nn.LazyLinear(3), nn.LazyBatchNorm1d())
    assert probe(model, torch.zeros(2, 1, 2, 2), "mine").shape == (2, 3)
    assert model.state_dict()["0.passes"] == 0


def test_an_evaluation_of_one_sample_takes_a_squeezed_loss(here: Callable[..., Any], tmp_path: Path) -> None:
    x = torch.rand(17, 1, 4, 4)
    numbers = torch.utils.data.TensorDataset(x, x.mean((1, 2, 3)))

    class Squeezed:
        best = "min eval/loss"

        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return (outputs.squeeze() - targets.squeeze()).square()

        def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"error": (outputs.squeeze() - targets.squeeze()).abs()}

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1))
    result = here(
        *SMALL, "eval.batch_size=16", model=model, train_data=numbers, eval_data=numbers, task=Squeezed()
    )
    assert result.state == "completed"


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
