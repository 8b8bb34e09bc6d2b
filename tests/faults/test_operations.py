"""A SIGKILL between two operations on files leaves nothing that the next attempt does not put right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.operations import kill_ahead_of, undisturbed


@pytest.mark.long
def test_a_run_killed_between_two_operations_on_files_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """Three of them, once also the attempt that goes on."""
    count = len(undisturbed(tmp_path))
    assert count > 50
    kill_ahead_of(tmp_path, [1 + count // 3, count])
    kill_ahead_of(tmp_path, [count * 2 // 3], again=count // 3)


@pytest.mark.nightly
def test_a_run_killed_ahead_of_any_of_its_operations_on_files_ends_as_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    """In short: the test above."""
    count = len(undisturbed(tmp_path))
    kill_ahead_of(tmp_path, range(1, count + 1))
