"""Guarantee 1: a run that was killed anywhere ends with the weights of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from dist_train.record.history import read_metrics
from tests.distributed.ranks import last, same_bits, start, status, train, train_command
from tests.worlds import SMALL, write_npz

# A shuffled epoch has 94 steps, the last one short; checkpoints, rows and evaluations lie across each other.
COMMON = [
    "data.name=fashion_mnist",
    "data.train_transform=[RandomHorizontalFlip,{RandomCrop: {size: 28, padding: 2}}]",
    "train.batch_size=64", "train.accumulate=2", "train.ema=0.9", "train.clip_norm=1.0", "train.steps=140",
    "data.workers=2", "log.every=9", "eval.every=50", "checkpoint.every=13", "optim.args.momentum=0.9",
    "optim.lr=0.05", "schedule.name=cosine", "schedule.warmup=10", "data.args.download=false",
]  # fmt: skip
MODELS = {
    "mlp with dropout": ["model.name=mlp", "model.args.hidden=[64]", "model.args.dropout=0.3"],
    "cnn with batchnorm": ["model.name=cnn", "model.args.widths=[8,16]", "model.args.dropout=0.1"],
}


@pytest.fixture
def sample(tmp_path: Path) -> str:
    """The shipped sample as data.root, so that the small set is used wherever the whole one is at hand."""
    assets = Path(__file__).parents[2] / "dist_train" / "assets"
    return f"data.root={assets}"


@pytest.mark.parametrize(
    ("model", "processes"),
    [
        ("mlp with dropout", 1),
        # DDP's own sum depends on the place in its buckets, which differ in the first step of an attempt.
        pytest.param("mlp with dropout", 2, marks=pytest.mark.long),
        pytest.param("mlp with dropout", 3, marks=pytest.mark.long),
        pytest.param("cnn with batchnorm", 4, marks=pytest.mark.long),
        pytest.param("cnn with batchnorm", 1, marks=pytest.mark.nightly),  # in short: 4 processes
        pytest.param("cnn with batchnorm", 2, marks=pytest.mark.nightly),
    ],
)
def test_a_run_killed_in_mid_epoch_ends_with_the_same_weights(
    tmp_path: Path, sample: str, model: str, processes: int
) -> None:
    arguments = [*COMMON, *MODELS[model], sample, "train.steps=240"]  # not done before it is killed
    if processes > 2:  # a last batch of 24 leaves some of the parts short
        arguments += ["train.batch_size=72", "model.args.dropout=0.2", "data.workers=0"]
    train(tmp_path, *arguments, "run.name=undisturbed", processes=processes)
    kills = random.Random(f"{model} {processes}")
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    for kill in range(2):  # each after some more rows; once in the first epoch, once in the second
        ranks = start(train_command(*arguments, "run.name=killed"), processes, tmp_path)
        _wait_for_step(metrics, (30, 100)[kill] + kills.randrange(20))
        time.sleep(kills.random() / 10)
        for rank in ranks:
            os.killpg(rank.pid, signal.SIGKILL)
        assert {rank.wait() for rank in ranks} == {-signal.SIGKILL}
    train(tmp_path, *arguments, "run.name=killed", processes=processes)
    assert status(tmp_path, "killed")["attempts"] == 3
    assert same_bits(last(tmp_path, "undisturbed"), last(tmp_path, "killed"))
    assert _history(tmp_path / "runs" / "undisturbed") == _history(tmp_path / "runs" / "killed")


def test_an_interrupted_run_saves_on_all_ranks_at_one_step_and_goes_on(tmp_path: Path, sample: str) -> None:
    arguments = [*COMMON, *MODELS["mlp with dropout"], sample, "checkpoint.every=never"]
    train(tmp_path, *arguments, "run.name=undisturbed", processes=2)
    ranks = start(train_command(*arguments, "run.name=stopped"), 2, tmp_path)
    _wait_for_step(tmp_path / "runs" / "stopped" / "metrics.jsonl", 20)
    ranks[1].send_signal(signal.SIGUSR1)  # one rank alone, and not rank 0
    assert [rank.wait(timeout=60) for rank in ranks] == [75, 75]
    stopped = status(tmp_path, "stopped")
    assert stopped["state"] == "interrupted"
    assert last(tmp_path, "stopped")["step"] == stopped["step"] < 140
    train(tmp_path, *arguments, "run.name=stopped", processes=2)
    assert same_bits(last(tmp_path, "undisturbed"), last(tmp_path, "stopped"))
    assert _history(tmp_path / "runs" / "undisturbed") == _history(tmp_path / "runs" / "stopped")


STOPS_ITSELF = """
import os, pathlib, signal
from dist_train.tasks import Classification

class StopsItself(Classification):
    # The fourth batch that is evaluated is in the middle of the second evaluation; the task is tried on a
    # few samples before the first step.
    batches = 0

    def metrics(self, outputs, targets):
        type(self).batches += len(targets) >= 200
        mark = pathlib.Path("stopped")
        if self.batches == 4 and not mark.exists() and pathlib.Path("armed").exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().metrics(outputs, targets)
"""


def test_a_run_interrupted_in_the_middle_of_an_evaluation_repeats_it(tmp_path: Path, sample: str) -> None:
    (tmp_path / "mine.py").write_text(STOPS_ITSELF)
    arguments = [
        sample, "task.name=mine:StopsItself", "train.steps=30", "model.args.hidden=[16]",
        "eval.every=10", "eval.batch_size=400", "checkpoint.every=never", "precision=bf16",
    ]  # fmt: skip
    train(tmp_path, *arguments, "run.name=undisturbed")
    (tmp_path / "armed").touch()
    train(tmp_path, *arguments, "run.name=stopped", expect=75)
    assert status(tmp_path, "stopped")["step"] == 20
    train(tmp_path, *arguments, "run.name=stopped")
    assert same_bits(last(tmp_path, "undisturbed"), last(tmp_path, "stopped"))
    assert _history(tmp_path / "runs" / "undisturbed") == _history(tmp_path / "runs" / "stopped")


def test_a_run_goes_on_on_another_number_of_processes_with_the_same_bits(tmp_path: Path) -> None:
    """Four parts a step, which one, two and four processes can share; the last batch of an epoch is short."""
    write_npz(tmp_path)  # three steps are an epoch, of 40, 40 and 10 samples
    arguments = [
        *SMALL, *MODELS["cnn with batchnorm"], "data.train_transform=[RandomHorizontalFlip]", "train.parts=4",
        "train.batch_size=40", "train.ema=0.9", "train.clip_norm=1.0", "optim.args.momentum=0.9",
        "schedule.warmup=2", "eval.every=3", "log.every=2",
    ]  # fmt: skip
    train(tmp_path, *arguments, "run.name=straight")
    for processes, steps in ((2, 3), (1, 5), (4, 10), (2, 12)):
        train(tmp_path, *arguments, f"train.steps={steps}", "run.name=moved", processes=processes)
    assert same_bits(last(tmp_path, "straight"), last(tmp_path, "moved"))


@pytest.mark.long
def test_processes_that_cannot_share_the_parts_of_a_run_are_refused_with_those_that_can(
    tmp_path: Path,
) -> None:
    write_npz(tmp_path)
    arguments = [*SMALL, "train.batch_size=12", "model.args.hidden=[16]"]
    train(tmp_path, *arguments, "train.steps=2", processes=2)
    train(tmp_path, *arguments, "train.steps=4", processes=4, expect=2)
    told = (tmp_path / "rank0.out").read_text()
    assert "cut into 2 parts, which can be shared by 1, 2 processes, not by 4" in told
    assert "train.parts=4" in told
    train(tmp_path, *arguments, "train.steps=4", "train.parts=4", processes=4)
    assert "a step is cut into 4 parts now, 2 before" in (tmp_path / "rank0.out").read_text()
    train(tmp_path, *arguments, "train.steps=6", "train.parts=6", processes=2)
    assert "2 processes can't hold whole subtrees of 6 parts" in (tmp_path / "rank0.out").read_text()


def _wait_for_step(metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.exists():
            lines = metrics.read_text().splitlines()
            if lines and _step(lines[-1]) >= step:
                return
        time.sleep(0.01)
    raise AssertionError(f"no step {step} in {metrics}")


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return 0


def _history(run: Path) -> list[dict[str, object]]:
    """The effective history without what a clock tells."""
    clocks = ("time", "attempt")
    return [
        {k: v for k, v in row.items() if k not in clocks and not k.startswith("perf/")}
        for row in read_metrics(run)
    ]
