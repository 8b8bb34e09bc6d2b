"""Guarantee 3: a run goes on with the recipe it was started with, and nothing is overwritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.processes import Finished


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of all that lies in a folder."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def test_a_complete_run_says_so_and_is_left_as_it_is(
    tmp_path: Path, small: list[str], cli: Callable[..., Finished]
) -> None:
    assert cli("train", *small).rc == 0
    before = files(tmp_path / "runs")
    again = cli("train", *small)
    assert again.rc == 0, again
    assert "The run is complete: runs/run (step 12 of 12)." in again.out
    assert files(tmp_path / "runs") == before
    never = cli("train", *small, "resume=never")
    assert never.rc == 2, never
    assert files(tmp_path / "runs") == before


def test_a_run_goes_on_only_with_the_recipe_it_was_started_with(
    tmp_path: Path, small: list[str], cli: Callable[..., Finished]
) -> None:
    assert cli("train", *small).rc == 0
    before = files(tmp_path / "runs")
    other = cli("train", *small, "train.steps=20", "optim.lr=0.2", "model.args.hidden=[8]")
    assert other.rc == 2, other
    for change in ("optim.lr: 0.1 -> 0.2", "model.args: {} -> {'hidden': [8]}"):
        assert change in other.err, other
    assert "train.steps" not in other.err, other  # a run may be made longer
    assert files(tmp_path / "runs") == before
    longer = cli("train", *small, "train.steps=20", "log.every=5")
    assert longer.rc == 0, longer
    assert "completed at step 20" in longer.out
    assert "changed: log.every: 4 -> 5" in longer.err
