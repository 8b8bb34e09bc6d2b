"""The table of docs/guarantees.md holds: one hash a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.record.history import read_metrics
from tests.distributed.table import JOBS, MODELS, RECIPES, STEPS, make


@pytest.mark.long
@pytest.mark.parametrize("model", [*MODELS, "recipes"])
def test_each_job_has_the_same_bits_on_any_number_of_processes_moved_and_killed(
    tmp_path: Path, model: str
) -> None:
    if model == "recipes":
        names = list(RECIPES)
    else:
        names = [name for name in JOBS if name[0] == model and name not in RECIPES]
    if model == "ResNet-18":  # a minute of a CPU each: each optimizer and each precision once
        names = names[1:3]
    found = dict(make(tmp_path, [list(JOBS).index(name) for name in names]))
    assert len(found) == len(names)
    for name, hashes in zip(names, found.values(), strict=True):
        assert len(set(hashes.values())) == 1, (name, hashes)
    assert len({hashes["1"] for hashes in found.values()}) == len(names)  # jobs that differ have other bits
    if model == "recipes":  # what they are to show did happen
        lowered, stopped, _ = (read_metrics(tmp_path / "1" / f"job-{number}") for number in found)
        assert len({row["lr/0"] for row in lowered if "lr/0" in row}) > 2
        assert (stopped[-1]["step"], "stopped" in stopped[-1]) == (STEPS, True)
