"""Images that can't be read: named, replaced alike on all ranks, left out of the evaluation, and listed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from dist_train.config import RunError, UserError
from dist_train.evaluate import evaluate
from dist_train.record.history import read_status
from dist_train.tasks import Classification
from tests.distributed.ranks import equal, last
from tests.processes import Finished
from tests.worlds import SMALL

SKIP = [*SMALL, "data.name=image_folder", "data.root=images", "data.on_bad_sample=skip",
        "data.train_transform=[RandomHorizontalFlip]", "model.args.dropout=0.2"]  # fmt: skip


def spoil(*paths: Path) -> None:
    """Makes files what no image is: cut short, empty, or something else."""
    for number, path in enumerate(paths):
        path.write_bytes((path.read_bytes()[:40], b"", b"not an image")[number % 3])


def test_bad_samples_are_replaced_alike_for_any_number_of_processes_and_listed_once(
    ranks: Callable[..., list[Finished]], here: Callable[..., Any], image_folder: Path, tmp_path: Path
) -> None:
    bad = [image_folder / "train/bright/000.png", image_folder / "train/dark/004.png"]
    spoil(*bad)
    results = ranks(2, "train", *SKIP, "run.name=two", "data.workers=1")
    assert [result.rc for result in results] == [0, 0], results[0]
    run = tmp_path / "runs" / "two"
    listed = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(item["sample"] for item in listed) == [
        f"images/{path.relative_to(image_folder)}" for path in bad
    ]
    assert all("not a readable image" in item["reason"] for item in listed)
    assert read_status(run)["bad_samples"] == 2
    assert all(results[0].err.count(f"left out: {item['sample']}") == 1 for item in listed)
    here(*SKIP, "run.name=one", "train.accumulate=2")
    assert equal(last(tmp_path, "two")["model"], last(tmp_path, "one")["model"])
    # The next sample takes the place of a bad one.
    for path in bad:
        shutil.copy(path.with_name(f"{int(path.stem) + 3:03}.png"), path)
    here(*SKIP, "run.name=mended", "data.train_transform=null", "train.accumulate=2")
    spoil(*bad)
    here(*SKIP, "run.name=spoiled", "data.train_transform=null", "train.accumulate=2")
    assert equal(last(tmp_path, "mended")["model"], last(tmp_path, "spoiled")["model"])


@pytest.mark.parametrize(
    ("name", "batch"),
    [("dark/001.png", 16), ("dark/001.png", 1), ("bright/000.png", 5)],
    ids=["in a batch", "a batch of its own", "the first of all"],
)
def test_evaluation_leaves_bad_samples_out(
    name: str, batch: int, here: Callable[..., Any], image_folder: Path, tmp_path: Path
) -> None:
    bad = image_folder / "val" / name
    words = [*SKIP, f"eval.batch_size={batch}"]
    kept = bad.read_bytes()
    spoil(bad)
    with_bad = here(*words, "run.name=bad").metrics
    bad.unlink()
    without = here(*words, "run.name=without").metrics
    bad.write_bytes(kept)
    whole = here(*words, "run.name=whole").metrics
    assert with_bad == pytest.approx(without) and with_bad != whole
    assert f"val/{name}" in (tmp_path / "runs/bad/bad_samples.jsonl").read_text()


def test_a_whole_set_that_cannot_be_read_ends_the_training_even_then(
    here: Callable[..., Any], image_folder: Path
) -> None:
    spoil(*(image_folder / "train").rglob("*.png"))
    with pytest.raises(UserError, match="Nor could any of the"):
        here(*SKIP)


def test_an_evaluation_without_any_sample_is_an_error_and_no_interruption() -> None:
    alone = SimpleNamespace(world_size=1, gather=lambda value: [value])
    with pytest.raises(RunError, match="not one sample of the eval set is there"):
        evaluate(nn.Linear(1, 1), [], Classification(), alone)  # type: ignore[arg-type]
