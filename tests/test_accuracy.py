"""The recipes in configs/ do on the whole Fashion-MNIST what they promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dist_train.data.fashion_mnist import DEBIAN
from tests.processes import REPO, Finished

pytestmark = pytest.mark.slow


@pytest.fixture
def train_recipe(
    tmp_path: Path, cli: Callable[..., Finished], missing: Callable[[str], NoReturn]
) -> Callable[..., dict[str, Any]]:
    """Trains configs/<name> and returns the last evaluation."""
    if not DEBIAN.is_dir():
        missing("the whole Fashion-MNIST (Debian: dataset-fashion-mnist)")

    def run(name: str) -> dict[str, Any]:
        finished = cli(
            "train", REPO / "configs" / name, "wandb.mode=disabled", f"data.root={DEBIAN}", "device=cpu",
            cwd=tmp_path, timeout=1800,
        )  # fmt: skip
        assert finished.rc == 0, finished
        lines = (tmp_path / "runs" / Path(name).stem / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])

    return run


def test_the_quickstart_ends_where_the_tutorial_does(train_recipe: Callable[..., dict[str, Any]]) -> None:
    end = train_recipe("quickstart.yaml")
    assert end["step"] == 5 * 938
    assert end["eval/accuracy"] == pytest.approx(0.65, abs=0.01)
    assert end["eval/loss"] == pytest.approx(1.07, abs=0.02)


def test_the_second_recipe_reaches_93_percent_in_four_epochs(
    train_recipe: Callable[..., dict[str, Any]],
) -> None:
    end = train_recipe("fashion_mnist.yaml")
    assert end["step"] == 4 * 235
    assert end["eval/accuracy"] >= 0.93
