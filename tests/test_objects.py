"""Runs of objects that a program gave to `fit`: no file holds these, and nothing else takes their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dist_train import load
from dist_train.config import UserError
from dist_train.predict import evaluate_run, load_model, predict
from dist_train.tasks import Classification
from tests.processes import Finished
from tests.worlds import CLASSES, SMALL, pictures

DATA = ["data.name=fashion_mnist", "data.root=null"]  # of what is then not used


class Pictures(torch.utils.data.Dataset[Any]):
    """The pictures of conftest; without arguments a data set of another kind: its labels mean nothing."""

    classes = CLASSES

    def __init__(self, count: int = 50, seed: int = 9, shift: int = 1) -> None:
        images, labels = pictures(count, seed=seed)
        self.images, self.labels = torch.from_numpy(images)[:, None], (labels + shift) % 3

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])


class Doubled(Classification):
    """A loss of one's own."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 2 * super().loss(outputs, targets)


class Regression:
    """A task whose targets are numbers."""

    best = "min eval/loss"

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.squeeze(1) - targets).square()

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}


def network(width: int = 7, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, outputs))


def measured() -> list[tuple[torch.Tensor, float]]:
    return [(image / 255, image.float().mean().item()) for image, _ in (Pictures()[n] for n in range(20))]


def train_data() -> Pictures:
    return Pictures(90, seed=0, shift=0)


def eval_data() -> Pictures:
    return Pictures(37, seed=1, shift=0)


GIVEN: dict[str, tuple[dict[str, Callable[[], Any]], list[str], dict[str, Callable[[], Any]], str]] = {
    # given to fit, words of the configuration, to be given again, and what is told of it
    "a model": ({"model": network}, [], {"model": network}, "model.name: .*'torch.*Sequential'.* model=..."),
    "a task": ({"task": Doubled}, [], {"task": Doubled}, "task.name: .*Doubled'.* task=..."),
    "a regression": (
        {
            "train_data": measured,
            "eval_data": measured,
            "model": lambda: network(outputs=1),
            "task": Regression,
        },
        [],
        {"eval_data": measured, "model": lambda: network(outputs=1), "task": Regression},
        "model.name: .* model=...",
    ),
    "two data sets": (
        {"train_data": train_data, "eval_data": eval_data},
        DATA,
        {"eval_data": eval_data},
        "data.name: .*Pictures'.* eval_data=...",
    ),
    "a data set to hold out a part of": (
        {"train_data": train_data},
        [*DATA, "data.eval_fraction=0.2"],
        {"train_data": train_data},
        "data.name: .*Pictures'.* train_data=...",
    ),
    "an eval set": (
        {"eval_data": eval_data},
        [f"data.args.classes={CLASSES}"],
        {"eval_data": eval_data},
        "data.name: .*Pictures'",
    ),
}


@pytest.mark.parametrize("what", GIVEN)
def test_a_run_of_given_objects_is_evaluated_with_these_and_refused_without(
    what: str, here: Callable[..., Any], npz: Path
) -> None:
    given, words, again, told = GIVEN[what]
    result = here(*SMALL, *words, **{name: make() for name, make in given.items()})
    with pytest.raises(UserError, match=told):
        evaluate_run("runs/run")
    objects = {name: make() for name, make in again.items()}
    assert evaluate_run("runs/run/checkpoints/last.pt", **objects) == result.metrics


def test_a_run_of_given_objects_goes_on_with_these_and_not_with_others(
    here: Callable[..., Any], npz: Path
) -> None:
    def objects() -> dict[str, Any]:
        torch.manual_seed(0)
        return {"model": network(), "train_data": train_data(), "eval_data": eval_data(), "task": Doubled()}

    here(*SMALL, "train.steps=6", **objects())
    again = here(*SMALL, **objects())
    assert (again.state, again.step) == ("completed", 12)
    assert again.metrics == here(*SMALL, "run.name=straight", **objects()).metrics
    more = [*SMALL, "train.steps=18"]
    with pytest.raises(UserError, match=r"another configuration \(data.name: object:.*; model.name: object:"):
        here(*more)
    with pytest.raises(UserError, match=r"another configuration .task.name: "):
        here(*more, **objects() | {"task": Classification()})


def test_the_command_line_says_what_must_be_given_from_python(
    here: Callable[..., Any], npz: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    here(*SMALL, model=network(), train_data=train_data(), eval_data=eval_data(), task=Doubled())
    assert load(["runs/run/config.yaml"]).model.name == "object:torch.nn.modules.container.Sequential"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    for words in (["eval", "runs/run"], ["predict", "runs/run", "x.png"], ["train", "runs/run/config.yaml"]):
        finished = cli(*words)
        assert finished.rc == 2, finished
        assert "a program gave to `fit`" in finished.err and "Traceback" not in finished.err, finished
        assert len(finished.err.splitlines()) == 1, finished
    named = cli("eval", "runs/run", "data.name=arrays", "data.root=arrays.npz", "task.name=classification")
    assert "model.name: " in named.err, named


def test_a_given_model_is_loaded_and_predicts(
    here: Callable[..., Any], npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here(*SMALL, "train.steps=200", model=network(), train_data=train_data(), eval_data=eval_data())
    empty = network()
    model, saved = load_model("runs/run", model=empty)
    assert model is empty and not model.training
    assert torch.equal(model.state_dict()["1.weight"], saved["model"]["1.weight"])
    with pytest.raises(UserError, match=r"best.pt: does not fit the Sequential that is given"):
        load_model("runs/run", model=network(width=8))
    images, labels = pictures(3, seed=5)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file)
    rows, errors = predict("runs/run", files, model=network())
    assert not errors
    assert [row["class"] for row in rows] == [CLASSES[label] for label in labels]
    assert "what it did to them itself is not done here" in capsys.readouterr().err


def test_an_eval_set_whose_classes_are_others_is_refused(here: Callable[..., Any], small: list[str]) -> None:
    here(*small)  # its classes are 0, 1 and 2
    with pytest.raises(UserError, match=r"its classes .*bright, dark, striped.* are not those of the run"):
        evaluate_run("runs/run", eval_data=eval_data())


class Empty(nn.Module):
    """A model that counts as false, since it has a length, and that is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def __len__(self) -> int:
        return 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def test_a_given_model_that_counts_as_false_has_its_average_and_is_used(
    here: Callable[..., Any], small: list[str]
) -> None:
    result = here(*small, "train.ema=0.9", model=Empty())
    last = result.folder / "checkpoints" / "last.pt"
    _, saved = load_model(last, model=Empty())
    assert not torch.equal(saved["average"]["layers.1.weight"], saved["model"]["layers.1.weight"])
    assert evaluate_run(last, model=Empty()) == result.metrics
