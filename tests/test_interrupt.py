"""Signals outside of training: before there is anything to save, and after all is saved."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import Finished

LATE = """
import atexit, os, signal
from dist_train.task import Classification

class Late(Classification):
    pass

atexit.register(os.kill, os.getpid(), signal.SIGTERM)
"""


def test_a_signal_before_training_ends_it_as_interrupted(
    start: Callable[..., Any], small: list[str], wait_for: Callable[..., None]
) -> None:
    process = start("-m", "dist_train", "train", *small)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch_cpu" in maps.read_text(), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (75, "", "")


def test_a_signal_after_training_changes_nothing(
    cli: Callable[..., Finished], small: list[str], tmp_path: Path
) -> None:
    """As srun sends it to ranks that have saved, when another one has exited with 75."""
    (tmp_path / "late.py").write_text(LATE)
    finished = cli("train", *small, "task.name=late:Late")
    assert finished.rc == 0, finished
