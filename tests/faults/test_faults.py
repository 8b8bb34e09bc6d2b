"""Guarantee 1 under fire: after any series of faults a run ends as one that nobody disturbed."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.faults.driver import KINDS, Driver, check


@pytest.mark.long
def test_a_run_survives_every_kind_of_fault(tmp_path: Path) -> None:
    """The seed is printed: python -m tests.faults --seed ... repeats a series."""
    driver = Driver(tmp_path, seed=secrets.randbelow(10**6))
    driver.inject(len(KINDS))
    assert set(driver.injected) == set(KINDS)
    check(driver)
