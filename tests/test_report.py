"""The report of a run: what it tells of the record, the model and the data, and what it leaves out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.cli import see
from dist_train.config import UserError
from dist_train.data.images import BadSample, InMemory
from dist_train.data.labels import Labels
from dist_train.data.samples import Samples
from dist_train.data.transforms import ImageTransform
from dist_train.tools import inspect_data, report
from dist_train.tools.findings import spread
from tests.browser import Browser
from tests.processes import REPO, kill

FOLDER = ["data.name=image_folder", "data.workers=0", "model.name=cnn", "model.args.widths=[8,16]",
          "optim.lr=0.1", "train.batch_size=10", "train.steps=12", "log.every=2", "eval.every=4",
          "wandb.mode=disabled", "device=cpu"]  # fmt: skip

TEXT = ["data.name=text", "data.root=texts", "data.args.context=64", "data.args.eval_files=held.txt",
        "data.workers=0", "model.name=gpt", "model.args.depth=1", "model.args.heads=2", "model.args.width=16",
        "task.name=language", "train.steps=2", "wandb.mode=disabled", "device=cpu"]  # fmt: skip


@pytest.fixture
def leaky(image_folder: Path) -> Path:
    """Images of three classes, of which the eval set has two, and in it a training image by another name."""
    shutil.rmtree(image_folder / "val/striped")
    shutil.copy(image_folder / "train/bright/003.png", image_folder / "val/bright/copied.png")
    shutil.copy(image_folder / "train/bright/003.png", image_folder / "train/dark/also.png")
    return image_folder


def written(run: str | Path, **options: Any) -> str:
    """The page of a run."""
    report.report(Path(run), Path("report.html"), **options)
    return Path("report.html").read_text(encoding="utf-8")


@pytest.mark.long
def test_leaks_twins_and_a_class_without_samples_are_told_also_where_the_data_are_gone(
    leaky: Path, here: Callable[..., Any], capsys: pytest.CaptureFixture[str], browser: Browser
) -> None:
    here(*FOLDER, f"data.root={leaky}", "run.name=leaky")
    capsys.readouterr()
    made, said = written("runs/leaky"), capsys.readouterr().out.replace("\n", "")
    leak = f"{leaky}/train/bright/003.png = {leaky}/val/bright/copied.png"
    assert f"A leak: 1 of 9 eval samples have the very pixels of a training sample ({leak})" in made
    assert "A leak: 1 of 9 eval samples" in said and "written: report.html" in said
    assert "The same pixels under two labels in the training set" in made and "dark/also.png" in made
    browser.open(Path("report.html"))
    assert browser.said() == browser.fetched() == []
    cells = "return [...document.querySelectorAll('td')].find(one => one.textContent === 'striped')"
    row = browser.run(f"{cells}.parentElement.innerText").split("\t")
    assert row == ["striped", "0", row[2], "0", "–", row[5], row[6]]
    assert browser.run("return document.querySelectorAll('.matrix td').length") == 9
    assert browser.run("return document.querySelectorAll('.gallery img').length") == 2 * 9
    assert browser.run("return [...document.querySelectorAll('.gallery img')].every(one => one.naturalWidth)")

    leaky.rename(leaky.with_name("elsewhere"))
    gone = written("runs/leaky")
    assert f"Left out. The data: data.root: there is no folder {leaky}" in gone
    assert "<h2>Curves</h2>" in gone and "<h2>Classes</h2>" not in gone
    (saved := Path("runs/leaky/evaluations/some")).mkdir(parents=True)
    (saved / "outcomes.npz").write_text("broken")
    assert "Left out. What was saved: runs/leaky/evaluations/some: not what `eval --save`" in written(
        "runs/leaky"
    )
    moved = written("runs/leaky", overrides=[f"data.root={leaky.with_name('elsewhere')}"])
    assert "<h2>Classes</h2>" in moved and "Left out" not in moved


@pytest.mark.long
def test_a_run_that_runs_and_one_that_was_killed_are_reported_and_its_attempts(
    small: list[str], begin: Callable[..., Any], under_way: Callable[..., Any], here: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    process = under_way(begin("train", *small, "train.steps=100000", "checkpoint.every=5", "log.every=1"))
    assert "<dd>running</dd>" in written("runs/run")
    kill(process)
    process.wait()
    assert "<dd>lost</dd>" in written("runs/run") and "is gone" in Path("report.html").read_text()
    ended = report.Recorded.read(Path("runs/run"))
    steps = -(-ended.rows[-1]["step"] // 100) * 100
    here(*small, f"train.steps={steps}", "log.every=1", "checkpoint.every=5", on_row=lambda row: False)
    first, second = report.recorded._attempts(report.Recorded.read(Path("runs/run")))
    assert (first[0], first[1], second[0]) == (1, 0, 2)
    assert first[2] >= second[1] and first[5] == first[2] - second[1] and second[5] is None
    assert f"train.steps: 100000 -&gt; {steps}" in written("runs/run")


def test_of_what_is_no_classification_the_record_is_told(here: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "held.txt"):
        shutil.copy(REPO / "LICENSE", tmp_path / "texts" / name)
    here(*TEXT)
    (tmp_path / "secret").write_text("of somebody else")
    for name in ("log.txt", "report.html"):
        Path("runs/run", name).unlink(missing_ok=True)
        Path("runs/run", name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"report.html: is a link, which may lead anywhere"):
        see.report(Path("runs/run"))
    made = written("runs/run")
    assert "of somebody else" not in made
    assert "&#x27;Language&#x27; is no classification, so there are no predictions by class" in made
    assert "Its samples are no images" in made and "eval/perplexity" in made


def in_memory(images: torch.Tensor) -> Samples:
    labels = torch.arange(len(images)) % 2
    return Samples(InMemory(images, labels, ["a", "b"]), ImageTransform(), Labels(2, True))


def test_images_that_cant_be_read_are_like_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: Any) -> None:
        raise BadSample("damaged")

    monkeypatch.setattr(Samples, "pair", unreadable)
    one, other = (inspect_data.look(in_memory(torch.zeros(5, 1, 4, 4, dtype=torch.uint8))) for _ in range(2))
    assert one.unreadable == ["damaged"] * 5
    assert inspect_data.twins(one) == [] and inspect_data.leaks(one, other) == []


def test_equal_pixels_are_found_within_and_between_sets_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8, generator=random)
    images[41] = images[7] = images[3]
    others = torch.cat([images[50:], 255 - images[:5], images[3:4]])
    train, other = (inspect_data.look(in_memory(one)) for one in (images, others))
    assert inspect_data.twins(train) == [[3, 7, 41]] and inspect_data.twins(other) == []
    assert inspect_data.leaks(train, other) == [*zip(range(50, 60), range(10), strict=True), (3, 15)]
    reshaped = inspect_data.look(in_memory(images.reshape(60, 1, 2, 8)))
    assert inspect_data.leaks(train, reshaped) == [] and train.shapes == {(1, 4, 4): 60}
    monkeypatch.setattr(inspect_data, "MOST_BYTES", 20 * 16)
    some = inspect_data.look(in_memory(images))
    assert (some.seen, some.samples, len(some.digests)) == (20, 60, 20)
    assert inspect_data.look(in_memory(images), everything=True).seen == 60
    part = spread(in_memory(images), most=7)
    assert [int(part.pair(n)[1]) for n in range(len(part))] == [0, 1, 0, 1, 0, 1, 0]
    assert np.array_equal(part.pair(1)[0], images[9])
