"""A number that is not finite, planted in a sample, a weight or a module: replay names who made it."""

from __future__ import annotations

import math
import os
import pdb
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.cli import main
from dist_train.config import RunError, UserError
from dist_train.record.history import read_metrics
from dist_train.tools.replay import Look, Replayed, picture, replay, table
from tests.worlds import SMALL, pictures, write_npz

WORDS = [*SMALL, "log.every=1", "checkpoint.every=1", "checkpoint.keep=99", "train.steps=6"]
SAMPLE = 41
DARK = 1.0 / 255  # a pixel that only the planted sample has


def plant(folder: Path, value: float) -> None:
    """arrays.npz, in which one pixel of a training sample has a value of its own."""
    x, y = pictures(90)
    x = x.astype(np.float32) / 255
    x[x == DARK] = 0
    x[SAMPLE, 3, 3] = value
    np.savez(folder / "arrays.npz", x_train=x, y_train=y, x_test=np.clip(x[:9], 0, 1), y_test=y[:9])


def failed(here: Callable[..., Any], folder: Path, *words: str) -> Replayed:
    """The step in which a run of these words fails, done again."""
    with pytest.raises(RunError, match="not finite"):
        here(*WORDS, *words)
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
    part = next(each.part for each in seen.samples if each.sample == SAMPLE)
    assert told == (
        "forward: 0 (Conv2d) is the first module that gives numbers that are not finite; its input is at"
        f" fault; rank 0  part {part} sample {SAMPLE}"
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
        here(*WORDS, "optim.name=my_break:Breaks", "checkpoint.every=20")
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
        arrays["x_train"][SAMPLE] = 0
        np.savez(tmp_path / "arrays.npz", **arrays)
    told = table(failed(here, tmp_path, f"model.name=my_nets:{net}")).splitlines()[-1]
    assert told.startswith(f"{phase}: {module} is the first"), told
    assert what in told and told.endswith(f"rank 0 sample {SAMPLE}"), told


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
    y[SAMPLE] = np.nan
    np.savez(tmp_path / "arrays.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    told = table(failed(here, tmp_path, "task.name=my_task:Line")).splitlines()[-1]
    assert told.startswith("forward: the loss (Line) is not finite, but what the model gives is; its input")
    assert told.endswith(f"targets; rank 0 sample {SAMPLE}")


def test_what_a_step_did_is_shown_and_no_number_changes_by_looking(
    here: Callable[..., Any], tmp_path: Path
) -> None:
    write_npz(tmp_path)
    model = ["model.name=cnn", "model.args.widths=[4,8]", "train.accumulate=2", "optim.lr=0.01"]
    here(*WORDS, *model, "train.clip_norm=1e9", "eval.every=6")
    run = tmp_path / "runs/run"
    row = next(row for row in read_metrics(run) if row["step"] == 3 and "train/loss" in row)
    seen = replay(run, 3, look=Look(("2", "4")))
    assert seen.loss == row["train/loss"]
    norm = math.hypot(*(layer.gradient for layer in seen.layers))
    assert norm == pytest.approx(row["train/grad_norm"], rel=1e-5)
    assert [layer.name for layer in seen.layers] == ["0", "1", "3", "5", "7", "8", "13"]
    kind, numbers = seen.activations["2"]
    assert kind == "GELU" and numbers.count == 16 * 4 * 4 * 4 and numbers.shape == (8, 4, 4, 4)
    assert -0.2 < numbers.low < 0 < numbers.mean < numbers.high and numbers.broken == 0
    assert {each.prediction for each in seen.samples} <= {"0", "1", "2"}
    assert all(1 / 3 <= each.probability <= 1 for each in seen.samples)
    with pytest.raises(UserError, match="--layer: no part of the model is named like 'blocks'"):
        replay(run, 3, look=Look(("blocks",)))


def test_statistics_are_those_of_the_numbers(here: Callable[..., Any], tmp_path: Path) -> None:
    write_npz(tmp_path)
    here(*WORDS, "train.steps=1")
    whole = replay(tmp_path / "runs/run", 1, look=Look(("0", "1", "2")))
    images = torch.cat([each.image.flatten() for each in whole.samples if each.image is not None]).double()
    _, numbers = whole.activations["0"]
    assert numbers.mean == pytest.approx(float(images.mean()))
    assert numbers.std == pytest.approx(float(images.std(correction=0)))
    assert (numbers.low, numbers.high) == (float(images.min()), float(images.max()))
    assert numbers.zeros == int((images == 0).sum())
    relu = whole.activations["2"][1]
    assert relu.low == 0 and 0.2 < relu.zeros / relu.count < 0.8


@pytest.mark.parametrize("end", ["c", "q"])
def test_a_debugger_stops_before_the_step_with_model_batch_and_learner_in_reach(
    end: str,
    here: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_npz(tmp_path)
    here(*WORDS, "train.steps=4")
    loss = next(row["train/loss"] for row in read_metrics(tmp_path / "runs/run") if row["step"] == 3)
    reading, writing = os.pipe()  # pipe commands into it, as a script does
    lines = f"p learner.step, tuple(batch.inputs.shape), type(model).__name__, len(batches), share\n{end}\n"
    os.write(writing, lines.encode())
    os.close(writing)
    monkeypatch.setattr(sys, "argv", ["dist-train", "replay", "runs/run", "3", "--until", "--layer", "1"])
    # As Python does where pytest has not put a debugger of its own.
    monkeypatch.setattr(sys, "breakpointhook", lambda: pdb.Pdb().set_trace(sys._getframe(1)))
    capsys.readouterr()
    with os.fdopen(reading, encoding="utf-8") as stdin, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "stdin", stdin)
        main()
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "before step 3" in out and "(2, (16, 1, 8, 8), 'Sequential', 1, 1.0)" in out
    assert (f"loss {loss:.9g}" in out) == ("activations of" in out) == (end == "c")
