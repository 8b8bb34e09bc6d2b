"""Any step of any run can be rebuilt on one CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dist_train.config import UserError
from dist_train.record.history import read_metrics
from dist_train.tools.replay import replay
from tests.processes import Finished
from tests.worlds import SMALL

WORDS = [*SMALL, "data.name=image_folder", "data.root=images", "log.every=1", "model.args.dropout=0.3",
         "data.train_transform=[RandomHorizontalFlip,{RandomCrop: {size: 8, padding: 2}}]", "eval.every=5",
         "train.accumulate=2", "optim.args.momentum=0.9", "checkpoint.every=5",
         "train.batch_size=8"]  # fmt: skip


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
