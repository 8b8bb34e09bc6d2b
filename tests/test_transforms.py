"""What is done to each image: named in the configuration, and random by seed, epoch and sample alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dist_train import data
from dist_train.config import UserError
from dist_train.data.transforms import ImageTransform, target_transform
from tests.test_data import config, everything, rank

RANDOM: list[Any] = [
    {"RandomResizedCrop": {"size": [8, 8]}},
    "RandomHorizontalFlip",
    {"ColorJitter": {"brightness": 0.5}},
]


def epochs(root: Path, name: str, transform: list[Any], workers: int, batch: int = 7) -> list[torch.Tensor]:
    """The training images of two epochs as the model gets them, sorted by sample."""
    setup = config(
        data={"name": name, "root": str(root), "train_transform": transform, "workers": workers},
        train={"epochs": 2, "batch_size": batch},
    )
    sets = data.build(setup)
    steps = sets.steps_per_epoch(setup)
    images = []
    for start in (0, steps):
        loader = sets.train_loader(setup, rank(), start, start + steps)
        batches = [batch.to(torch.device("cpu")) for batch in loader]
        order = np.concatenate([batch.part.indices for batch in batches])
        inputs = torch.cat([batch.inputs for batch in batches])
        images.append(inputs[torch.from_numpy(np.argsort(order))])
    return images


@pytest.mark.parametrize("name", ["arrays", "image_folder"])
def test_random_transforms_are_the_same_in_any_worker_and_batch_and_new_in_each_epoch(
    name: str, npz: Path, image_folder: Path
) -> None:
    root = npz if name == "arrays" else image_folder
    first, second = epochs(root, name, RANDOM, workers=0)
    for workers, batch in ((2, 7), (0, 30)):
        again = epochs(root, name, RANDOM, workers, batch)
        assert torch.equal(first, again[0])
        assert torch.equal(second, again[1])
    differing = (first != second).flatten(1).any(1).float().mean()
    assert differing > 0.9
    among = [(image != first[0]).any() for image in first[3::3]]  # others of the same class
    assert all(among)


def test_transforms_of_ones_own_that_draw_from_random_and_numpy_are_keyed_too(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_noise.py").write_text(
        "import random, numpy, torch\n"
        "def noisy(image):\n"
        "    drawn = [random.random(), numpy.random.random(), torch.rand(()).item()]\n"
        "    return torch.tensor(drawn).view(3, 1, 1).expand(image.shape)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    first, second = epochs(image_folder, "image_folder", ["own_noise:noisy"], workers=0)
    random.seed(1)
    np.random.seed(1)
    again, _ = epochs(image_folder, "image_folder", ["own_noise:noisy"], workers=2)
    assert torch.equal(first, again)
    assert (first != second).all()
    for channel in range(3):
        assert len(set(first[:, channel, 0, 0].tolist())) == 30


def test_evaluation_uses_its_own_transforms_and_training_those_when_it_has_none(npz: Path) -> None:
    small: list[Any] = [{"Resize": {"size": [4, 4]}}]
    source: dict[str, Any] = {"name": "arrays", "root": str(npz), "eval_transform": small}
    for training, expected in ((None, 4), ([], 8), ([{"Resize": {"size": [6, 6]}}], 6)):
        setup = config(data=source | {"train_transform": training})
        sets = data.build(setup)
        assert everything(sets.train_loader(setup, rank(), 0, 1))[0].shape[-1] == expected
        assert everything(sets.eval_loader(setup, rank()))[0].shape[-1] == 4


def test_the_model_is_made_for_the_images_of_evaluation_and_prediction(npz: Path) -> None:
    crop = [{"RandomResizedCrop": {"size": [6, 6]}}]
    sets = data.build(config(data={"name": "arrays", "root": str(npz), "train_transform": crop}))
    assert sets.sample_shape == (1, 8, 8)


def test_images_become_numbers_from_0_to_1_then_normalized() -> None:
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 3).expand(3, 1, 3)
    assert torch.allclose(ImageTransform()(image), torch.tensor([0, 0.2, 1]).expand(3, 1, 3))
    normalized = ImageTransform(mean=[0.0, 0.2, 1.0], std=[1.0, 0.1, 0.5])(image)
    expected = torch.tensor([[0, 0.2, 1], [-2, 0, 8], [-2, -1.6, 0]]).view(3, 1, 3)
    assert torch.allclose(normalized, expected, atol=1e-5)


def test_floating_point_images_are_taken_as_they_are() -> None:
    image = torch.full((1, 2, 2), 3.0, dtype=torch.float64)
    assert torch.equal(ImageTransform()(image), torch.full((1, 2, 2), 3.0))


def test_a_transform_is_a_name_or_a_name_with_arguments_or_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_steps.py").write_text(
        "def invert(image):\n    return 255 - image\n"
        "class Add:\n"
        "    def __init__(self, value):\n        self.value = value\n"
        "    def __call__(self, image):\n        return image + self.value\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    image = torch.arange(4, dtype=torch.uint8).view(1, 2, 2)
    steps: list[Any] = [
        {"RandomHorizontalFlip": {"p": 1}},
        {"Pad": {"padding": 1}},
        "own_steps:invert",
        {"own_steps:Add": {"value": -250}},
    ]
    seen = ImageTransform(steps).geometry(image)
    assert seen.tolist() == [[[5, 5, 5, 5], [5, 4, 5, 5], [5, 2, 3, 5], [5, 5, 5, 5]]]
    with pytest.raises(UserError, match=r"data.train_transform\[1\].valu: Add .*'value'"):
        ImageTransform(["RandomHorizontalFlip", {"own_steps:Add": {"valu": 1}}])


def test_every_transform_of_torchvision_that_needs_no_arguments_goes_by_its_name() -> None:
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    tried = 0
    for name in ("AutoAugment", "RandAugment", "TrivialAugmentWide", "AugMix", "RandomHorizontalFlip",
                 "RandomVerticalFlip", "RandomGrayscale", "RandomPhotometricDistort", "RandomEqualize",
                 "RandomAutocontrast", "RandomInvert", "RandomErasing", "Identity", "Grayscale"):  # fmt: skip
        if hasattr(v2, name):
            seen = ImageTransform([name])(image)
            assert (seen.dtype, seen.shape[1:]) == (torch.float32, (16, 16)), name
            tried += 1
    assert tried > 10


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ([["Resize", 3]], "write a transform as `Name`"),
        ([{"Resize": 3}], "arguments are `argument: value` pairs, not 3"),
        ([{"Resize": {"size": 3}, "Pad": {}}], "write a transform as `Name`"),
        ([{"Pad": {}}], "Pad.padding: Pad needs this argument"),
        (["Transform"], "torchvision.transforms.v2 has no 'Transform'"),
    ],
)
def test_a_transform_that_is_written_wrong_is_told_with_its_place(written: list[Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        ImageTransform(written, where="data.eval_transform")
    assert str(caught.value).startswith("data.eval_transform[0]")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "steps",
    [[{"RandomErasing": {"p": 1.0, "inplace": True}}], ["own_inplace:darken"], [{"Normalize": "inplace"}]],
    ids=["torchvision's", "ones own", "normalization"],
)
def test_a_transform_that_works_in_place_does_not_reach_the_data_set(
    steps: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_inplace.py").write_text(
        "def darken(image):\n    image *= 0\n    return image\n"
        "def zero(label):\n    label *= 0\n    return label\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    if steps == [{"Normalize": "inplace"}]:
        steps = [{"Normalize": {"mean": [0.5], "std": [0.5], "inplace": True}}]
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    pairs = [(image, label) for image, label in zip(images.clone(), labels.clone(), strict=True)]
    for source in (data.images.InMemory(images.clone(), labels.clone(), ["a", "b", "c"]), Own(pairs)):
        setup = config(
            data={"train_transform": steps, "target_transform": "own_inplace:zero", "workers": 0},
            train={"epochs": 2, "batch_size": 3},
        )
        sets = data.build(setup, source, source)
        everything(sets.train_loader(setup, rank(), 0, 4))
        for index in range(6):
            image, label = source[index]
            assert torch.equal(image, images[index]) and int(label) == int(labels[index])


class Own(list[Any]):
    """A data set of one's own that gives the same objects each time."""

    classes = ("a", "b", "c")


def test_torchvisions_transforms_work_on_arrays_too() -> None:
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert ImageTransform([{"Resize": {"size": [2, 2]}}])(image).shape == (1, 2, 2)
    flipped = ImageTransform([{"RandomHorizontalFlip": {"p": 1.0}}])(image)
    assert torch.allclose(flipped[0] * 255, torch.from_numpy(image[:, ::-1].copy()).float())


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [(51, torch.uint8, 0.2), (13107, torch.uint16, 0.2), (1, torch.bool, 1.0), (0.2, torch.float64, 0.2)],
)
def test_each_type_of_pixels_has_its_white(value: float, kind: torch.dtype, expected: float) -> None:
    seen = ImageTransform()(torch.full((1, 2, 2), value).to(kind))
    assert seen.dtype == torch.float32 and torch.allclose(seen, torch.tensor(expected))


@pytest.mark.parametrize("image", [torch.ones(1, 2, 2, dtype=torch.int64), Image.new("I", (2, 2)), "a.png"])
def test_pixels_whose_white_is_not_known_are_refused(image: Any) -> None:
    with pytest.raises(UserError, match=r"data: an image is of type (int64|int32|str)"):
        ImageTransform()(image)


def test_targets_can_become_vectors_or_whatever_ones_own_function_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_hot = target_transform("one_hot", 3)
    assert one_hot is not None
    assert one_hot(2).tolist() == one_hot(np.int32(2)).tolist() == [0.0, 0.0, 1.0]
    with pytest.raises(UserError, match="one_hot takes numbers of classes, but the labels are floats"):
        one_hot(torch.tensor([0.0, 1.0]))
    assert target_transform(None, 3) is None
    (tmp_path / "own_targets.py").write_text("def half(label):\n    return label / 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    half = target_transform("own_targets:half", 3)
    assert half is not None
    assert half(3) == 1.5
