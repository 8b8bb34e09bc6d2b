"""Guarantee 1 under fire: after any series of faults a run ends as one that nobody disturbed."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.faults.driver import KINDS, Driver, check

# What no other test does to ranks and launchers, and a damaged file between. One by one there are kills and
# signals in test_resume.py, test_fit.py and test_watchdog.py, which also stops ranks; damage in
# test_checkpoint.py; disks in test_full_disk.py; and kills between operations in test_operations.py.
SHORT = ["SIGKILL while saving", "flipped bit", "SIGINT to the launcher", "SIGUSR2 to a rank"]


@pytest.mark.long
def test_a_run_survives_a_series_of_faults(tmp_path: Path) -> None:
    survives(tmp_path, SHORT)


@pytest.mark.nightly
def test_a_run_survives_every_kind_of_fault(tmp_path: Path) -> None:
    """In short: the test above, and for each of the other kinds one of the files that are named there."""
    survives(tmp_path, list(KINDS))


def survives(folder: Path, kinds: list[str]) -> None:
    """A run survives each of these once. The seed is printed: python -m tests.faults --seed ... takes it."""
    driver = Driver(folder, seed=secrets.randbelow(10**6))
    driver.inject(len(kinds), kinds)
    assert set(driver.injected) == set(kinds)
    check(driver)
