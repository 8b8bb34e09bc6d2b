"""The table of docs/guarantees.md holds: one hash a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.table import JOBS, MODELS, make


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_each_job_has_the_same_bits_on_any_number_of_processes_moved_and_killed(
    tmp_path: Path, model: str
) -> None:
    numbers = [number for number, (name, *_) in enumerate(JOBS) if name == model]
    found = dict(make(tmp_path, numbers))
    assert len(found) == 4
    for number, hashes in found.items():
        assert len(set(hashes.values())) == 1, (list(JOBS)[number], hashes)
    assert len({hashes["1"] for hashes in found.values()}) == 4  # jobs that differ have other bits
