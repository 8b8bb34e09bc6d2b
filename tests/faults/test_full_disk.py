"""A disk that is full for a while, or to the end."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_train.checkpoint import newest_first, step_of
from dist_train.record.history import read_lines, read_status
from tests.warm import Process
from tests.worlds import SMALL, write_npz

SLOW = """
import time

def slow(image):
    time.sleep(0.003)
    return image
"""
WORDS = [*SMALL, "data.train_transform=[mine:slow]", "checkpoint.every=5", "log.every=5", "eval.every=never"]
Train = Callable[[int], tuple[Path, Process]]


class Disk:
    """A small disk that other data fill up: a tmpfs, or where none may be mounted, a limit of file sizes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.other = folder, folder / "other"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
        self.is_real = subprocess.run(mount, capture_output=True).returncode == 0

    def fill(self, pid: int) -> None:
        if self.is_real:
            with self.other.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        return
        else:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))

    def empty(self, pid: int) -> None:
        if self.is_real:
            self.other.unlink()
        else:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small disk, mounted for this test."""
    small = Disk(tmp_path / "disk")
    yield small
    if small.is_real:
        subprocess.run(["umount", "--lazy", str(small.folder)], check=True)


@pytest.fixture
def train(disk: Disk, begin: Callable[..., Process], wait_for: Callable[..., None], tmp_path: Path) -> Train:
    """train(steps) -> (run, Process) of a training whose run lies on the disk, and that has saved there."""
    (tmp_path / "mine.py").write_text(SLOW)
    write_npz(tmp_path)
    run = disk.folder / "run"
    words = [*WORDS, f"run.dir={disk.folder}", "run.name=run", "model.args.hidden=[512]"]

    def saved(steps: int) -> tuple[Path, Process]:
        process = begin("train", *words, f"train.steps={steps}")
        wait_for((run / "checkpoints" / "last.pt").exists, process)
        return run, process

    return saved


@pytest.mark.long
def test_a_full_disk_ends_no_training_and_the_next_checkpoint_is_tried(
    disk: Disk, train: Train, wait_for: Callable[..., None]
) -> None:
    run, process = train(300)
    newest = lambda: step_of(newest_first(run / "checkpoints")[0])  # noqa: E731
    disk.fill(process.pid)
    full = newest()
    wait_for(lambda: f"step {full + 40}/300" in process.errors.read_text(), process)
    told = process.errors.read_text()
    assert "could not be written: " in told and "the checkpoints before it are untouched" in told
    assert newest() <= full + 5  # one may have been under way
    disk.empty(process.pid)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert newest() == 300
    assert read_status(run)["state"] == "completed"
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(5, 301, 5))  # the rows of that time were kept in memory
    assert not list(run.rglob("*.tmp"))


@pytest.mark.long
def test_a_run_whose_last_checkpoint_has_no_room_fails_and_says_so(disk: Disk, train: Train) -> None:
    run, process = train(60)
    disk.fill(process.pid)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    message = err.strip().splitlines()[-1]
    assert message.startswith("dist-train: the state after step 60 is not saved: "), err
    assert "Traceback" not in err
    good = newest_first(run / "checkpoints")
    assert good and step_of(good[0]) < 60
    assert not list(run.rglob("*.tmp"))
    disk.empty(process.pid)
    _, again = train(60)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert f"(step {step_of(good[0]):,})" in err
    assert read_status(run)["state"] == "completed"
