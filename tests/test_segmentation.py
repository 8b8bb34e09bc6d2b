"""Segmentation: masks as they are read and transformed, loss and metrics by hand, small real trainings."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.tv_tensors import Mask

from dist_train import data, models
from dist_train.config import UserError
from dist_train.data.cache_build import kept_in
from dist_train.data.fashion_mnist import ASSETS, fashion_mnist
from dist_train.data.masks import image_masks, mask_file, read_mask
from dist_train.data.order import Part
from dist_train.data.transforms import ImageTransform
from dist_train.predict import evaluate_run
from dist_train.record.history import read_metrics
from dist_train.tasks import Segmentation
from dist_train.tools.export import export
from dist_train.tools.replay import picture, replay
from dist_train.tools.segment import predict_masks
from tests.distributed import ranks as jobs
from tests.processes import Finished

NAMES = ["background", "Trouser", "Bag"]
RECIPE = [
    "data.name=image_masks", "data.root=masks", f"data.args.classes=[{','.join(NAMES)}]",
    "data.args.channels=1", "data.workers=0", "model.name=unet", "model.args.widths=[8,16,16]",
    "task.name=segmentation", "optim.name=AdamW", "optim.lr=0.01", "train.batch_size=12", "threads=1",
    "wandb.mode=disabled", "device=cpu",
]  # fmt: skip
ALONE: Any = SimpleNamespace(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trousers and bags of Fashion-MNIST, one on each image of 32 x 32, at a place by chance."""
    top, random = tmp_path_factory.mktemp("garments") / "masks", np.random.default_rng(0)
    for part, count in (("train", 96), ("val", 23)):
        source = fashion_mnist(str(ASSETS), part == "train", download=False)
        numbers = [n for n, label in enumerate(source.labels.tolist()) if label in (1, 8)][:count]
        for folder in ("images", "masks"):
            (top / part / folder).mkdir(parents=True)
        for number in numbers:
            garment, label = source[number]
            image, mask = np.zeros((2, 32, 32), np.uint8)
            row, column = random.integers(5, size=2)
            image[row : row + 28, column : column + 28] = garment[0].numpy()
            mask[image > 20] = 1 if label == 1 else 2
            Image.fromarray(image).save(top / part / "images" / f"{number:04}.png")
            mask_file(mask).save(top / part / "masks" / f"{number:04}.png")
    return top


@pytest.fixture
def folder(garments: Path, tmp_path: Path) -> Path:
    """The garments as masks/ in the test's own folder."""
    return Path(shutil.copytree(garments, tmp_path / "masks"))


class Fixed(nn.Module):
    """A model that gives these scores, whatever it sees."""

    def __init__(self, scores: Any) -> None:
        super().__init__()
        self.scores = scores if isinstance(scores, dict) else nn.Parameter(scores)

    def forward(self, images: torch.Tensor) -> Any:
        return self.scores


def batch(targets: torch.Tensor) -> data.Batch:
    count = len(targets)
    return data.Batch(torch.zeros(count, 1, 2, 2), targets, Part(0, 0, np.arange(count), count, count))


# --- loss and metrics --------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_of_each_pixel_and_ignored_ones_weigh_nothing() -> None:
    scores, targets = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    targets[0, 0] = 255
    values, weights = Segmentation().losses(Fixed(scores), batch(targets))
    assert weights.sum() == 28 and (weights[0, 0] == 0).all()
    expected = nn.functional.cross_entropy(scores, targets, ignore_index=255)
    assert torch.allclose((values * weights).sum() / weights.sum(), expected)
    weighted = Segmentation(class_weights=[1.0, 2.0, 0.5])
    values, weights = weighted.losses(Fixed(scores), batch(targets))
    of_classes = torch.tensor([1.0, 2.0, 0.5])
    expected = nn.functional.cross_entropy(scores, targets, weight=of_classes, ignore_index=255)
    assert torch.allclose((values * weights).sum() / weights.sum(), expected)
    sums = weighted.sums(Fixed(scores), batch(targets))
    assert weighted.report(sums)["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_an_auxiliary_head_is_trained_but_not_reported() -> None:
    out, aux, targets = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 2), torch.zeros(1, 2, 2).long()
    task = Segmentation(aux_weight=0.4)
    both, _ = task.losses(Fixed({"out": out, "aux": aux}), batch(targets))
    one, _ = task.losses(Fixed(out), batch(targets))
    other, _ = task.losses(Fixed(aux), batch(targets))
    assert torch.allclose(both, one + 0.4 * other)
    sums = [task.sums(Fixed(given), batch(targets)) for given in ({"out": out, "aux": aux}, out)]
    assert task.report(sums[0]) == task.report(sums[1])


def test_intersection_over_union_is_that_of_all_pixels_that_count() -> None:
    targets = torch.tensor([[[0, 0], [1, 1]], [[2, 255], [255, 255]]])
    predicted = torch.tensor([[[0, 1], [1, 1]], [[1, 0], [2, 2]]])
    scores = nn.functional.one_hot(predicted, 4).permute(0, 3, 1, 2).float()  # class 3 is nowhere
    task = Segmentation()
    whole = task.sums(Fixed(scores), batch(targets))
    assert whole["confusion"].tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    reported = task.report(whole)
    assert reported["miou"] == pytest.approx((1 / 2 + 2 / 4 + 0) / 3)
    assert reported["pixel_accuracy"] == 3 / 5
    parts = [task.sums(Fixed(scores[n : n + 1]), batch(targets[n : n + 1])) for n in range(2)]
    assert torch.equal(parts[0]["confusion"] + parts[1]["confusion"], whole["confusion"])


@pytest.mark.parametrize(
    ("scores", "targets", "told"),
    [
        (torch.zeros(1, 3), torch.zeros(1, 2, 2).long(), r"model: it gives \[1, 3\], but segmentation needs"),
        ({"logits": 1}, torch.zeros(1, 2, 2).long(), "model: it gives a NoneType, but segmentation needs"),
        (torch.zeros(1, 3, 1, 1), torch.zeros(1, 2, 2).long(), r"outputs of \[1, 1\] pixels for masks of"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(1).long(), "segmentation needs the class of each pixel"),
        (torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 3), "a class that is none of the model's 3"),
    ],
)
def test_outputs_and_masks_that_do_not_fit_are_told(scores: Any, targets: torch.Tensor, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Segmentation().losses(Fixed(scores), batch(targets))


# --- masks -------------------------------------------------------------------------------------------


def test_images_and_their_masks_are_read_from_two_folders(folder: Path) -> None:
    train = image_masks(str(folder), classes=NAMES, channels=1)
    held = image_masks(str(folder), train=False, classes=NAMES, channels=1)
    assert train is not None and held is not None and (len(train), len(held)) == (96, 23)
    image, mask = train[5]
    assert image.shape == (1, 32, 32) and isinstance(mask, Mask)
    assert torch.equal(mask > 0, image[0] > 20)
    assert train.path(5).parent == folder / "train" / "images"
    assert image_masks(str(folder / "train"), train=False, classes=NAMES) is None  # no parts


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda top: (top / "train/masks/0022.png").unlink(),
            "0022.png: has no mask; there is no .*0022.png",
        ),
        (lambda top: shutil.rmtree(top / "val/masks"), "data.args.masks: there is no folder .*val/masks"),
        (lambda top: shutil.rmtree(top / "train/images"), "data.args.images: there is no folder"),
    ],
)
def test_what_is_missing_is_told_at_the_start(change: Any, told: str, folder: Path) -> None:
    (folder / "train/images/0022.png").write_bytes(next((folder / "train/images").iterdir()).read_bytes())
    (folder / "train/masks/0022.png").write_bytes(next((folder / "train/masks").iterdir()).read_bytes())
    change(folder)
    with pytest.raises(UserError, match=told):
        for train in (True, False):
            image_masks(str(folder), train, classes=NAMES)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.full((4, 4), 3, np.uint8), "a pixel is 3, but the 3 classes are numbered from 0"),
        (np.zeros((4, 4, 3), np.uint8), "a mask has one number of 8 bits for each pixel .*, not RGB"),
        (np.zeros((4, 4), np.uint16), "a mask has one number of 8 bits for each pixel"),
        (b"nothing", "not a readable mask"),
    ],
)
def test_a_mask_that_cannot_be_is_told_by_its_name(values: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(values) if isinstance(values, bytes) else Image.fromarray(values).save(path)
    with pytest.raises(UserError, match=f"mask.png: {told}"):
        read_mask(path, 3)


def test_masks_of_one_bit_and_with_a_palette_are_read_and_255_is_kept(tmp_path: Path) -> None:
    values = np.array([[0, 1], [255, 2]], np.uint8)
    mask_file(values).save(tmp_path / "palette.png")
    Image.fromarray(values > 0).save(tmp_path / "bit.png")
    assert read_mask(tmp_path / "palette.png", 3).tolist() == values.tolist()
    assert read_mask(tmp_path / "bit.png", 2).tolist() == [[0, 1], [1, 1]]


def test_pixels_that_a_transform_brings_in_are_ignored_in_the_mask_and_black_in_the_image() -> None:
    image, mask = torch.full((1, 4, 4), 255, dtype=torch.uint8), Mask(torch.ones(4, 4, dtype=torch.uint8))
    for steps in ([{"Pad": {"padding": 2}}], [{"RandomAffine": {"degrees": 0, "translate": [1.0, 1.0]}}]):
        torch.manual_seed(3)
        seen, target = ImageTransform(steps).pair(image, mask)
        assert (target == 255).any() and torch.equal(target == 255, seen[0] == 0)
    padded, target = ImageTransform([{"Pad": {"padding": 2, "fill": 255}}]).pair(image, mask)
    assert (padded == 1).all() and (target == 255).sum() == 48


# --- whole runs --------------------------------------------------------------------------------------


def metrics_of(run: str) -> None:
    """Prints the metrics of a run, evaluated on all ranks."""
    print(json.dumps(evaluate_run(run, ["device=cpu", "eval.batch_size=4"])))


@pytest.mark.long
def test_it_learns_and_is_evaluated_exactly_by_any_number_of_processes(
    folder: Path,
    here: Callable[..., Any],
    cli: Callable[..., Finished],
    ranks: Callable[..., list[Finished]],
    tmp_path: Path,
) -> None:
    result = here(*RECIPE, "train.epochs=8", "data.train_transform=[RandomHorizontalFlip]")
    best = max(read_metrics(tmp_path / "runs/run"), key=lambda row: row.get("eval/miou", 0))
    assert result.best == {"eval/miou": best["eval/miou"]}
    assert best["eval/miou"] > 0.7 and best["eval/pixel_accuracy"] > 0.9
    alone = evaluate_run("runs/run", ["device=cpu", "eval.batch_size=4"])
    several = [ranks(count, metrics_of, "runs/run")[0].out.splitlines()[-1] for count in (2, 3)]
    for found in (alone, *map(json.loads, several)):
        assert found["eval/miou"] == best["eval/miou"]
        assert found["eval/pixel_accuracy"] == best["eval/pixel_accuracy"]
        assert found["eval/loss"] == pytest.approx(best["eval/loss"], rel=1e-6)
    predicted = cli("predict", "runs/run", "masks/val/images", "--masks", "predicted")
    assert (predicted.rc, predicted.out) == (0, "23 masks written: predicted\n"), predicted
    right = np.mean(
        [
            np.mean(np.asarray(Image.open(path)) == np.asarray(Image.open(folder / "val/masks" / path.name)))
            for path in sorted((tmp_path / "predicted").iterdir())
        ]
    )
    assert right == pytest.approx(best["eval/pixel_accuracy"], abs=1e-3)
    refused = cli("predict", "runs/run", "masks/val/images")
    assert refused.rc == 2 and "predicts masks, no classes; name a folder for them by --masks" in refused.err


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_killed_run_ends_with_the_same_bits(processes: int, folder: Path, tmp_path: Path) -> None:
    words = [*RECIPE, "data.train_transform=[{RandomCrop: {size: 32, padding: 4}}]", "train.steps=20",
             "checkpoint.every=6", "log.every=1"]  # fmt: skip
    jobs.train(tmp_path, *words, "run.name=whole", processes=processes)
    started = jobs.start(jobs.train_command(*words, "run.name=killed"), processes, tmp_path)
    rows = tmp_path / "runs/killed/metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("\n") > 9):
        assert all(rank.poll() is None for rank in started)
    for rank in started:
        os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
    jobs.train(tmp_path, *words, "run.name=killed", processes=processes)
    assert jobs.status(tmp_path, "killed")["attempts"] == 2
    assert jobs.same_bits(jobs.last(tmp_path, "whole"), jobs.last(tmp_path, "killed"))


@pytest.mark.long
def test_any_number_of_processes_gives_the_same_bits_and_a_step_is_rebuilt_by_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*RECIPE, "train.parts=4", "train.steps=6", "log.every=1", "checkpoint.every=3",
             "data.train_transform=[{RandomCrop: {size: 32, padding: 4}}]"]  # fmt: skip
    # In each part other pixels are ignored. A fused kernel rounds the last elements of a shard otherwise.
    words += ["optim.args.fused=false"]
    for processes, way in ((1, "ddp"), (2, "ddp"), (4, "ddp"), (2, "fsdp")):
        name = f"{way}{processes}"
        jobs.train(tmp_path, *words, f"run.name={name}", f"parallel.name={way}", processes=processes)
        assert jobs.same_bits(jobs.last(tmp_path, "ddp1"), jobs.last(tmp_path, name)), name
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = Path("runs/ddp2")
    losses = {row["step"]: row["train/loss"] for row in read_metrics(run) if "train/loss" in row}
    rebuilt = replay(run, 5)
    assert rebuilt.loss == pytest.approx(losses[5], rel=1e-6)
    assert [seen.rank for seen in rebuilt.samples] == [0] * 6 + [1] * 6
    assert sum(seen.loss for seen in rebuilt.samples) / 12 == pytest.approx(losses[5], rel=0.1)
    picture(rebuilt, Path("step.png"))
    assert Path("step.png").exists()


def test_ignored_pixels_change_nothing(folder: Path, here: Callable[..., Any], tmp_path: Path) -> None:
    """What is in an image where its mask is 255 counts in no metric."""
    here(*RECIPE, "train.steps=1", "run.name=one")
    before = evaluate_run("runs/one", ["device=cpu"])
    image = Image.new("L", (32, 32))
    image.save(folder / "val/images/ignored.png")
    mask_file(np.full((32, 32), 255, np.uint8)).save(folder / "val/masks/ignored.png")
    after = evaluate_run("runs/one", ["device=cpu"])
    assert after == pytest.approx(before, rel=1e-12)
    assert len(list((folder / "val/images").iterdir())) == 24
    assert read_metrics(tmp_path / "runs/one")[-1]["eval/miou"] == before["eval/miou"]


@pytest.mark.long
def test_samples_show_each_mask_under_its_image(folder: Path, cli: Callable[..., Finished]) -> None:
    drawn = cli("samples", *RECIPE, "train.epochs=1", "--count", 4)
    assert drawn.rc == 0, drawn
    assert np.asarray(Image.open(folder.parent / "samples.png").convert("HSV"))[..., 1].max() > 100  # colors


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.startswith("lraspp") else pytest.mark.long)
        for name in models.segmentation_models()
    ],
)
def test_each_segmentation_model_of_torchvision_goes_by_its_name(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name, {}, (1, 64, 64), 5).eval()
        assert model(torch.zeros(2, 1, 64, 64))["out"].shape == (2, 5, 64, 64)
        models.replace_heads(model, 7)
        assert model(torch.zeros(2, 1, 64, 64))["out"].shape == (2, 7, 64, 64)


def test_a_set_of_ones_own_may_give_masks(here: Callable[..., Any], tmp_path: Path) -> None:
    images = torch.rand(24, 1, 16, 16)
    pairs = [(image, Mask((image[0] > 0.5).long())) for image in images]
    words = [word for word in RECIPE if not word.startswith("data.")]
    result = here(*words, "data.workers=0", "train.epochs=30", model=models.unet(1, 2, (8,)),
                  train_data=pairs, eval_data=pairs)  # fmt: skip
    assert result.metrics["eval/miou"] > 0.9


def test_masks_are_kept_with_their_images_and_a_run_has_the_same_bits(
    folder: Path, here: Callable[..., Any], tmp_path: Path
) -> None:
    words = [*RECIPE, "train.steps=4", "data.train_transform=[RandomHorizontalFlip]", "data.cache_dir=kept"]
    here(*words, "run.name=plain")
    here(*words, "run.name=kept", "data.cache=disk")
    assert jobs.same_bits(jobs.last(tmp_path, "plain"), jobs.last(tmp_path, "kept"))
    files = image_masks("masks", classes=NAMES, channels=1)
    assert files
    kept = kept_in(files, tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2  # of the run's two sets
    pixels = kept.folder / "pixels"
    whole = pixels.read_bytes()
    pixels.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of a mask
    for index in range(len(files)):
        (image, mask), (wanted, as_wanted) = kept[index], files[index]
        assert torch.equal(image, wanted) and torch.equal(mask, as_wanted) and type(mask) is Mask
    assert pixels.read_bytes() == whole
    os.utime(folder / "train/masks" / kept.path(0).name, (1, 1))
    assert kept_in(files, tmp_path / "kept").folder != kept.folder
    with pytest.raises(UserError, match=r"data.cache_size: masks are kept as large as they are"):
        here(*words, "run.name=small", "data.cache_size=16")


@pytest.mark.long
def test_an_exported_model_gives_the_metrics_and_masks_of_its_run(
    folder: Path, here: Callable[..., Any], tmp_path: Path
) -> None:
    """As weights, and as a program of ONNX where its packages are here."""
    here(*RECIPE, "train.steps=8", "data.mean=[0.2]", "data.std=[0.3]")
    metrics, images = evaluate_run("runs/run"), [folder / "val/images"]
    masks = predict_masks("runs/run", images, tmp_path / "drawn")[0]
    assert len(masks) == 23
    for kind in ("safetensors", *(["onnx"] if find_spec("onnxscript") else [])):
        done = export("runs/run", kind, preprocess=kind != "safetensors")
        assert done.difference <= 1e-5
        again = evaluate_run(done.path, trust=True)
        assert again == pytest.approx(metrics, abs=1e-5)
        drawn = predict_masks(done.path, images, tmp_path / kind, trust=True)[0]
        assert [path.read_bytes() for path in drawn] == [path.read_bytes() for path in masks]
