"""What holds for the code as a whole: imports go one way, and what is light stays so."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.processes import REPO

# From top to bottom: a module imports only what stands in lines below its own, or in its own package.
LAYERS = """
    __main__
    cli
    tools
    launch
    train
    distill
    predict
    trained
    exported
    trainer
    state
    learner tables histograms
    first
    fsdp
    parallel
    evaluate meters outcomes
    tasks
    data
    guard
    optim
    models
    checkpoint flops
    nested rows fetch shared buffers
    runtime
    tree
    record console pages
    cluster
    parts seeds heap
    config importing
"""
UPWARD = {("parallel", "fsdp")}  # it chooses it, and imports it when it is asked for


def imported(path: str) -> set[str]:
    """The modules and packages just below dist_train that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((REPO / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dist_train":
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            paths = [REPO / "dist_train" / name for name in names]
            found |= {path.name for path in paths if path.exists() or path.with_suffix(".py").exists()}
    return found


def test_imports_go_one_way() -> None:
    place = {name: row for row, line in enumerate(LAYERS.split("\n")) for name in line.split()}
    for file in sorted((REPO / "dist_train").rglob("*.py")):
        path = file.relative_to(REPO / "dist_train")
        ours = path.parts[0].removesuffix(".py")
        if ours == "__init__":
            continue
        assert ours in place, f"{path} has no place in LAYERS yet"
        for name in imported(f"dist_train/{path}") - {ours}:
            assert place[ours] < place[name] or (ours, name) in UPWARD, f"{path} imports {name}"


LIGHT = ["dist_train", "dist_train.cli", "dist_train.seeds", "dist_train.record.history",
         "dist_train.tools.status", "dist_train.tools.watch", "dist_train.tools.sweep",
         "dist_train.cluster.sweep", "dist_train.tools.compare.files"]  # fmt: skip


@pytest.mark.parametrize("module", LIGHT)
def test_what_trains_nothing_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
