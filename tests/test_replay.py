"""Any step of any run can be rebuilt on one CPU, and looked at."""

from __future__ import annotations

import math
import os
import pdb
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dist_train.cli import main
from dist_train.config import UserError
from dist_train.record.history import read_metrics
from dist_train.tools.replay import Look, replay
from tests.processes import Finished
from tests.worlds import SMALL, write_npz

WORDS = [*SMALL, "data.name=image_folder", "data.root=images", "log.every=1", "model.args.dropout=0.3",
         "data.train_transform=[RandomHorizontalFlip,{RandomCrop: {size: 8, padding: 2}}]", "eval.every=5",
         "train.accumulate=2", "optim.args.momentum=0.9", "checkpoint.every=5",
         "train.batch_size=8"]  # fmt: skip


@pytest.mark.long
def test_steps_of_two_ranks_are_rebuilt_by_one_process(
    ranks: Callable[..., list[Finished]],
    cli: Callable[..., Finished],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = ranks(2, "train", *WORDS)
    assert [result.rc for result in results] == [0, 0], results[0]
    run = tmp_path / "runs" / "run"
    losses = {row["step"]: row["train/loss"] for row in read_metrics(run) if "train/loss" in row}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    starts = {}
    for step in (1, 4, 8, 11, 12):  # 4: the short batch at the end of an epoch of 30 samples
        replayed = replay(Path("runs/run"), step)
        assert replayed.loss == losses[step], step  # to the last bit
        starts[step] = replayed.start
        assert len(replayed.samples) == (6 if step == 4 or step == 8 or step == 12 else 8)
        assert {seen.rank for seen in replayed.samples} == {0, 1}
        assert all(Path(seen.path).is_file() and seen.label in seen.path for seen in replayed.samples)
    assert starts[4] == "the initial weights"  # two checkpoints are kept, of steps 10 and 12
    assert starts[11] == "runs/run/checkpoints/step-00000010.pt"
    shown = cli("replay", "runs/run", "11", "--output", "step.png")
    assert shown.rc == 0, shown
    assert f"loss {losses[11]:.6g}" in shown.out.replace(f"{losses[11]:.9g}", f"{losses[11]:.6g}")
    with Image.open(tmp_path / "step.png") as image:
        assert image.width > 300


def test_steps_are_rebuilt_as_the_attempt_did_them_that_came_to_them_last(
    ranks: Callable[..., list[Finished]],
    here: Callable[..., object],
    image_folder: Path,
    tmp_path: Path,
) -> None:
    shorter = [*WORDS, "schedule.name=cosine", "train.accumulate=1", "train.steps=6"]
    assert [result.rc for result in ranks(2, "train", *shorter)] == [0, 0]
    here(*shorter, "train.steps=12")
    run = tmp_path / "runs" / "run"
    losses = {row["step"]: row["train/loss"] for row in read_metrics(run) if "train/loss" in row}
    for path in (run / "checkpoints").iterdir():
        path.unlink()  # so that a late step is rebuilt through both attempts
    for step, count in ((3, 2), (6, 2), (7, 1), (11, 1)):
        replayed = replay(run, step)
        assert replayed.start == "the initial weights"
        assert replayed.loss == losses[step], step  # to the last bit
        assert len({seen.rank for seen in replayed.samples}) == count


def test_a_run_that_began_as_another_ones_state_is_rebuilt_from_there(
    here: Callable[..., object], small: list[str], tmp_path: Path
) -> None:
    here(*small, "train.steps=4", "run.name=first")
    file = tmp_path / "runs/first/checkpoints/last.pt"
    here(*small, f"resume={file}", "optim.lr=0.02", "log.every=1")
    run = tmp_path / "runs" / "run"
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    losses = {row["step"]: row["train/loss"] for row in read_metrics(run) if "train/loss" in row}
    assert replay(run, 8).loss == pytest.approx(losses[8], rel=1e-6)
    with pytest.raises(UserError, match="the run begins with step 5"):
        replay(run, 3)


def test_a_state_to_begin_from_that_has_moved_on_is_not_taken_for_the_old_one(
    here: Callable[..., object], small: list[str], tmp_path: Path
) -> None:
    first = [*small, "run.name=first", "checkpoint.best=max eval/loss"]
    here(*first, "train.steps=4")
    here(*small, f"resume={tmp_path / 'runs/first'}", "optim.lr=0.02")
    here(*first, "train.steps=8", "checkpoint.best=none")  # whose newest is then taken
    run = tmp_path / "runs" / "run"
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="after step 4, but that is at step 8 now"):
        replay(run, 9)


@pytest.mark.parametrize(
    ("run", "step", "told"), [("nowhere", 1, "there is no run"), ("run", 13, "steps 1 to 12")]
)
def test_what_cannot_be_replayed_is_told(
    run: str, step: int, told: str, here: Callable[..., object], small: list[str]
) -> None:
    here(*small)
    with pytest.raises(UserError, match=told):
        replay(Path("runs") / run, step)


# --- looking at a step -----------------------------------------------------------------------------

PLAIN = [*SMALL, "log.every=1", "checkpoint.every=1", "train.steps=4"]


def test_what_a_step_did_is_shown_and_no_number_changes_by_looking(
    here: Callable[..., Any], tmp_path: Path
) -> None:
    write_npz(tmp_path)
    model = ["model.name=cnn", "model.args.widths=[4,8]", "train.accumulate=2", "optim.lr=0.01"]
    here(*PLAIN, *model, "train.clip_norm=1e9", "eval.every=4")
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
    here(*PLAIN, "train.steps=1")
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
    here(*PLAIN)
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
