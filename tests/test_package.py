"""What is handed on: the source package passes its own tests, the wheel holds what the commands need."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import REPO, Finished

pytestmark = pytest.mark.long
# What no change is made of: caches, and what runs and builds leave behind.
LEFT = {".git", ".venv", "runs", "wandb", "outputs", "data", "build", "dist", "site"}


def build(target: str, folder: Path, run: Callable[..., Finished]) -> Path:
    """The package that `python -m build` would make: `sdist` or `wheel`."""
    finished = run("-m", "hatchling", "build", "-t", target, "-d", folder, cwd=REPO)
    assert finished.rc == 0, finished
    (made,) = folder.iterdir()
    return made


def test_a_source_package_holds_the_whole_tree_and_its_tests_can_be_collected_there(
    run: Callable[..., Finished], tmp_path: Path
) -> None:
    with tarfile.open(build("sdist", tmp_path / "dist", run)) as archive:
        archive.extractall(tmp_path, filter="data")
    (top,) = tmp_path.glob("dist_train-*")
    tree = [
        path.relative_to(REPO)
        for item in REPO.iterdir()
        if item.name not in LEFT and not item.name.endswith("_cache")
        for path in ([item] if item.is_file() else item.rglob("*"))
    ]
    missing = [path for path in tree if "__pycache__" not in path.parts and not (top / path).exists()]
    assert not missing
    collected = run(
        "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=top, env={"PYTHONPATH": top}
    )
    assert collected.rc == 0 and " error" not in collected.out.splitlines()[-1], collected
    expected = sum(path.name.startswith("test_") and path.suffix == ".py" for path in tree)
    assert len({line.split("::")[0] for line in collected.out.splitlines() if "::" in line}) == expected


def test_a_wheel_holds_the_package_the_sample_and_the_batch_scripts(
    run: Callable[..., Finished], tmp_path: Path
) -> None:
    names = set(zipfile.ZipFile(build("wheel", tmp_path / "dist", run)).namelist())
    package = [path for path in (REPO / "dist_train").rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(REPO)) for path in package if "__pycache__" not in path.parts}
    wanted |= {f"dist_train/slurm/{name}.sbatch" for name in ("train", "sweep")}
    assert not wanted - names
    assert not [name for name in names if name.startswith(("tests", "docs"))]
