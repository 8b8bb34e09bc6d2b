"""Signals outside of training: before there is anything to save, and after all is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import Finished

EARLY = """
import importlib.abc, os, runpy, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())
runpy.run_module("dist_train", run_name="__main__", alter_sys=True)
"""
LATE = """
import atexit, os, signal
from dist_train.tasks import Classification

class Late(Classification):
    pass

atexit.register(os.kill, os.getpid(), signal.SIGTERM)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["dist_train.cli", "omegaconf", "torch", "dist_train.trainer", "mine"])
def test_a_signal_before_training_ends_it_as_interrupted(
    name: str, run: Callable[..., Finished], small: list[str], tmp_path: Path
) -> None:
    """From the first import on; the last one is that of the task, within `fit`."""
    (tmp_path / "mine.py").write_text("from dist_train.tasks import Classification as Mine")
    finished = run("-c", EARLY, "train", *small, "task.name=mine:Mine", env={"AT": name})
    assert (finished.rc, finished.err.count("Traceback")) == (75, 0), finished
    assert name == "mine" or (finished.out, finished.err) == ("", ""), finished


def test_a_signal_after_training_changes_nothing(
    cli: Callable[..., Finished], small: list[str], tmp_path: Path
) -> None:
    """As srun sends it to ranks that have saved, when another one has exited with 75."""
    (tmp_path / "late.py").write_text(LATE)
    finished = cli("train", *small, "task.name=late:Late")
    assert finished.rc == 0, finished
