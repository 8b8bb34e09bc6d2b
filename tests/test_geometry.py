"""Crops, flips and sizes: torchvision's own pixels, by numbers that are drawn for each sample."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dist_train.data import geometry
from dist_train.data.draws import uniform
from dist_train.data.transforms import ImageTransform


def image(height: int, width: int, channels: int = 3) -> torch.Tensor:
    """A smooth random image uint8 `[C, H, W]`, in memory `[H, W, C]` as decoders give it."""
    coarse = torch.rand(1, channels, 5, 6, generator=torch.Generator().manual_seed(height)) * 255
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)
    return fine[0].byte().permute(1, 2, 0).contiguous().permute(2, 0, 1)


@pytest.mark.parametrize(
    "steps",
    [
        [{"Resize": {"size": 20}}, {"CenterCrop": {"size": 16}}],
        [{"Resize": {"size": [17, 40]}}],
        [{"Resize": {"size": 20, "max_size": 24}}],
        [{"Resize": {"size": None, "max_size": 24}}],
        [{"Resize": {"size": 20, "interpolation": "bicubic"}}, {"CenterCrop": {"size": [30, 16]}}],
    ],
    ids=str,
)
def test_evaluation_gives_the_pixels_of_torchvision(steps: list[Any]) -> None:
    transform = ImageTransform(steps)
    torchvisions = v2.Compose([getattr(v2, name)(**args) for step in steps for name, args in step.items()])
    for size in ((37, 50), (51, 29), (32, 32)):
        seen, expected = transform.geometry(image(*size)), torchvisions(image(*size))
        assert seen.shape == expected.shape
        assert (seen.int() - expected.int()).abs().max() <= 1, size


def test_training_does_to_an_image_what_torchvision_does_with_the_same_box() -> None:
    steps = [
        {"RandomResizedCrop": {"size": [12, 14], "scale": [0.2, 0.9]}},
        {"RandomHorizontalFlip": {"p": 1}},
    ]
    transform = ImageTransform(steps)
    original = image(40, 53)
    drawn = transform.drawn(3, 1, np.arange(20))
    for row in drawn:
        box = geometry.resized_box(40, 53, row[:-1].tolist(), (0.2, 0.9), (3 / 4, 4 / 3))
        expected = v2.functional.hflip(v2.functional.resized_crop(original, *box, [12, 14]))
        seen = transform.batch(geometry.as_batch(original), row[None])[0]
        assert (seen.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(40, 60), (10, 90), (90, 10)], ids=str)
def test_boxes_are_spread_as_those_of_torchvision(size: tuple[int, int]) -> None:
    torchvisions = v2.RandomResizedCrop(8)
    torch.manual_seed(0)
    like = [torch.empty(1, *size)]
    made = [torchvisions.make_params(like) for _ in range(1500)]
    theirs = np.array([[box[name] for name in ("top", "left", "height", "width")] for box in made])
    rows = uniform(0, 0, np.arange(1500), "geometry", 22).tolist()
    ours = np.array([geometry.resized_box(*size, row, (0.08, 1), (3 / 4, 4 / 3)) for row in rows])
    assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    error = np.sqrt((theirs.var(0) + ours.var(0)) / 1500)
    assert (abs(theirs.mean(0) - ours.mean(0)) <= 5 * error).all()
    assert np.allclose(theirs.std(0), ours.std(0), rtol=0.15, atol=0.01)


def test_crops_and_flips_move_pixels_and_change_none() -> None:
    crop = {"RandomCrop": {"size": [9, 7], "padding": [1, 2], "fill": 7}}
    transform = ImageTransform([crop, "RandomVerticalFlip"])
    original = image(8, 7, 1)
    padded = v2.functional.pad(original, [1, 2], fill=7)
    crops = [padded[:, top : top + 9, left : left + 7] for top in range(4) for left in range(3)]
    possible = {crop.numpy().tobytes() for crop in [*crops, *(crop.flip(-2) for crop in crops)]}
    drawn = transform.drawn(0, 0, np.arange(300))
    transform = pickle.loads(pickle.dumps(transform))  # as it is sent to a worker that is not forked
    whole = transform.batch(original.expand(300, 1, 8, 7), drawn)
    assert {one.numpy().tobytes() for one in whole} == possible  # each of them, and nothing else
    for row in range(5):
        assert torch.equal(transform.batch(geometry.as_batch(original), drawn[row : row + 1])[0], whole[row])
    if_needed = ImageTransform([{"RandomCrop": {"size": 12, "pad_if_needed": True}}])
    assert if_needed.batch(original[None], if_needed.drawn(0, 0, np.arange(1))).shape == (1, 1, 12, 12)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("RandAugment", {}),
        ("RandomCrop", {"size": 4, "padding": 1, "padding_mode": "reflect"}),
        ("RandomResizedCrop", {"size": 4, "antialias": False}),
        ("Normalize", {"mean": [0.5], "std": [0.5], "inplace": True}),
    ],
)
def test_what_is_not_done_by_numbers_is_left_to_torchvision(name: str, args: Any) -> None:
    transform = ImageTransform(["RandomHorizontalFlip", {name: args}])
    assert not transform.is_keyed and transform.not_keyed == name
