"""Distillation: a student learns from a teacher, which is named, checked and never changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config import UserError
from dist_train.distill import Distilled
from dist_train.predict import evaluate_run, load_model
from dist_train.record.history import read_metrics
from dist_train.tasks import Classification
from dist_train.tools.replay import replay
from tests.distributed.ranks import last, same_bits
from tests.processes import Finished
from tests.worlds import SMALL

TEACHER = [*SMALL, "model.name=cnn", "model.args={widths: [4, 4]}", "run.name=teacher", "train.ema=0.5"]
STUDENT = [
    *SMALL, "model.name=mlp", "model.args={hidden: [8], dropout: 0.1}", "train.parts=4", "log.every=1",
    "data.train_transform=[RandomHorizontalFlip,{MixUp: {alpha: 0.4}}]", "checkpoint.every=4",
    "task.teacher=runs/teacher", "task.teacher_weight=0.7", "task.temperature=2", "task.args.loss=bce",
]  # fmt: skip


def test_the_loss_is_shared_with_the_distance_to_the_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(6, 5, generator=generator), torch.arange(6) % 3
    student, teacher = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3).requires_grad_(False)
    task = Distilled(Classification(0.1), teacher, "", weight=0.3, temperature=2.0)
    batch: Any = type("Batch", (), {"inputs": inputs, "targets": targets, "rows": 6})
    values, weights, further = task.losses(student, batch)
    p = (teacher(inputs) / 2).softmax(1)
    distance = 4 * (p * (p.log() - (student(inputs) / 2).log_softmax(1))).sum(1)
    own = Classification(0.1).loss(student(inputs), targets)
    assert weights is None
    assert torch.allclose(values, 0.7 * own + 0.3 * distance, atol=1e-6)
    assert torch.allclose(further["distillation"], distance, atol=1e-6)
    only = Distilled(Classification(), teacher, "", weight=1.0, temperature=1.0)
    learning = torch.optim.SGD(student.parameters(), lr=1.0)
    for _ in range(1000):
        only.losses(student, batch)[0].mean().backward()
        learning.step()
        learning.zero_grad()
    assert torch.allclose(student(inputs).softmax(1), teacher(inputs).softmax(1), atol=1e-2)


@pytest.mark.long
def test_a_taught_run_has_the_same_bits_on_any_number_of_processes_and_is_replayed(
    npz: Path, ranks: Callable[..., list[Finished]], here: Callable[..., Any], tmp_path: Path
) -> None:
    here(*TEACHER)
    before = load_model("runs/teacher")[0].state_dict()
    here(*STUDENT, "run.name=one")
    here(*STUDENT, "run.name=alone", "task.teacher=null")
    for count, steps in ((4, 4), (2, 12)):
        done = ranks(count, "train", *STUDENT, "run.name=moved", f"train.steps={steps}")
        assert [rank.rc for rank in done] == [0] * count, done[0].err
    assert "taught by cnn of runs/teacher/checkpoints/" in done[0].err
    one = last(tmp_path, "one")
    assert same_bits(one, last(tmp_path, "moved"))
    assert not same_bits(one, last(tmp_path, "alone"))
    assert one["model"].keys() == last(tmp_path, "alone")["model"].keys()  # nothing of the teacher
    rows = {row["step"]: row for row in read_metrics(Path("runs/one")) if row["kind"] == "train"}
    assert rows[6]["train/distillation"] > 0
    assert replay(Path("runs/one"), 6, trust=True).loss == rows[6]["train/loss"]
    with pytest.raises(UserError, match="from where the run says that it lies, runs/teacher; if you trust"):
        replay(Path("runs/one"), 6)
    assert evaluate_run("runs/one/checkpoints/last.pt") == one["metrics"]  # its own task, without the teacher
    after = load_model("runs/teacher")[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_goes_on_with_its_own_teacher_only(npz: Path, here: Callable[..., Any], tmp_path: Path) -> None:
    here(*TEACHER)
    here(*STUDENT, "train.steps=4")
    (tmp_path / "runs/teacher").rename(tmp_path / "runs/moved")
    more = [*STUDENT, "train.steps=6", "task.teacher=runs/moved"]
    assert here(*more).step == 6  # the same weights from another place
    here(*TEACHER, "seed=1", "run.name=other")
    told = r"taught by another model \(weights [0-9a-f]{8}, now [0-9a-f]{8}\)"
    with pytest.raises(UserError, match=told):
        here(*more, "train.steps=8", "task.teacher=runs/other")
    with pytest.raises(UserError, match=r"\(weights [0-9a-f]{8}, now none\)"):
        here(*more, "train.steps=8", "task.teacher=null")
    strange = tmp_path / "runs/run/checkpoints/step-00000006.pt"
    torch.save({**torch.load(strange, weights_only=True), "teacher": 7}, strange)
    with pytest.raises(UserError, match=r"taught by another model \(weights 7, now [0-9a-f]{8}\)"):
        here(*more, "train.steps=8")


class Remembering(torch.nn.Sequential):
    """A model whose state_dict holds something that is no tensor."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 3))

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"seen": 1}


def test_a_teacher_may_keep_more_than_tensors(npz: Path, here: Callable[..., Any]) -> None:
    own = ["model.name=tests.test_distill:Remembering", "model.args={}"]
    here(*TEACHER, "train.steps=1", *own)
    assert here(*STUDENT, "train.steps=1", *own).step == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.mean=[0.5]", "data.std=[0.5]"], r"with data.mean=\[\], here it is \[0.5\]"),
        (
            ["data.eval_transform=[{Resize: {size: [9, 9]}}]"],
            "data.eval_transform=.*see images as its student",
        ),
        (["task.teacher=runs/nobody"], "runs/nobody"),
        (["task.teacher_weight=1.5"], "task.teacher_weight: a share of the loss, from 0 to 1, not 1.5"),
        (["task.name=tests.test_distill:Other", "task.args={}"], "only classification learns from a teacher"),
    ],
)
def test_a_teacher_that_does_not_fit_is_told_before_the_first_step(
    words: list[str], told: str, npz: Path, here: Callable[..., Any]
) -> None:
    here(*TEACHER, "train.steps=1")
    with pytest.raises(UserError, match=told):
        here(*STUDENT, *words)


def test_a_teacher_with_spare_outputs_is_told(npz: Path, here: Callable[..., Any]) -> None:
    here(*TEACHER, "train.steps=1", "model.name=tests.test_distill:Spare", "model.args={}")
    words = [word for word in STUDENT if not word.startswith("model.")]
    with pytest.raises(UserError, match=r"task.teacher: it gives 5 scores for an image, the model 3"):
        here(*words, "model.name=tests.test_distill:Spare", "model.args={spare: 0}")
    assert not Path("runs/run").exists()  # at the start


class Spare(torch.nn.Sequential):
    """A model of three classes, with outputs that mean nothing."""

    def __init__(self, spare: int = 2) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 3 + spare))


class Other:
    """A task of its own."""

    best = "min eval/loss"

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.square().sum(1)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}
