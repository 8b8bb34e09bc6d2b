"""What a data set may give, beyond pairs of an image and a label, and the batches that are made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset
from torchvision import tv_tensors

from dist_train import data
from dist_train.config import Config, UserError, from_mapping
from dist_train.data.images import InMemory
from dist_train.record.history import read_metrics

CPU = torch.device("cpu")
ALONE: Any = SimpleNamespace(rank=0, world_size=1, local_world_size=1, device=CPU)


class Own(list[Any]):
    """A data set of one's own."""


class Words(torch.utils.data.Dataset[Any]):
    """Numbers of words in memory: no images."""

    is_images = False

    def __init__(self, count: int = 10) -> None:
        self.words = torch.arange(count * 4).view(count, 4)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.words[index, :-1], self.words[index, 1:]


class Quick(Words):
    """The same, read many at a time."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("samples are read many at a time")

    def read_many(self, index: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.words[index, :-1], {"next": self.words[index, 1:]}


def config(task: str = "mine:Task", **options: Any) -> Config:
    """A task of one's own takes any samples."""
    options = {"workers": 0, "shuffle": False} | options
    return from_mapping({"data": options, "task": {"name": task}, "train": {"epochs": 1, "batch_size": 4}})


def batches(source: Any, workers: int = 0, **options: Any) -> list[data.Batch]:
    setup = config(workers=workers, **options)
    sets = data.build(setup, source, source)
    steps = sets.steps_per_epoch(setup)
    return [batch.to(CPU) for batch in sets.train_loader(setup, ALONE, 0, steps)]


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_are_dicts_become_batches_of_dicts_without_targets(workers: int) -> None:
    source = Own({"ids": torch.tensor([n, n + 1]), "weight": n / 2, "name": f"s{n}"} for n in range(6))
    first, last = batches(source, workers)
    assert first.targets is None and (first.rows, last.rows) == (4, 2)
    assert first.inputs["ids"].tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert last.inputs["weight"].tolist() == [2.0, 2.5]
    assert last.inputs["name"] == ["s4", "s5"]


def test_samples_of_three_parts_become_batches_of_three_parts() -> None:
    source = Own((torch.tensor([n]), n, np.float32(n)) for n in range(5))
    first, _ = batches(source)
    assert type(first.inputs) is tuple and first.targets is None
    assert [part.flatten().tolist() for part in first.inputs] == [[0, 1, 2, 3]] * 3


def test_an_image_may_have_several_targets() -> None:
    source = Own((torch.zeros(1, 2, 2, dtype=torch.uint8), {"label": n, "box": [n, 1.0]}) for n in range(5))
    first, _ = batches(source, mean=[0.5], std=[0.5])
    assert torch.equal(first.inputs, torch.full((4, 1, 2, 2), -1.0))
    assert first.targets["label"].tolist() == [0, 1, 2, 3]


def test_inputs_that_are_no_images_are_left_as_they_are() -> None:
    first = batches(Words())[0]
    assert first.inputs.tolist()[1] == [4, 5, 6] and first.targets.tolist()[1] == [5, 6, 7]
    assert data.build(config(), Words(), Words()).sample_shape == (3,)
    for option in ({"mean": [0.5], "std": [0.5]}, {"eval_transform": [{"Resize": {"size": 4}}]}):
        with pytest.raises(UserError, match=f"data.{next(iter(option))}: the inputs of .* are no images"):
            batches(Words(), **option)


def test_a_data_set_of_ones_own_may_be_read_many_at_a_time() -> None:
    source = Quick()
    source_one_by_one = Words()
    setup = config()
    samples = data.build(setup, source_one_by_one, source_one_by_one).train
    assert not samples.is_batched

    class Both(Quick):
        def __getitem__(self, index: int) -> Any:
            return self.words[index, :-1], {"next": self.words[index, 1:]}

        read_many = Quick.read_many

    assert data.build(setup, Both(), Both()).train.is_batched
    for one, other in zip(batches(Both()), batches(Words()), strict=True):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets["next"], other.targets)
    part = data.build(setup, Subset(Subset(Both(), [9, 7, 5, 3]), [1, 2]), source_one_by_one).train
    assert part.is_batched and part[1][0].tolist() == source.words[5, :-1].tolist()


def test_a_subclass_that_gives_other_samples_is_asked_for_its_own() -> None:
    class Doubled(InMemory):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
            image, label = super().__getitem__(index)
            return 2 * image, label

    class Negative(Subset[Any]):
        def __getitem__(self, index: Any) -> Any:
            image, label = super().__getitem__(index)
            return -image, label

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[index] for index in indices]

    images, labels = torch.rand(5, 1, 2, 2), torch.arange(5)
    plain = InMemory(images, labels, [])
    assert torch.equal(batches(Doubled(images, labels, []))[0].inputs, 2 * images[:4])
    assert torch.equal(batches(Subset(plain, [4, 2]))[0].inputs, images[[4, 2]])
    assert torch.equal(batches(Negative(plain, [4, 2]))[0].inputs, -images[[4, 2]])


def test_a_wrong_label_is_told_where_many_are_read_at_a_time_too() -> None:
    class Labelled(Words):
        classes = ("a", "b")

        def __getitem__(self, index: int) -> Any:
            return self.words[index], index % 3

        def read_many(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.words[index], index % 3

    with pytest.raises(UserError, match="data: the label of sample 2 is 2, but the 2 classes are numbered"):
        batches(Labelled())


def test_samples_that_make_no_batch_are_told() -> None:
    with pytest.raises(UserError, match=r"data: inputs of shapes \[1\] and \[2\] don't fit into one batch"):
        batches(Own({"ids": torch.zeros(n + 1)} for n in range(4)))
    with pytest.raises(UserError, match=r"data: targets of shapes \[1\] and \[2\] don't fit into one batch"):
        batches(Own((torch.zeros(1, 2, 2), torch.zeros(n + 1)) for n in range(4)))
    with pytest.raises(UserError, match="data: an input is of type dict; make it a number or a tensor"):
        batches(Own({"name": "a"} for n in range(4)))
    with pytest.raises(UserError, match="data: sample 0 is a Tensor, not a pair"):
        batches(Own([torch.zeros(1, 2, 2)]))


class Sum(nn.Module):
    """A model of samples of several parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.layer(inputs["ids"].float()).squeeze(1) + inputs["size"]


class Whole:
    """A task of samples without targets: each word of a sample counts as often as the sample says."""

    best = "min eval/loss"

    def losses(self, model: nn.Module, batch: data.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        values = (model(batch.inputs)[:, None] - batch.inputs["ids"]).square()
        return values, batch.inputs["count"][:, None].expand_as(values).float()

    def sums(self, model: nn.Module, batch: data.Batch) -> dict[str, torch.Tensor]:
        values, weights = self.losses(model, batch)
        return {"loss": (values * weights).double().sum(), "weight": weights.double().sum()}

    def report(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"loss": (sums["loss"] / sums["weight"]).item()}


def words(count: int) -> Own:
    return Own(
        {"ids": torch.tensor([n % 5, n % 3]), "size": n / 100, "count": n % 4, "name": f"s{n}"}
        for n in range(count)
    )


def test_samples_without_targets_are_trained_and_evaluated(here: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Sum()
    before = model.layer.weight.clone()
    settings = ["train.batch_size=4", "optim.lr=0.01", "data.workers=0", "wandb.mode=disabled", "device=cpu",
                "log.batches=true", "log.every=1"]  # fmt: skip
    result = here(*settings, "train.epochs=3", model=model, train_data=words(21), eval_data=words(9),
                  task=Whole())  # fmt: skip
    assert result.step == 18 and not torch.equal(before, model.layer.weight)
    rows = [row["train/loss"] for row in read_metrics(tmp_path / "runs/run") if "train/loss" in row]
    assert rows[-1] < rows[0]
    with torch.no_grad():
        sums = [Whole().sums(model.eval(), batch) for batch in batches(words(9))]
    expected = sum(s["loss"] for s in sums) / sum(s["weight"] for s in sums)
    assert result.metrics["eval/loss"] == pytest.approx(float(expected))


def test_a_task_by_samples_takes_inputs_of_several_parts(here: Callable[..., Any]) -> None:
    class Error:
        best = "min eval/loss"

        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return (outputs - targets).square()

        def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            return {}

    pairs = Own((sample, float(number)) for number, sample in enumerate(words(20)))
    settings = ["train.epochs=1", "train.batch_size=5", "data.workers=0", "wandb.mode=disabled", "device=cpu"]
    result = here(*settings, model=Sum(), train_data=pairs, eval_data=pairs, task=Error())
    assert result.state == "completed"
    with pytest.raises(UserError, match=r"can't take inputs of shape \[3\] and \[\]"):
        odd = Own(({"ids": torch.zeros(3), "size": 1.0}, 0.0) for _ in range(9))
        here(*settings, "run.name=odd", model=Sum(), train_data=odd, eval_data=odd, task=Error())


def test_all_tensors_of_a_batch_are_recorded(tmp_path: Path) -> None:
    def lines(change: int) -> list[Any]:
        source = Own({"ids": torch.tensor([n]), "size": n + change * (n == 2)} for n in range(8))
        list(data.recorded(batches(source), tmp_path / "batches.jsonl"))
        return [json.loads(line) for line in (tmp_path / "batches.jsonl").read_text().splitlines()]

    before, after = lines(0), lines(1)
    assert before[0]["inputs"] != after[0]["inputs"] and before[1] == after[1]


def test_an_image_and_its_mask_are_transformed_together() -> None:
    images = torch.randint(256, (6, 1, 9, 9), dtype=torch.uint8)
    pairs = Own((image, tv_tensors.Mask(image[0])) for image in images)
    whole = Own({"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(image[0])} for image in images)
    steps = [
        "RandomHorizontalFlip",
        {"RandomCrop": {"size": 5}},
        {"Resize": {"size": [10, 10], "interpolation": 0}},
    ]
    for one, other in zip(*(batches(s, train_transform=steps) for s in (pairs, whole)), strict=True):
        assert one.inputs.shape[1:] == (1, 10, 10) and one.targets.dtype == torch.int64
        assert torch.equal((one.inputs[:, 0] * 255).round().long(), one.targets)
        assert torch.equal(one.inputs, other.inputs["image"]) and torch.equal(
            one.targets, other.inputs["mask"]
        )
