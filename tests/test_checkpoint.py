"""Checkpoints: written whole or not at all, the right ones kept, and damaged ones recognized."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dist_train import checkpoint
from dist_train.checkpoint.saver import FIRST_SECONDS, SHORTEST_SECONDS
from dist_train.config import UserError
from dist_train.record.history import read_metrics
from tests.distributed.ranks import same_bits


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def state(step: int, best: int | None = None, size: int = 4) -> dict[str, Any]:
    weights = {"weight": torch.full((size,), float(step))}
    rest = {"config": {}, "average": None, "optimizer": {}, "scaler": None, "metrics": {}, "window": {}}
    numbers = {
        "format": checkpoint.FORMAT,
        "step": step,
        "best": best,
        "best_step": best,
        "parts": 1,
        "world_size": 1,
    }
    return numbers | rest | {"model": weights, "classes": [], "sample_shape": [1]}


@pytest.fixture
def saver(tmp_path: Path) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(tmp_path, keep=2, say=lambda text: None)


# --- writing -----------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(saver: checkpoint.Checkpoints) -> None:
    for step in range(1, 7):
        saver.save(state(step, best=2 if step > 1 else None))
    saver.wait()
    assert names(saver.folder) == [
        "best.pt", "last.pt", "step-00000002.pt", "step-00000005.pt", "step-00000006.pt",
    ]  # fmt: skip
    assert checkpoint.load(saver.folder / "best.pt")["step"] == 2
    assert checkpoint.load(saver.folder / "last.pt")["step"] == 6
    assert os.readlink(saver.folder / "best.pt") == "step-00000002.pt"  # still right in a moved folder
    saver.save(state(7, best=7))
    saver.wait()
    assert names(saver.folder) == ["best.pt", "last.pt", "step-00000006.pt", "step-00000007.pt"]


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(saver: checkpoint.Checkpoints) -> None:
    changing = state(1, size=1_000_000)
    saver.save(changing)
    changing["model"]["weight"].fill_(9)  # the loop goes on at once
    saver.wait()
    assert (checkpoint.load(saver.folder / "last.pt")["model"]["weight"] == 1).all()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-00000003.pt.tmp").write_bytes(b"half")
    checkpoint.Checkpoints(tmp_path, keep=2, say=print)
    assert names(folder) == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    checkpoint.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"ne")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomically(path, fail)
    assert names(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


def test_a_save_that_failed_is_told_and_the_next_one_tries_again(tmp_path: Path) -> None:
    told: list[str] = []
    saver = checkpoint.Checkpoints(tmp_path, keep=2, say=told.append)
    shutil.rmtree(saver.folder)
    saver.save(state(1, best=1))
    assert "step-00000001.pt could not be written: No such file or directory" in told_once(saver.wait(), told)
    saver.folder.mkdir()
    saver.save(state(3))
    assert saver.wait() == ""
    assert checkpoint.load(saver.folder / "last.pt")["step"] == 3


def told_once(failure: str, told: list[str]) -> str:
    """The failure, if the user heard of it once."""
    assert len(told) == 1 and failure in told[0]
    return failure


def test_weights_that_are_not_finite_are_never_saved(saver: checkpoint.Checkpoints) -> None:
    saver.save(state(1))
    saver.save(state(2) | {"model": {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}})
    assert "the weights are not finite (b)" in saver.wait()
    assert names(saver.folder) == ["last.pt", "step-00000001.pt"]


def test_the_interval_between_saves_follows_their_cost_and_the_interruptions(
    saver: checkpoint.Checkpoints,
) -> None:
    assert saver.interval(3600) == FIRST_SECONDS
    saver.stall_seconds = [9.0, 2.0, 2.0]  # the first one also allocates
    assert saver.interval(3600) == 120  # sqrt(2 x 2 s x 3,600 s)
    assert saver.interval(4 * 3600) == 240
    saver.write_seconds = 100
    assert saver.interval(3600) == 400  # the disk is not kept busy all the time
    saver.stall_seconds, saver.write_seconds = [1e-6, 1e-6], 0
    assert saver.interval(3600) == SHORTEST_SECONDS


def test_checkpoints_are_written_when_the_configuration_says(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    for every, steps in (
        ("never", [12]),
        ("5", [5, 10, 12]),
        ("1 epoch", [6, 12]),
        ("1 epoch, 4", [4, 6, 8, 12]),
    ):
        name = f"run.name={every}"
        here(*small, name, f"checkpoint.every={every}", "checkpoint.keep=9", "checkpoint.best=none")
        folder = tmp_path / "runs" / every / "checkpoints"
        assert [checkpoint.step_of(path) for path in checkpoint.newest_first(folder)] == steps[::-1]
        assert not (folder / "best.pt").is_symlink()


def test_the_best_is_the_first_best_by_the_metric_that_is_named(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    for best in ("max eval/accuracy", "min eval/loss", "max eval/loss"):
        here(*small, f"run.name={best.replace('/', ' ')}", f"checkpoint.best={best}", "eval.every=1",
             "train.steps=20", "checkpoint.every=never")  # fmt: skip
        run = tmp_path / "runs" / best.replace("/", " ")
        direction, metric = best.split()
        rows = [row for row in read_metrics(run) if metric in row]
        assert len(rows) == 20
        wanted = (max if direction == "max" else min)(rows, key=lambda row: row[metric])
        saved = checkpoint.load(checkpoint.find(run))
        assert (saved["step"], saved["best"]) == (wanted["step"], wanted[metric])


def test_weights_are_exported_as_safetensors_with_the_class_names(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    here(*small, "data.args.classes=[bright,dark,striped]")
    run = tmp_path / "runs" / "run"
    weights = checkpoint.load(run / "checkpoints" / "last.pt")["model"]
    with safe_open(run / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        assert file.metadata()["classes"].split("\n") == ["bright", "dark", "striped"]
        assert sorted(file.keys()) == sorted(weights)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in weights.items())


def test_weights_that_are_shared_between_layers_are_exported_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    checkpoint.save_weights(tmp_path / "shared.safetensors", model.state_dict(), {})
    with safe_open(tmp_path / "shared.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        assert torch.equal(file.get_tensor("1.weight"), model[0].weight)


# --- reading -----------------------------------------------------------------------------------------


def test_the_place_of_a_checkpoint_is_a_file_or_a_run_or_its_folder(saver: checkpoint.Checkpoints) -> None:
    run = saver.folder.parent
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find(run)
    saver.save(state(1, best=1))
    saver.save(state(2, best=1))
    saver.wait()
    for place in (run, saver.folder):
        assert checkpoint.load(checkpoint.find(place))["step"] == 1  # the best
    assert checkpoint.load(checkpoint.find(saver.folder / "step-00000002.pt"))["step"] == 2
    (saver.folder / "best.pt").unlink()
    assert checkpoint.load(checkpoint.find(run))["step"] == 2  # the newest
    with pytest.raises(UserError, match="no such run or checkpoint"):
        checkpoint.find(run / "nowhere")


def test_checkpoints_are_ordered_by_their_steps_not_their_names(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        (tmp_path / f"step-{step:08d}.pt").touch()
    (tmp_path / "step-x.pt").touch()
    steps = [checkpoint.step_of(path) for path in checkpoint.newest_first(tmp_path)]
    assert steps == [100_000_000, 99_999_999, 5]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"state_dict": {}}, "not a checkpoint of dist_train"),
        ([1, 2], "not a checkpoint of dist_train"),
        ({"format": checkpoint.FORMAT + 1}, "written by a newer dist_train"),
    ],
)
def test_other_files_of_torch_are_refused_in_one_sentence(content: Any, told: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=told):
        checkpoint.load(tmp_path / "other.pt")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_ends_the_same(
    damage: str, here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    every = ["checkpoint.every=4", "checkpoint.keep=3", "checkpoint.best=none"]
    here(*small, *every, "run.name=whole", "train.steps=16")
    here(*small, *every)
    newest = tmp_path / "runs/run/checkpoints/step-00000012.pt"
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
    newest.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(damage, content))
    here(*small, *every, "train.steps=16")
    told = (tmp_path / "runs/run/log.txt").read_text()
    assert "step-00000012.pt" in told and "passed over" in told
    assert "going on from runs/run/checkpoints/step-00000008.pt (step 8)" in told
    whole, run = (
        checkpoint.load(tmp_path / "runs" / name / "checkpoints/last.pt") for name in ("whole", "run")
    )
    assert same_bits(whole, run)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    here(*small)
    folder = tmp_path / "runs/run/checkpoints"
    for path in checkpoint.newest_first(folder):
        path.write_bytes(b"nothing")
    before = names(folder)
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        here(*small)
    assert names(folder) == before
