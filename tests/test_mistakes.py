"""Mistakes of the user's: one sentence that tells what and where, exit code 2, and nothing touched."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from dist_train.config import UserError
from tests.processes import REPO, Finished, one_after_the_other
from tests.worlds import SMALL, listing, pictures, write_csv, write_csv_data, write_image_folder, write_npz

ASSETS = REPO / "dist_train" / "assets"
ABSENT = "mps" if sys.platform.startswith("linux") else "cuda"  # a device that can't be here


class Mistake(NamedTuple):
    """A mistake, and the words that its sentence must hold."""

    name: str
    arguments: str  # several are separated by two blanks
    words: str  # the same


# Found in the configuration alone, before torch is imported.
EARLY = [
    Mistake("a typo in a key", "optim.lrr=0.1", "argument 'optim.lrr=0.1'  'optim.lr'?"),
    Mistake("a typo in a file", "typo.yaml", "typo.yaml  'train.epohcs'  'train.epochs'?"),
    Mistake("a typo in a section", "optmi.lr=0.1", "'optmi'  'optim'?"),
    Mistake("a key without its section", "lr=0.1", "'lr'  'optim.lr'?"),
    Mistake("text for a whole number", "train.steps=ten", "'train.steps'  a whole number  'ten'"),
    Mistake("a fraction for a whole number", "train.batch_size=1.5", "train.batch_size  1.5"),
    Mistake("a wrong type in a file", "type.yaml", "type.yaml  'log.every'  a whole number  'often'"),
    Mistake("text for true or false", "compile=maybe", "'compile'  true or false  'maybe'"),
    Mistake("a number for a section", "optim=3", "'optim'  section  optim.name  optim.lr"),
    Mistake("nothing for what must be", "seed=null", "'seed'  a whole number"),
    Mistake("a number for a mapping", "model.args=3", "'model.args'  a mapping"),
    Mistake("a number for a list", "data.mean=0.5", "'data.mean'  a list"),
    Mistake("text in a list of numbers", "data.mean=[0.5,half]", "'data.mean[1]'  'half'"),
    Mistake("an interpolation of nothing", "seed=${sed}", "'seed'  'sed'"),
    Mistake("a file that isn't there", "typos.yaml", "typos.yaml  'typo.yaml'?"),
    Mistake("a file that isn't YAML", "broken.yaml", "broken.yaml  YAML  line 3"),
    Mistake("a file of other bytes", "arrays.npz", "arrays.npz  YAML"),
    Mistake("a folder for a file", "images", "images  config file"),
    Mistake("a list for a mapping", "list.yaml", "list.yaml  key: value"),
    Mistake("an argument without its key", "=3", "'=3'  key=value"),
    Mistake("an unfinished list", "data.mean=[0.5", "data.mean=[0.5"),
    Mistake("epochs and steps", "train.epochs=2", "'train.steps'  'train.epochs'"),
    Mistake("neither epochs nor steps", "train.steps=null", "'train.epochs'  'train.steps'"),
    Mistake("an unknown precision", "precision=fp8", "'precision'  'fp8'  fp16"),
    Mistake("an unknown device", "device=gpu", "'device'  'gpu'  cpu, cuda, mps"),
    Mistake("an unknown schedule", "schedule.name=cosin", "'schedule.name'  'cosin'  'cosine'?"),
    Mistake("an unknown W&B mode", "wandb.mode=offlin", "'wandb.mode'  disabled  'offline'?"),
    Mistake("an empty batch", "train.batch_size=0", "'train.batch_size'  at least 1  not 0"),
    Mistake("a negative learning rate", "optim.lr=-1", "'optim.lr'  at least 0"),
    Mistake("a learning rate that is no number", "optim.lr=.nan", "'optim.lr'"),
    Mistake("a moving average that never moves", "train.ema=1", "'train.ema'  below 1"),
    Mistake("an interval in other words", "eval.every=often", "'eval.every'  '2 epochs'  'often'"),
    Mistake("an evaluation by the clock", "eval.every=2 minutes", "'eval.every'  steps or epochs"),
    Mistake("a run outside its folder", "run.name=../other", "'run.name'  '../other'"),
    Mistake("means without deviations", "data.mean=[0.5]", "'data.std'  'data.mean'"),
    Mistake("a deviation of zero", "data.mean=[0]  data.std=[0]", "'data.std'  positive"),
    Mistake("an unclear best", "checkpoint.best=accuracy", "'checkpoint.best'  max eval/accuracy"),
]

# Found when data, model and optimizer are built.
LATE = [
    Mistake("an unknown model", "model.name=resnet81", "model.name  'resnet81'  'resnet18'?"),
    Mistake("an unknown module", "model.name=nowhere:Net", "model.name  'nowhere'"),
    Mistake("an unknown object", "model.name=mine:Nett", "model.name  mine  'Nett'  'Net'?"),
    Mistake("an argument the model lacks", "model.args.hiden=[3]", "model.args.hiden  'hidden'?"),
    Mistake("an argument it refuses", "model.args.dropout=3", "model.args  mlp  between 0 and 1"),
    Mistake("layers of negative size", "model.args.hidden=[-1]", "model.args  mlp  -1"),
    Mistake(
        "unknown weights",
        "model.name=resnet18  model.args.weights=IMAGENET",
        "model.args  resnet18  IMAGENET",
    ),
    Mistake("images that don't fit", "model.name=alexnet", "model.name  alexnet  [1, 8, 8]"),
    Mistake("an unknown optimizer", "optim.name=sgd", "optim.name  'sgd'  'SGD'?"),
    Mistake("an optimizer of another kind", "optim.name=LBFGS", "optim.name  'LBFGS'"),
    Mistake("an argument it lacks", "optim.args.momentun=0.9", "optim.args.momentun  'momentum'?"),
    Mistake("a value out of range", "optim.args.momentum=-1", "optim.args  SGD  momentum"),
    Mistake("lr among the arguments", "optim.args.lr=1", "optim.args.lr  optim.lr"),
    Mistake(
        "an argument the schedule lacks",
        "schedule.name=cosine  schedule.args.finall=0",
        "schedule.args.finall  'final'?",
    ),
    Mistake("a warm-up without end", "schedule.warmup=100", "schedule.warmup  100  12"),
    Mistake("an unknown task", "task.name=clasification", "task.name  'classification'?"),
    Mistake("too smooth labels", "task.args.label_smoothing=2", "task.args  label_smoothing  2"),
    Mistake("a device that isn't here", f"device={ABSENT}", f"device  '{ABSENT}'  device=auto"),
    Mistake("an indivisible batch", "train.accumulate=3", "train.batch_size  16  3  15 or 18"),
    Mistake(
        "fewer samples than a batch",
        "train.batch_size=128  data.drop_last=true",
        "train.batch_size  128  90  drop_last",
    ),
    Mistake("a start from nowhere", "resume=nowhere.pt", "nowhere.pt"),
    Mistake("a run's folder in a file", "run.dir=arrays.npz", "run.dir  arrays.npz"),
    Mistake("an unknown data set", "data.name=FashionMIST", "data.name  'FashionMNIST'?"),
    Mistake(
        "an argument the data set lacks",
        "data.name=FakeData  data.args.sizze=3",
        "data.args.sizze  FakeData  'size'?",
    ),
    Mistake(
        "an unknown transform",
        "data.train_transform=[RandomHorizontalFlipp]",
        "data.train_transform[0]  'RandomHorizontalFlip'?",
    ),
    Mistake(
        "an argument the transform lacks",
        "data.train_transform=[{RandomCrop: {sizes: 3}}]",
        "data.train_transform[0].RandomCrop.sizes  'size'?",
    ),
    Mistake(
        "a crop larger than the images",
        "data.train_transform=[RandomVerticalFlip,{RandomCrop: {size: 20}}]",
        "data.train_transform[1]  RandomCrop  (20, 20)",
    ),
    Mistake(
        "a transform of pairs",
        "data.train_transform=[MixUp,RandomVerticalFlip]",
        "data.train_transform  MixUp",
    ),
    Mistake("an unknown target transform", "data.target_transform=onehot", "target_transform  'one_hot'?"),
    Mistake("means of other channels", "data.mean=[0,0]  data.std=[1,1]", "data.mean  2  1 channel"),
    Mistake("no folder of images", "data.name=image_folder  data.root=imges", "data.root  'images'?"),
    Mistake("an empty folder", "data.name=image_folder  data.root=empty", "empty  class"),
    Mistake("an empty class", "data.name=image_folder  data.root=hollow", "hollow/train/dark  no images"),
    Mistake("a class only in the eval set", "data.name=image_folder  data.root=more", "'dotted'"),
    Mistake(
        "no eval set",
        "data.name=image_folder  data.root=images/train",
        "evaluation set  data.eval_fraction",
    ),
    Mistake("no CSV file", "data.name=csv", "data.args.annotations_file"),
    Mistake(
        "a CSV file that isn't there",
        "data.name=csv  data.root=csv  data.args.annotations_file=trian.csv",
        "csv/trian.csv",
    ),
    Mistake(
        "a CSV row without an image",
        "data.name=csv  data.root=csv  data.args.annotations_file=lost.csv  data.args.img_dir=pictures",
        "lost.csv  line 3  train/999.png",
    ),
    Mistake(
        "a CSV row without a label",
        "data.name=csv  data.root=csv  data.args.annotations_file=bare.csv  data.args.img_dir=pictures",
        "bare.csv  line 3  label",
    ),
    Mistake(
        "a CSV label that training lacks",
        "data.name=csv  data.root=csv  data.args.annotations_file=train.csv  data.args.img_dir=pictures"
        "  data.args.eval_annotations_file=other.csv",
        "other.csv  line 2  'drak'  'dark'?",
    ),
    Mistake(
        "a CSV label beyond the classes",
        "data.name=csv  data.root=csv  data.args.annotations_file=numbers.csv"
        "  data.args.img_dir=pictures  data.args.classes=[bright,dark]",
        "numbers.csv  line 4  label 2  2 classes",
    ),
    Mistake(
        "a CSV file of other bytes",
        "data.name=csv  data.root=.  data.args.annotations_file=arrays.npz",
        "arrays.npz  CSV",
    ),
    Mistake(
        "a truncated idx.gz",
        "data.name=fashion_mnist  data.root=short_idx",
        "short_idx/train-labels-idx1-ubyte.gz  truncated",
    ),
    Mistake(
        "a corrupt idx.gz",
        "data.name=fashion_mnist  data.root=corrupt_idx",
        "corrupt_idx/train-labels-idx1-ubyte.gz  corrupt",
    ),
    Mistake(
        "another idx.gz",
        "data.name=fashion_mnist  data.root=other_idx",
        "other_idx/train-labels-idx1-ubyte.gz  2049",
    ),
    Mistake(
        "an idx.gz without its labels",
        "data.name=fashion_mnist  data.root=lone_idx",
        "lone_idx  train-labels-idx1-ubyte.gz  missing",
    ),
    Mistake("no .npz file", "data.root=arays.npz", "data.root  arays.npz  'arrays.npz'?"),
    Mistake("a truncated .npz", "data.root=short.npz", "data.root  short.npz"),
    Mistake("a corrupt .npz", "data.root=corrupt.npz", "corrupt.npz  x_train"),
    Mistake("an .npz without labels", "data.root=unlabelled.npz", "unlabelled.npz  'y_train'"),
    Mistake("more images than labels", "data.root=uneven.npz", "uneven.npz  90 images  80 labels"),
    Mistake("a label below zero", "data.root=negative.npz", "negative.npz  -1"),
    Mistake("a label beyond the classes", "data.args.classes=[a,b]", "arrays.npz  2  2 classes"),
    Mistake("labels that are words", "data.root=words.npz", "words.npz  labels"),
    Mistake("flat images", "data.root=flat.npz", "flat.npz  [90, 64]"),
    Mistake("no images at all", "data.root=none.npz", "empty"),
    Mistake(
        "an array of objects",
        "data.root=null  data.args.images=objects.npy  data.args.labels=objects.npy",
        "objects.npy",
    ),
]

# One of each part of the program, for two processes.
SHARED = {
    "an unknown model", "an unknown transform", "a CSV row without an image", "a truncated idx.gz",
    "a run's folder in a file",
}  # fmt: skip


def cases(*mistakes: Mistake) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mistake", mistakes, ids=lambda mistake: mistake.name)


class Outcome(NamedTuple):
    """A process that made a mistake, and its folder before and after it."""

    result: Finished
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder full of broken things, and of a run's record that must stay as it is."""
    tmp_path = tmp_path_factory.mktemp("template")
    npz, image_folder = write_npz(tmp_path), write_image_folder(tmp_path)
    csv_data = write_csv_data(tmp_path)
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 4, "epoch": 0, "time": 1, "attempt": 1}\n')
    (run / "status.json").write_text(json.dumps({"state": "failed", "attempts": 1}))
    (tmp_path / "mine.py").write_text("import torch\nNet = torch.nn.Linear\n")

    (tmp_path / "typo.yaml").write_text("train:\n  epohcs: 3\n")
    (tmp_path / "type.yaml").write_text("log:\n  every: often\n")
    (tmp_path / "broken.yaml").write_text("train:\n  - epochs: 3\n  steps: 1\n")
    (tmp_path / "list.yaml").write_text("- train\n- epochs\n")

    (tmp_path / "empty").mkdir()
    shutil.copytree(image_folder, tmp_path / "hollow")
    for file in (tmp_path / "hollow" / "train" / "dark").iterdir():
        file.unlink()
    shutil.copytree(image_folder, tmp_path / "more")
    (tmp_path / "more" / "val" / "dark").rename(tmp_path / "more" / "val" / "dotted")

    rows = [("file", "label"), ("train/000.png", "bright")]
    write_csv(csv_data / "lost.csv", [*rows, ("train/999.png", "dark")])
    write_csv(csv_data / "bare.csv", [*rows, ("train/001.png",)])
    write_csv(csv_data / "other.csv", [rows[0], ("eval/000.png", "drak")])
    write_csv(csv_data / "numbers.csv", [rows[0], *((f"train/00{i}.png", i) for i in range(3))])

    for name in ("short_idx", "corrupt_idx", "other_idx", "lone_idx"):
        shutil.copytree(ASSETS, tmp_path / name)
    labels = "train-labels-idx1-ubyte.gz"
    data = (ASSETS / labels).read_bytes()
    (tmp_path / "short_idx" / labels).write_bytes(data[:-100])
    (tmp_path / "corrupt_idx" / labels).write_bytes(flipped(data, len(data) // 2))
    (tmp_path / "other_idx" / labels).write_bytes(gzip.compress(b"\0\0\x08\x03" + bytes(100)))
    (tmp_path / "lone_idx" / labels).unlink()

    x, y = pictures(90)
    good = {"x_train": x, "y_train": y, "x_test": x[:9], "y_test": y[:9]}
    whole = npz.read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[:-200])
    (tmp_path / "corrupt.npz").write_bytes(flipped(whole, 2000))
    np.savez(tmp_path / "unlabelled.npz", x_train=x)
    np.savez(tmp_path / "uneven.npz", **good | {"y_train": y[:80]})
    np.savez(tmp_path / "negative.npz", **good | {"y_train": y - 1})
    np.savez(tmp_path / "words.npz", **good | {"y_train": y.astype(str)})
    np.savez(tmp_path / "flat.npz", **good | {"x_train": x.reshape(90, 64)})
    np.savez(tmp_path / "none.npz", **good | {"x_train": x[:0], "y_train": y[:0]})
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    return tmp_path


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def assert_one_sentence(result: Finished, words: str) -> None:
    assert (result.rc, result.out) == (2, ""), result
    assert re.fullmatch(r"dist-train: [^\n]+\.\n", result.err), result
    assert "Traceback" not in result.err, result
    for word in words.split("  "):
        assert word in result.err, f"'{word}' is not in: {result.err}"


@pytest.fixture(scope="module")
def late(
    request: pytest.FixtureRequest, template: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """All late mistakes that were selected, made by one process: torch is slow to start."""
    chosen = [
        item.callspec.params["mistake"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "late" in item.fixturenames
    ]
    worlds = [tmp_path_factory.mktemp("mistake") / "world" for _ in chosen]
    for world in worlds:
        shutil.copytree(template, world)
    before = [listing(world) for world in worlds]
    results = one_after_the_other(
        [
            (world, ["train", *SMALL, *mistake.arguments.split("  ")])
            for world, mistake in zip(worlds, chosen, strict=True)
        ]
    )
    outcomes = zip(results, before, map(listing, worlds), strict=True)
    return {mistake.name: Outcome(*it) for mistake, it in zip(chosen, outcomes, strict=True)}


@cases(*EARLY)
def test_a_mistake_in_the_configuration_is_one_sentence_and_nothing_is_touched(
    mistake: Mistake, cli: Callable[..., Finished], template: Path
) -> None:
    before = listing(template)
    result = cli("train", *SMALL, *mistake.arguments.split("  "), cwd=template)
    assert_one_sentence(result, mistake.words)
    assert listing(template) == before


@pytest.mark.long
@cases(*LATE)
def test_a_mistake_in_what_is_built_is_one_sentence_and_nothing_is_touched(
    mistake: Mistake, late: dict[str, Outcome]
) -> None:
    assert_one_sentence(late[mistake.name].result, mistake.words)
    assert late[mistake.name].after == late[mistake.name].before


@cases(*EARLY[::4], *(mistake for mistake in LATE if mistake.name in SHARED))
def test_two_processes_tell_a_mistake_once(
    mistake: Mistake, ranks: Callable[..., list[Finished]], template: Path, tmp_path: Path
) -> None:
    world = tmp_path / "world"
    shutil.copytree(template, world)
    before = listing(world / "runs")
    first, second = ranks(2, "train", *SMALL, *mistake.arguments.split("  "), cwd=world)
    assert_one_sentence(first, mistake.words)
    assert (second.rc, second.err) == (2, ""), second
    assert listing(world / "runs") == before


def test_two_processes_name_the_batch_sizes_that_they_can_divide(
    ranks: Callable[..., list[Finished]], small: list[str]
) -> None:
    first, second = ranks(2, "train", *small, "train.batch_size=15")
    assert_one_sentence(first, "train.batch_size  15  14 or 16  1, 3, 5, 15 processes")
    assert (second.rc, second.err) == (2, "")


# --- what comes up only in mid-training -------------------------------------------------------------


def test_an_image_that_a_worker_cannot_read_is_named_and_ends_the_training(
    cli: Callable[..., Finished], image_folder: Path, small: list[str], tmp_path: Path
) -> None:
    bad = image_folder / "train" / "striped" / "029.png"
    bad.write_bytes(b"not a picture")
    result = cli("train", *small, "data.name=image_folder", f"data.root={image_folder}", "data.workers=2")
    assert result.rc == 2, result
    assert result.err.splitlines()[-1].startswith(f"dist-train: {bad}: not a readable image"), result
    assert "Traceback" not in result.err
    status = json.loads((tmp_path / "runs" / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert str(bad) in status["reason"]


def test_a_rank_that_cannot_read_an_image_tells_so(
    ranks: Callable[..., list[Finished]], image_folder: Path, small: list[str]
) -> None:
    bad = image_folder / "train" / "striped" / "029.png"  # in the last step, in rank 1's part
    bad.write_bytes(b"not a picture")
    results = ranks(
        2, "train", *small, "data.name=image_folder", f"data.root={image_folder}", "data.shuffle=false"
    )
    assert all(result.rc for result in results), results
    assert f"dist-train: {bad}: not a readable image" in results[1].err


def test_images_of_several_sizes_are_told_with_the_remedy(
    here: Callable[..., Any], image_folder: Path, small: list[str]
) -> None:
    Image.new("RGB", (9, 8)).save(image_folder / "train" / "dark" / "wide.png")
    with pytest.raises(UserError) as caught:
        here(*small, "data.name=image_folder", f"data.root={image_folder}")
    told = str(caught.value)
    assert told.startswith("data.eval_transform: ")
    assert "[3, 8, 8]" in told and "[3, 8, 9]" in told and "Resize" in told
