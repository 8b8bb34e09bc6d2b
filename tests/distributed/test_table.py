"""The table of docs/guarantees.md holds: one hash a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dist_train.record.history import read_metrics
from tests.distributed.table import COLUMNS, JOBS, KILLED, MODELS, RECIPES, STEPS, make

Name = tuple[str, str, str]


@pytest.mark.nightly
@pytest.mark.parametrize("model", [*MODELS, "recipes"])
def test_each_job_has_the_same_bits_on_any_number_of_processes_moved_and_killed(
    tmp_path: Path, model: str
) -> None:
    """In short: the test below."""
    agree(hashes(tmp_path, jobs(model), COLUMNS))


@pytest.mark.long
@pytest.mark.parametrize("model", [*MODELS, "recipes"])
def test_jobs_of_each_kind_have_the_same_bits_on_some_numbers_of_processes_moved_and_killed(
    tmp_path: Path, model: str
) -> None:
    """Without what takes most of the time: a kill of each job, and most of the large models."""
    names = jobs(model)
    if model == "ResNet-18":
        agree(hashes(tmp_path, names[3:], ["1", "2"]))
        return
    found = hashes(tmp_path, names[::3] if model == "GPT" else names, COLUMNS[:4])
    for name, killed in hashes(tmp_path, names[:1], [KILLED]).items():
        found[name] |= killed
    agree(found)
    if model == "recipes":  # what they are to show did happen
        lowered, stopped, _ = (read_metrics(tmp_path / "1" / run_of(name)) for name in names)
        assert len({row["lr/0"] for row in lowered if "lr/0" in row}) > 2
        assert (stopped[-1]["step"], "stopped" in stopped[-1]) == (STEPS, True)


def jobs(model: str) -> list[Name]:
    """The jobs that train this model, or the recipes."""
    if model == "recipes":
        return list(RECIPES)
    return [name for name in JOBS if name[0] == model and name not in RECIPES]


def hashes(folder: Path, names: Sequence[Name], columns: Sequence[str]) -> dict[Name, dict[str, str]]:
    """The rows of the table, by job and column."""
    all_names = list(JOBS)
    made = make(folder, [all_names.index(name) for name in names], columns)
    return {all_names[number]: row for number, row in made}


def run_of(name: Name) -> str:
    """The run of a job."""
    return f"job-{list(JOBS).index(name)}"


def agree(found: dict[Name, dict[str, str]]) -> None:
    """Each job has one hash, and jobs that differ have others."""
    for name, row in found.items():
        assert len(set(row.values())) == 1, (name, row)
    assert len({row["1"] for row in found.values()}) == len(found) > 0
