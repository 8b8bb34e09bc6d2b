"""What a run is brought back to: the right best, good files for damaged ones, an end that is whole."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dist_train import checkpoint
from dist_train.checkpoint import saver
from dist_train.config import RunError, UserError
from dist_train.predict import load_model
from dist_train.record.history import read_status
from tests.processes import Finished
from tests.worlds import CLASSES, listing, write_images

EACH = ["eval.every=4", "checkpoint.every=4", "checkpoint.keep=9"]


def metrics_of(folder: Path) -> dict[int, dict[str, float]]:
    """The evaluation in each checkpoint, by its step."""
    return {
        checkpoint.step_of(path): checkpoint.load(path)["metrics"]
        for path in reversed(checkpoint.newest_first(folder))
    }


def rewrite(path: Path, **values: Any) -> None:
    """Changes values in a checkpoint."""
    torch.save({**checkpoint.load(path), **values}, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run" / "checkpoints"


# --- the best ----------------------------------------------------------------------------------------


def test_another_metric_of_the_best_starts_anew_and_the_link_follows_it(
    here: Callable[..., Any], small: list[str], tmp_path: Path, folder: Path
) -> None:
    here(*small, *EACH, "optim.lr=0.5")
    for step, accuracy, loss in ((4, 0.9, 3.0), (8, 0.7, 1.0), (12, 0.8, 2.0)):
        best = {"best": 0.9, "best_step": 4, "best_by": "max eval/accuracy"}
        values = {"eval/accuracy": accuracy, "eval/loss": loss}
        rewrite(folder / checkpoint.name_of(step), metrics=values, **best)
    here(*small, *EACH, "optim.lr=0.5", "train.steps=16", "checkpoint.best=min eval/loss")
    saved = checkpoint.load(folder / "last.pt")
    last = saved["metrics"]["eval/loss"]
    assert (saved["best"], saved["best_step"]) == min((1.0, 8), (last, 16))
    assert saved["best_by"] == "min eval/loss"
    assert os.readlink(folder / "best.pt") == checkpoint.name_of(saved["best_step"])
    told = (tmp_path / "runs/run/log.txt").read_text()
    assert "checkpoint.best: by min eval/loss now, by max eval/accuracy before" in told
    assert "that of step 8 is the best (1)" in told


@pytest.mark.parametrize("is_old", [False, True])
def test_links_that_a_killed_process_left_are_made_what_the_files_say(
    is_old: bool, here: Callable[..., Any], small: list[str], folder: Path
) -> None:
    """Killed just after the rename of the best, and before its link; also in a file of an older version."""
    here(*small, *EACH, "checkpoint.keep=1")
    newest = folder / checkpoint.name_of(12)
    (folder / checkpoint.name_of(4)).write_bytes(newest.read_bytes())
    rewrite(folder / checkpoint.name_of(4), step=4, metrics={"eval/accuracy": 0.1})
    saved = checkpoint.load(newest)
    saved |= {"metrics": {"eval/accuracy": 2.0, "eval/loss": 0.1}, "best": 2.0, "best_step": 12}
    if is_old:
        del saved["best_step"], saved["best_by"]
    torch.save(saved, newest)
    for name in ("best.pt", "last.pt"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(checkpoint.name_of(4))
    here(*small, *EACH, "checkpoint.keep=1", "train.steps=20")
    saved = checkpoint.load(folder / "last.pt")
    assert (saved["step"], saved["best"], saved["best_step"]) == (20, 2.0, 12)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["best.pt", "last.pt", checkpoint.name_of(12), checkpoint.name_of(20)]
    assert os.readlink(folder / "best.pt") == checkpoint.name_of(12)


def test_a_damaged_best_is_replaced_by_the_best_of_those_that_are_left(
    here: Callable[..., Any], small: list[str], tmp_path: Path, folder: Path
) -> None:
    here(*small, *EACH)
    for step, accuracy in ((4, 1.5), (8, 3.0), (12, 1.2)):
        values = {"eval/accuracy": accuracy, "eval/loss": 1.0}
        rewrite(folder / checkpoint.name_of(step), metrics=values, best=3.0, best_step=8)
    truncate(folder / checkpoint.name_of(8))
    here(*small, *EACH, "train.steps=16")
    saved = checkpoint.load(folder / "last.pt")
    assert (saved["best"], saved["best_step"]) == (1.5, 4)
    assert os.readlink(folder / "best.pt") == checkpoint.name_of(4)
    assert "The best of those that are left takes its place." in (tmp_path / "runs/run/log.txt").read_text()


def test_of_a_damaged_best_a_good_one_is_used_and_that_is_said(
    here: Callable[..., Any], small: list[str], cli: Callable[..., Finished], tmp_path: Path, folder: Path
) -> None:
    here(*small, *EACH, f"data.args.classes=[{','.join(CLASSES)}]")
    truncate((folder / "best.pt").resolve())
    best = (folder / "best.pt").resolve().name
    good = next(path for path in checkpoint.newest_first(folder) if path.name != best)
    write_images(tmp_path / "new", 1)
    for words in (["predict", "runs/run", "new"], ["eval", "runs/run"]):
        done = cli(*words)
        assert done.rc == 0, done
        assert "best.pt: the checkpoint is" in done.err and "takes its place" in done.err, done
    assert load_model("runs/run")[1]["step"] == checkpoint.step_of(good)
    done = cli("predict", "runs/run/checkpoints/best.pt", "new")  # this very file was asked for
    assert done.rc == 2 and "the checkpoint is truncated" in done.err, done


# --- damaged and pruned ------------------------------------------------------------------------------


def test_a_damaged_checkpoint_takes_no_place_of_a_good_one(
    here: Callable[..., Any], small: list[str], folder: Path
) -> None:
    here(*small, *EACH)
    truncate(folder / checkpoint.name_of(8))
    options = [*EACH, "checkpoint.best=none", "checkpoint.keep=3"]
    here(*small, *options, "train.steps=16")
    steps = [checkpoint.step_of(path) for path in checkpoint.newest_first(folder)]
    assert steps == [16, 12, 8, 4]  # the damaged one is left as it is until there are enough newer ones
    here(*small, *options, "train.steps=24")
    steps = [checkpoint.step_of(path) for path in checkpoint.newest_first(folder)]
    assert steps == [24, 20, 16]


def test_a_file_to_begin_from_is_checked_too(
    here: Callable[..., Any], small: list[str], tmp_path: Path, folder: Path
) -> None:
    here(*small)
    path = (folder / "last.pt").resolve()
    content = bytearray(path.read_bytes())
    weights = checkpoint.load(path)["model"]["1.weight"].numpy().tobytes()
    content[content.index(weights) + 5] ^= 4
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"flipped\.pt: the checkpoint is damaged \(checksum of"):
        here(*small, "run.name=other", "resume=flipped.pt", "train.steps=20")
    assert not (tmp_path / "runs/other").exists()


# --- what can't be saved -----------------------------------------------------------------------------


class Tag:
    """What no checkpoint may hold."""


class Tagged(torch.optim.SGD):
    """An optimizer with an object among its options, or from some step on in its state."""

    def __init__(self, params: Any, lr: float, late: int) -> None:
        super().__init__(params, lr)
        self.late = late
        if not late:
            self.param_groups[0]["tag"] = Tag()

    def step(self, closure: Any = None) -> Any:
        self.late -= 1
        if self.late == 0:
            self.state[self.param_groups[0]["params"][0]]["tag"] = Tag()
        return super().step(closure)


class Unpicklable(Tag):
    """What can't even be written."""

    def __reduce__(self) -> Any:
        raise pickle.PicklingError("no")


def test_a_state_that_could_not_be_read_back_is_refused_before_the_first_step(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    for late, name in ((0, r"param_groups\[0\]"), (1, r"state\.0")):  # the second comes with a step
        words = ["optim.name=tests.test_recovery:Tagged", f"optim.args.late={late}"]
        with pytest.raises(UserError, match=rf"optimizer\.{name}\.tag is a tests\.test_recovery\.Tag"):
            here(*small, *words)
        assert not (tmp_path / "runs").exists()


def test_a_state_that_becomes_so_is_refused_at_the_first_save(
    here: Callable[..., Any], small: list[str], tmp_path: Path, folder: Path
) -> None:
    words = ["optim.name=tests.test_recovery:Tagged", "optim.args.late=2", "checkpoint.every=3"]
    with pytest.raises(RunError, match=r"is not saved: .* optimizer\.state\.0\.tag is a tests\.test_rec"):
        here(*small, *words, "train.steps=1000")
    status = read_status(tmp_path / "runs/run")
    assert status["state"] == "failed" and status["step"] < 1000
    assert not checkpoint.newest_first(folder)


def test_an_error_of_any_class_while_writing_is_told_and_ends_the_run(
    here: Callable[..., Any], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(value: Any) -> bool:
        raise AttributeError("can't be so")

    monkeypatch.setattr(saver, "is_finite", fail)
    with pytest.raises(RunError, match=r"is not saved: .*AttributeError: can't be so"):
        here(*small, "checkpoint.every=3", "train.steps=1000")
    assert read_status(tmp_path / "runs/run")["state"] == "failed"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (Tag(), "a.b[1] is a tests.test_recovery.Tag"),
        (Unpicklable(), "a.b[1] is a tests.test_recovery.Unpicklable"),
        ({Tag: 1}, "a.b[1] has keys that are no plain values"),
        (lambda: None, "a.b[1] is a function"),
        ((1, 2.5, "x", b"y", None, torch.ones(2), torch.Size([1]), torch.float16, {3: [True]}), ""),
    ],
)
def test_what_could_not_be_read_back_is_named(value: Any, told: str) -> None:
    from dist_train.checkpoint.snapshot import unreadable

    found = unreadable({"a": {"b": [0, value]}})
    assert found.startswith(told) and bool(found) == bool(told)


class Counting(nn.Module):
    """A model with a state of its own beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        self.seen: dict[str, Any] = {"images": 0, "names": []}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen = {"images": self.seen["images"] + len(inputs), "names": ["a", "b"]}
        return self.layers(inputs)

    def get_extra_state(self) -> dict[str, Any]:
        return self.seen

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state


class Numbering(Counting):
    """One whose state JSON can't give back: its keys are numbers."""

    def get_extra_state(self) -> dict[Any, Any]:
        return {0: self.seen}

    def set_extra_state(self, state: dict[Any, Any]) -> None:
        self.seen = state[0]


@pytest.mark.parametrize("average", [0, 0.9])
def test_a_state_of_the_model_beside_its_tensors_is_saved_and_restored(
    average: float, here: Callable[..., Any], small: list[str], tmp_path: Path, folder: Path
) -> None:
    words = [*small, f"train.ema={average}"]
    here(*words, model=Counting())
    assert checkpoint.load(folder / "last.pt")["model"]["_extra_state"]["images"] == 2 * 90
    again = Counting()
    here(*words, "train.steps=18", model=again)
    assert again.seen == {"images": 3 * 90, "names": ["a", "b"]}
    weights = tmp_path / "runs/run/model.safetensors"
    assert load_file(weights).keys() == dict(again.named_parameters()).keys()
    tuned = Counting()
    here(*words, "run.name=tuned", "train.steps=1", f"model.init={weights}", model=tuned)
    assert tuned.seen["images"] == 3 * 90 + 16
    told = "model.safetensors lacks _extra_state: what the model keeps there is more than plain values"
    assert told not in (tmp_path / "runs/run/log.txt").read_text()
    here(*words, "run.name=other", "train.steps=1", model=Numbering())
    assert told in (tmp_path / "runs/other/log.txt").read_text()


# --- the end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost", ["model.safetensors", "status.json", "checkpoints/last.pt", "checkpoints/best.pt"]
)
def test_what_is_missing_of_a_complete_run_is_made_again(
    lost: str, here: Callable[..., Any], small: list[str], tmp_path: Path, folder: Path
) -> None:
    here(*small)
    run = tmp_path / "runs" / "run"
    weights = (run / "model.safetensors").read_bytes()
    (run / lost).unlink()
    if lost == "status.json":  # as a SIGKILL leaves it
        (run / lost).write_text(json.dumps({"state": "running", "step": 12, "attempts": 1}))
    assert here(*small).state == "completed"
    assert (run / "model.safetensors").read_bytes() == weights
    assert read_status(run)["state"] == "completed"
    assert os.readlink(folder / "last.pt") == checkpoint.name_of(12)
    assert (folder / "best.pt").exists()
    before = listing(run)
    here(*small)
    assert listing(run) == before


def test_a_run_that_is_beyond_its_end_says_so_and_what_to_do(
    here: Callable[..., Any], small: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    here(*small, "checkpoint.every=5", "eval.every=never", "checkpoint.keep=9", "train.steps=11")
    (tmp_path / "runs/run/checkpoints" / checkpoint.name_of(11)).unlink()  # the one with an evaluation
    for words in ([], ["eval.every=1"]):
        done = cli("train", *small, *words, "train.steps=8")
        assert done.rc == 2, done
        told = "runs/run: the run is at step 10 already, beyond the 8 steps of this configuration;"
        assert told in done.err and "give more than 10 steps by train.steps" in done.err, done
    assert here(*small, "eval.every=never", "train.steps=10").state == "completed"  # its end is right there


def test_the_state_of_another_run_that_is_at_the_end_already_is_told(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    here(*small, "run.name=first")
    for steps in (12, 5):
        told = (
            rf"resume: runs/first/.*best\.pt is the state of another run after step 12, .* at step {steps};"
        )
        with pytest.raises(UserError, match=told):
            here(*small, "run.name=second", "resume=runs/first", f"train.steps={steps}")
    assert not (tmp_path / "runs/second").exists()
    here(*small, "run.name=second", "resume=runs/first", "train.steps=14")
    log = (tmp_path / "runs/second/log.txt").read_text()
    assert "(step 12), the state of another run: its weights, its optimizer and its step" in log


def test_a_run_of_version_0_1_whose_files_have_format_1_goes_on(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    """tests/assets/format-1.pt is the state after step 7 of this job, as the first version saved it."""
    words = [
        *small, "model.args={hidden: [4], dropout: 0.2}", "optim.args.momentum=0.9", "log.every=5",
        "eval.every=20", "train.steps=12", "threads=1",
    ]  # fmt: skip
    old = Path(__file__).parent / "assets" / "format-1.pt"
    folder = tmp_path / "runs" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(old, folder / "step-00000007.pt")
    assert here(*words).step == 12
    here(*words, "run.name=straight")
    one, other = (
        torch.load(tmp_path / "runs" / name / "checkpoints/last.pt", weights_only=True)
        for name in ("run", "straight")
    )
    for name, value in one["model"].items():
        assert torch.allclose(value, other["model"][name], rtol=1e-4, atol=1e-6)
    assert one["format"] == 2 and one["parts"] == other["parts"] == 1
