"""A loss or gradient that is not finite: told with who made it, or dropped on all ranks alike."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.config import RunError
from dist_train.record.history import read_metrics, read_status
from dist_train.tools.replay import Look, Replayed, picture, replay, table
from tests.distributed.ranks import equal, last
from tests.processes import Finished
from tests.worlds import SMALL, pictures, write_npz

POISONED = 41  # the training sample with a pixel that is no number
WORDS = [*SMALL, "data.root=poisoned.npz", "log.every=1", "checkpoint.every=1", "checkpoint.keep=99"]


@pytest.fixture(autouse=True)
def poisoned(tmp_path: Path) -> None:
    x, y = pictures(90)
    x = x.astype(np.float32) / 255
    x[POISONED, 3, 3] = np.nan
    test_x, test_y = pictures(37, seed=1)
    np.savez(tmp_path / "poisoned.npz", x_train=x, y_train=y, x_test=test_x / np.float32(255), y_test=test_y)


def steps_with_the_sample(steps: int) -> list[int]:
    """The steps, counted from 1, that read the poisoned sample."""
    from dist_train.data.order import Order

    order = Order(90, 16)
    return [step + 1 for step in range(steps) if POISONED in order.global_batch(step)]


def test_the_run_stops_and_tells_the_samples_of_each_rank_and_how_to_replay(
    ranks: Callable[..., list[Finished]], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    first = steps_with_the_sample(6)[0]
    results = ranks(2, "train", *WORDS)
    assert [result.rc for result in results] == [1, 1], results[0]
    told = results[0].err.splitlines()[-1]
    assert told.startswith(f"dist-train: step {first}: its loss is not finite"), results[0]
    assert "a lower optim.lr than" in told
    assert not any("Traceback" in result.err for result in results)
    assert "dist-train: " not in results[1].err
    run = tmp_path / "runs" / "run"
    assert read_status(run)["state"] == "failed"
    listed = json.loads((run / "nonfinite.json").read_text())
    samples = listed[f"samples of step {first}"]
    assert {item["rank"] for item in samples} == {0, 1}
    assert POISONED in {item["sample"] for item in samples} and len(samples) == 16
    weights = torch.load(run / "checkpoints/last.pt", weights_only=True)
    assert weights["step"] == first - 1
    assert all(value.isfinite().all() for value in weights["model"].values())

    _, run_folder, step = listed["replay"].removeprefix("dist-train ").split()
    replayed = cli("replay", run_folder, step)
    assert replayed.rc == 0, replayed
    worst = replayed.out.splitlines()[1]
    rank = next(item["rank"] for item in samples if item["sample"] == POISONED)
    assert worst.split()[:6] == ["rank", str(rank), "sample", str(POISONED), "loss", "nan"], replayed
    assert "the gradient is not finite: 1.weight" in replayed.out
    assert replayed.out.splitlines()[-1] == (
        "forward: 0 (Flatten) is the first module that gives numbers that are not finite; its input is at"
        f" fault; rank {rank} sample {POISONED}"
    )


NET = """
import torch
def net(num_classes):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Dropout(0.2),
        torch.nn.Linear(144, num_classes))
"""


def test_skipped_steps_change_nothing_on_any_rank(
    ranks: Callable[..., list[Finished]], here: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "my_norm.py").write_text(NET)
    words = [*WORDS, "on_nonfinite=skip", "train.steps=20", "train.ema=0.9", "optim.args.momentum=0.9"]
    net = ["model.name=my_norm:net"]
    results = ranks(2, "train", *words, *net)
    assert [result.rc for result in results] == [0, 0], results[0]
    run = tmp_path / "runs" / "run"
    skipped = steps_with_the_sample(20)
    assert len(skipped) in (3, 4)
    assert read_status(run)["skipped_steps"] == len(skipped)
    for step in skipped:
        before, after = (
            torch.load(run / f"checkpoints/step-{number:08d}.pt", weights_only=True)
            for number in (step - 1, step)
        )
        assert equal(before["model"], after["model"]) and equal(before["average"], after["average"])
        moments = [
            [values["momentum_buffer"] for values in saved["optimizer"]["state"].values()]
            for saved in (before, after)
        ]
        assert all(map(torch.equal, *moments))
    rows = {row["step"]: row for row in read_metrics(run) if "train/loss" in row}
    assert [step for step, row in rows.items() if row["train/loss"] is None] == skipped
    assert math.isfinite(last(tmp_path)["metrics"]["eval/loss"])
    # Without BatchNorm's own averages two ranks are one rank with two micro-batches, skipped steps and all.
    ranks(2, "train", *words, "run.name=two")
    here(*words, "run.name=one", "train.accumulate=2")
    assert equal(last(tmp_path, "two")["model"], last(tmp_path, "one")["model"])


def test_too_many_skipped_steps_in_a_row_stop_the_run(here: Callable[..., Any], tmp_path: Path) -> None:
    x, y = pictures(90)
    x = np.full(x.shape, np.inf, np.float32)
    np.savez(tmp_path / "poisoned.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    with pytest.raises(RunError, match="4 steps in a row were skipped"):
        here(*WORDS, "on_nonfinite=skip", "max_skips=3")
    assert read_status(tmp_path / "runs/run")["state"] == "failed"


def test_a_run_without_trouble_is_the_same_with_and_without_skipping(
    here: Callable[..., Any], npz: Path, tmp_path: Path
) -> None:
    words = [*SMALL, "model.args.dropout=0.2"]
    here(*words, "run.name=stop")
    here(*words, "run.name=skip", "on_nonfinite=skip")
    assert equal(last(tmp_path, "stop")["model"], last(tmp_path, "skip")["model"])


def test_weights_that_went_bad_in_the_last_step_are_not_saved(
    here: Callable[..., Any], tmp_path: Path
) -> None:
    """The loss of that step was finite: only the weights tell."""
    (tmp_path / "my_break.py").write_text(
        "import torch\n"
        "class Breaks(torch.optim.SGD):\n"
        "    steps = 0\n"
        "    def step(self, closure=None):\n"
        "        super().step()\n"
        "        self.steps += 1  # of this one: another takes a step on trial\n"
        "        if self.steps == 12:\n"
        "            self.param_groups[0]['params'][0].data[0, 0] = float('inf')\n"
    )
    x, y = pictures(90)
    np.savez(tmp_path / "arrays.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    with pytest.raises(RunError, match=r"step 12 is not saved: .*the weights are not finite"):
        here(*SMALL, "checkpoint.every=4", "optim.name=my_break:Breaks")
    assert last(tmp_path)["step"] == 8


# --- replay names who made it ---------------------------------------------------------------------

PLANTED = [*SMALL, "log.every=1", "checkpoint.every=1", "checkpoint.keep=99", "train.steps=6"]
DARK = 1.0 / 255  # a pixel that only the planted sample has


def plant(folder: Path, value: float) -> None:
    """arrays.npz, in which one pixel of a training sample has a value of its own."""
    x, y = pictures(90)
    x = x.astype(np.float32) / 255
    x[x == DARK] = 0
    x[POISONED, 3, 3] = value
    np.savez(folder / "arrays.npz", x_train=x, y_train=y, x_test=np.clip(x[:9], 0, 1), y_test=y[:9])


def failed(here: Callable[..., Any], folder: Path, *words: str) -> Replayed:
    """The step in which a run of these words fails, done again."""
    with pytest.raises(RunError, match="not finite"):
        here(*PLANTED, *words)
    return replay(folder / "runs/run", first_broken(folder / "runs/run"), trust=True)


def first_broken(run: Path) -> int:
    """The step that a run which failed did not keep."""
    return 1 + max(int(path.stem[5:]) for path in (run / "checkpoints").glob("step-*.pt"))


def test_a_sample_that_is_no_number_is_named_with_the_module_that_was_given_it(
    here: Callable[..., Any], tmp_path: Path
) -> None:
    plant(tmp_path, math.nan)
    seen = failed(here, tmp_path, "train.accumulate=2", "model.name=cnn", "model.args.widths=[4]")
    told = table(seen).splitlines()[-1]
    part = next(each.part for each in seen.samples if each.sample == POISONED)
    assert told == (
        "forward: 0 (Conv2d) is the first module that gives numbers that are not finite; its input is at"
        f" fault; rank 0  part {part} sample {POISONED}"
    )
    picture(seen, tmp_path / "step.png")
    with Image.open(tmp_path / "step.png") as image:
        shown = np.asarray(image.convert("RGB")).astype(int)
    magenta = (shown[..., 0] > 240) & (shown[..., 1] < 20) & (shown[..., 2] > 240)
    assert 100 < magenta.sum() < 1000  # one pixel of 8 x 8
    assert magenta[
        : len(shown) // 2, : shown.shape[1] // 8
    ].any()  # of the first image: the worst comes first


BREAKS = """
import torch
class Breaks(torch.optim.SGD):
    steps = 0
    def step(self, closure=None):
        super().step()
        self.steps += 1
        if self.steps == 5:  # the first one is taken on trial, by another
            self.param_groups[0]['params'][2].data[0, 0] = float('inf')
"""


def test_a_weight_that_is_no_number_is_named_with_its_module_and_so_is_who_made_it(
    here: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "my_break.py").write_text(BREAKS)
    write_npz(tmp_path)
    with pytest.raises(RunError):
        here(*PLANTED, "optim.name=my_break:Breaks", "checkpoint.every=20")
    run = tmp_path / "runs/run"
    lines = table(replay(run, 5, trust=True)).splitlines()
    assert lines[-2].startswith("the gradient is finite")
    assert lines[-1].startswith("update: the optimizer made weights that are not finite")
    assert lines[-1].endswith(": 3.weight")
    told = table(replay(run, 6, trust=True, look=Look(("[35]",)))).splitlines()
    assert told[-1] == (
        "forward: 3 (Linear) is the first module that gives numbers that are not finite; its weight is at"
        " fault; 3.weight"
    )
    row = next(line.split() for line in told if line.startswith("3 ") and "[" in line)
    assert row[:2] == ["3", "Linear"] and row[-1] == "10"  # one for each of the last samples of the epoch


NETS = """
import torch
from torch import nn

class Divide(nn.Module):  # the mean of what is as dark as a pixel of one sample
    def forward(self, x):
        there = (x - VALUE).abs().amin((1, 2, 3)) < 1e-6
        return x / (~there).float()[:, None, None, None]

class Root(nn.Module):
    def forward(self, x):  # at 0 it has a value, but no gradient
        return x.square().sum(1, keepdim=True).sqrt()

class Between(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.then = nn.Linear(64, 8), nn.Linear(8, 3)
    def forward(self, x):
        there = (x - VALUE).abs().amin((1, 2, 3)) < 1e-6
        return self.then(self.first(x.flatten(1)) / (~there).float()[:, None])

def divides(num_classes):
    return nn.Sequential(nn.Identity(), Divide(), nn.Flatten(), nn.Linear(64, num_classes))

def roots(num_classes):  # without a bias: a black image is 0 there
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), Root(), nn.Linear(1, num_classes))

def between():
    return nn.Sequential(Between())
"""


@pytest.mark.parametrize(
    ("net", "phase", "module", "what"),
    [
        ("divides", "forward", "1 (Divide)", "its computation is at fault: its input and its weights"),
        ("between", "forward", "0 (Between)", "its computation is at fault: its input and its weights"),
        ("roots", "backward", "2 (Root)", "the gradient that it was given is finite; operation sqrt"),
    ],
)
def test_a_module_that_makes_what_is_no_number_is_named_with_the_sample(
    net: str, phase: str, module: str, what: str, here: Callable[..., Any], tmp_path: Path
) -> None:
    plant(tmp_path, DARK)
    (tmp_path / "my_nets.py").write_text(NETS.replace("VALUE", str(DARK)))
    if net == "roots":
        with np.load(tmp_path / "arrays.npz") as file:
            arrays = dict(file)
        arrays["x_train"][POISONED] = 0
        np.savez(tmp_path / "arrays.npz", **arrays)
    told = table(failed(here, tmp_path, f"model.name=my_nets:{net}")).splitlines()[-1]
    assert told.startswith(f"{phase}: {module} is the first"), told
    assert what in told and told.endswith(f"rank 0 sample {POISONED}"), told


def test_a_target_that_is_no_number_is_at_fault_where_the_loss_is(
    here: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "my_task.py").write_text(
        "class Line:\n"
        "    best = 'min eval/loss'\n"
        "    def loss(self, outputs, targets): return (outputs[:, 0] - targets).square()\n"
        "    def metrics(self, outputs, targets): return {}\n"
    )
    x, _ = pictures(90)
    y = np.linspace(0, 1, 90, dtype=np.float32)
    y[POISONED] = np.nan
    np.savez(tmp_path / "arrays.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    told = table(failed(here, tmp_path, "task.name=my_task:Line")).splitlines()[-1]
    assert told.startswith("forward: the loss (Line) is not finite, but what the model gives is; its input")
    assert told.endswith(f"targets; rank 0 sample {POISONED}")
