"""What recipes are made of: losses for mixed images, transforms of transforms, noise of a model's depth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train import fit, load
from dist_train.config import UserError, from_file
from dist_train.data.transforms import ImageTransform
from dist_train.predict import evaluate_run
from dist_train.tasks import Classification
from tests.distributed.ranks import last, same_bits
from tests.processes import REPO, Finished
from tests.worlds import SMALL, pictures

# --- the recipes for 94 % and more -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["fashion_mnist_94", "fashion_mnist_wide"])
def test_the_longer_recipes_take_steps_and_learn(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (x_train, y_train), (x_test, y_test) = pictures(96, 28), pictures(12, 28, seed=1)
    np.savez("arrays.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    small = [*SMALL, "train.epochs=null", "model.args.widths=[8, 16, 16]"]
    result = fit(load([REPO / f"configs/{name}.yaml"], small))
    assert result.metrics["eval/accuracy"] == 1


# --- binary cross-entropy --------------------------------------------------------------------------


def test_bce_asks_for_each_class_whether_it_is_there() -> None:
    scores = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    there, not_there = -scores.sigmoid().log(), -(-scores).sigmoid().log()
    task = Classification(loss="bce")
    by_hand = (there[0, 1] + not_there[0, [0, 2, 3]].sum()) / 4
    assert torch.allclose(task.loss(scores, torch.tensor([1])), by_hand)
    assert torch.allclose(task.loss(scores, torch.tensor([[0.0, 1.0, 0.0, 0.0]])), by_hand)
    mixed = torch.tensor([[0.7, 0.3, 0.0, 0.0]])
    each = mixed * there + (1 - mixed) * not_there
    assert torch.allclose(task.loss(scores, mixed), each.mean(1))
    smoothed = Classification(0.2, loss="bce").loss(scores, mixed)
    soft = 0.8 * mixed + 0.05
    assert torch.allclose(smoothed, (soft * there + (1 - soft) * not_there).mean(1))


def test_with_a_threshold_a_class_of_a_mixture_is_there_or_not() -> None:
    scores = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    task = Classification(0.1, loss="bce", threshold=0.2)
    mixed = torch.tensor([[0.75, 0.25, 0.0], [0.9, 0.1, 0.0]])
    there = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(task.loss(scores, mixed), Classification(loss="bce").loss(scores, there))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"loss": "mse"}, "loss is cross_entropy or bce, not 'mse'"),
        ({"threshold": 0.2}, "threshold goes with loss=bce"),
        ({"loss": "bce", "threshold": 1.0}, "from 0 to below 1, not 1.0"),
    ],
)
def test_losses_that_there_are_not_are_told(args: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Classification(**args)


# --- transforms ------------------------------------------------------------------------------------


def test_a_transform_that_is_made_of_others_takes_their_names() -> None:
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8).repeat(3, 1, 1)
    choice = {"RandomChoice": {"transforms": [{"RandomSolarize": {"threshold": 0, "p": 1}}, "RandomInvert"]}}
    inside = {"RandomApply": {"transforms": [{"CenterCrop": {"size": 4}}], "p": 1.0}}
    made = ImageTransform([choice, inside])
    torch.manual_seed(0)
    seen = {tuple(made.geometry(image).flatten().tolist()) for _ in range(20)}
    crop = image[:, 2:6, 2:6]
    assert seen == {tuple(crop.flatten().tolist()), tuple((255 - crop).flatten().tolist())}
    with pytest.raises(UserError, match=r"data.train_transform\[0\].RandomChoice\[1\]: .* has no 'Flip'"):
        ImageTransform([{"RandomChoice": {"transforms": ["RandomInvert", "Flip"]}}])


def test_names_within_a_transform_of_a_file_are_not_followed_either() -> None:
    inner = {"RandomApply": {"transforms": ["RandomInvert", "os:system"]}}
    values = {"data": {"train_transform": [{"RandomChoice": {"transforms": [inner]}}]}}
    place = r"data.train_transform\[0\].RandomChoice\[0\].RandomApply\[1\]: 'os:system' would be imported"
    with pytest.raises(UserError, match=place):
        from_file(values, Path("file.pt"), needed=["data."])


# --- in a run --------------------------------------------------------------------------------------

JOB = [
    *SMALL, "train.batch_size=8", "train.steps=4", "train.parts=2", "log.every=1", "eval.every=4",
]  # fmt: skip


@pytest.mark.long
def test_random_transforms_have_the_same_bits_in_worker_processes_and_on_two_ranks_that_go_on(
    npz: Path, ranks: Callable[..., list[Finished]], here: Callable[..., Any], tmp_path: Path
) -> None:
    transforms = "[{RandAugment: {num_ops: 2, magnitude: 20}}, TrivialAugmentWide, RandomErasing]"
    job = [*JOB, f"data.train_transform={transforms}", "task.args.loss=bce"]
    here(*job, "run.name=one", "data.workers=1")
    here(*job, "run.name=plain", "data.train_transform=null")
    for steps in (2, 4):
        done = ranks(2, "train", *job, "run.name=two", f"train.steps={steps}")
        assert [rank.rc for rank in done] == [0, 0], done[0].err
    assert same_bits(last(tmp_path, "one"), last(tmp_path, "two"))
    assert not same_bits(last(tmp_path, "one"), last(tmp_path, "plain"))


def test_stochastic_depth_is_keyed_by_the_part_and_is_off_in_evaluation(
    npz: Path, ranks: Callable[..., list[Finished]], here: Callable[..., Any], tmp_path: Path
) -> None:
    """Of a tiny Swin of torchvision, with dropout besides: both by `model.args`."""
    args = "patch_size: [2, 2], embed_dim: 8, depths: [2, 1], num_heads: [1, 2], window_size: [2, 2]"
    noise = "stochastic_depth_prob: 0.5, dropout: 0.1"
    job = [*JOB, "data.eval_transform=[{Grayscale: {num_output_channels: 3}}]", "checkpoint.every=4"]
    job.append("model.name=torchvision.models:SwinTransformer")
    noisy = [*job, f"model.args={{{args}, {noise}}}"]
    here(*noisy, "run.name=one")
    here(*job, f"model.args={{{args}, stochastic_depth_prob: 0, dropout: 0.1}}", "run.name=deep")
    assert [rank.rc for rank in ranks(2, "train", *noisy, "run.name=two")] == [0, 0]
    one = last(tmp_path, "one")
    assert same_bits(one, last(tmp_path, "two"))
    assert not same_bits(one, last(tmp_path, "deep"))
    assert evaluate_run("runs/one") == one["metrics"]
