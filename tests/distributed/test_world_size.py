"""Guarantee 2: the number of processes changes neither what is read nor, but for rounding, the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT, distance, equal, last, train

SAMPLE = f"data.root={ROOT / 'dist_train' / 'assets'}"

# A task that writes down what each rank was given: the labels, and a fingerprint of each image.
SPY = """
import json, os
from dist_train.tasks import Classification

class Spy(Classification):
    def loss(self, outputs, targets):
        return super().loss(outputs, targets)

def spied(model_inputs):
    return [round(float(x.double().sum()), 3) for x in model_inputs]

import torch
class Net(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 32), torch.nn.Tanh(),
                                          torch.nn.Linear(32, num_classes))
    def forward(self, x):
        if self.training:
            with open(f"seen-{os.environ.get('RANK', '0')}.jsonl", "a") as file:
                file.write(json.dumps(spied(x)) + chr(10))
        return self.layers(x)
"""


def _run(folder: Path, processes: int, *arguments: str) -> list[list[float]]:
    """Trains on so many processes; returns the fingerprints of each step's global batch, sorted."""
    folder.mkdir()
    (folder / "spy.py").write_text(SPY)
    train(
        folder, SAMPLE, "model.name=spy:Net", "data.train_transform=[RandomHorizontalFlip]",
        "train.batch_size=60", "train.steps=105", "optim.lr=0.05", *arguments, processes=processes,
    )  # fmt: skip
    per_rank = [
        [json.loads(line) for line in (folder / f"seen-{rank}.jsonl").read_text().splitlines()]
        for rank in range(processes)
    ]
    accumulate = 2 if "train.accumulate=2" in arguments else 1
    steps = len(per_rank[0]) // accumulate
    return [
        sorted(x for rank in per_rank for part in rank[k * accumulate : (k + 1) * accumulate] for x in part)
        for k in range(steps)
    ]


def test_one_two_and_four_processes_read_the_same_batches_and_end_with_the_same_weights(
    tmp_path: Path,
) -> None:
    batches = {w: _run(tmp_path / str(w), w) for w in (1, 2, 4)}
    assert batches[1] == batches[2] == batches[4]
    assert len(batches[1]) == 105  # 100 steps are an epoch: the order of the second is read too
    one = last(tmp_path / "1")
    for world_size in (2, 4):
        assert distance(one, last(tmp_path / str(world_size))) < 1e-6


@pytest.mark.long
def test_a_short_last_batch_weighs_each_sample_once_also_when_ranks_get_unequal_parts(
    tmp_path: Path,
) -> None:
    """203 samples in batches of 40: the sixth has 3 samples, for up to 4 parts."""
    npz = tmp_path / "data.npz"
    _write_npz(npz, 203)
    ends = {}
    for processes, accumulate in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1)):
        folder = tmp_path / f"{processes}x{accumulate}"
        folder.mkdir()
        train(
            folder, "data.name=arrays", f"data.root={npz}", "train.batch_size=40", "train.epochs=3",
            f"train.accumulate={accumulate}", "model.args.hidden=[16]", "optim.lr=0.1",
            processes=processes,
        )  # fmt: skip
        ends[folder.name] = last(folder)
    assert all(end["step"] == 18 for end in ends.values())
    for name, end in ends.items():
        assert distance(ends["1x1"], end) < 1e-6, name


def test_dropout_is_the_same_for_two_processes_and_for_two_accumulated_parts(
    tmp_path: Path,
) -> None:
    arguments = [SAMPLE, "train.steps=20", "model.args.hidden=[64]", "model.args.dropout=0.5"]
    train(tmp_path, *arguments, "run.name=processes", processes=2)
    train(tmp_path, *arguments, "run.name=accumulated", "train.accumulate=2")
    a, b = last(tmp_path, "processes"), last(tmp_path, "accumulated")
    assert equal(a["model"], b["model"])


@pytest.mark.parametrize("samples", [101, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 1009))])
def test_evaluation_counts_each_sample_once_on_one_two_and_three_processes(
    tmp_path: Path, samples: int
) -> None:
    npz = tmp_path / "data.npz"
    _write_npz(npz, 96, samples)
    results = []
    for processes in (1, 2, 3):
        name = f"run.name=w{processes}"
        train(
            tmp_path, "data.name=arrays", f"data.root={npz}", "train.batch_size=96", "train.steps=1",
            "model.args.hidden=[16]", "eval.batch_size=7", name, processes=processes,
        )  # fmt: skip
        metrics = last(tmp_path, f"w{processes}")["metrics"]
        # A count: what is left of a whole number of right answers is rounding.
        assert abs(metrics["eval/accuracy"] * samples - round(metrics["eval/accuracy"] * samples)) < 1e-9
        results.append(metrics)
    for metrics in results[1:]:
        assert metrics["eval/accuracy"] == results[0]["eval/accuracy"]
        assert metrics["eval/loss"] == pytest.approx(results[0]["eval/loss"], rel=1e-6)


def _write_npz(path: Path, train_samples: int, eval_samples: int = 10) -> None:
    import numpy as np

    random = np.random.default_rng(0)
    np.savez(
        path,
        x_train=random.integers(0, 256, (train_samples, 6, 6), np.uint8),
        y_train=random.integers(0, 5, train_samples) if train_samples > 5 else [4],
        x_test=random.integers(0, 256, (eval_samples, 6, 6), np.uint8),
        y_test=random.integers(0, 5, eval_samples),
    )
