"""Color, erasing and mixing of whole batches: torchvision's pixels, by numbers drawn for each sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from dist_train import data
from dist_train.config import UserError
from dist_train.data.augment import Augment, CutMix, MixUp, erased_boxes, jittered, split
from dist_train.data.batch import Batch
from dist_train.data.draws import beta, uniform
from dist_train.data.normalize import Normalization
from dist_train.data.order import Part
from dist_train.record.history import read_metrics
from dist_train.tasks import Classification
from dist_train.tools.replay import replay
from tests.distributed.ranks import last, same_bits
from tests.processes import Finished
from tests.test_data import config
from tests.warm import Process
from tests.worlds import SMALL

CLASSES = 5
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
NORMALIZE = Normalization(*(tuple(values.flatten().tolist()) for values in (MEAN, STD)))


def images(count: int, channels: int = 3, height: int = 12, width: int = 16) -> torch.Tensor:
    """Random ones `[B, C, H, W]` from 0 to 1."""
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(count))


def batch(inputs: torch.Tensor, first: int = 0) -> Batch:
    """Images of the samples from `first` on, whose classes are 0, 1, ... in turn."""
    indices = np.arange(first, first + len(inputs))
    return Batch(inputs, torch.from_numpy(indices % CLASSES), Part(0, 2, indices, len(indices), len(indices)))


def one_hot(targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(targets, CLASSES).float()


# --- color and erasing -----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 1])
def test_color_is_changed_as_torchvision_does_it_in_an_order_of_each_image(channels: int) -> None:
    seen = images(80, channels)
    drawn = uniform(0, 0, np.arange(80), "color", 6)
    jitter = v2.ColorJitter(brightness=0.5, contrast=(0.2, 0.9), saturation=0.7)
    plain = torch.zeros(1), torch.ones(1)
    ours = jittered(seen, jitter, lambda count: drawn[:, :count], *plain)
    changes = [
        v2.functional.adjust_brightness,
        v2.functional.adjust_contrast,
        v2.functional.adjust_saturation,
    ]
    limits = [(0.5, 1.5), (0.2, 0.9), (0.3, 1.7)]
    count = 3 if channels == 3 else 2  # grey has no saturation
    orders = set()
    for row, numbers in enumerate(drawn[:, : 2 * count]):
        expected, order = seen[row], tuple(numbers[:count].argsort().tolist())
        for which in order:
            low, high = limits[which]
            expected = changes[which](expected, low + numbers[count + which] * (high - low))
        assert torch.allclose(ours[row], expected, atol=2e-6), row
        orders.add(order)
    assert orders == set(itertools.permutations(range(count)))
    normal = jittered(
        (seen - 0.4) / 0.3, jitter, lambda count: drawn[:, :count], plain[1] * 0.4, plain[1] * 0.3
    )
    assert torch.allclose(normal * 0.3 + 0.4, ours, atol=1e-5)
    assert torch.equal(jittered(seen, v2.ColorJitter(), lambda count: drawn[:, :count], *plain), seen)


def test_boxes_to_erase_are_spread_as_those_of_torchvision() -> None:
    erasing, count, (height, width) = v2.RandomErasing(0.7, scale=(0.02, 0.5)), 3000, (20, 30)
    top, left, bottom, right = erased_boxes(
        (count, 3, height, width), erasing, lambda n: uniform(0, 0, np.arange(count), "erase", n)
    )
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= height).all() and (right <= width).all()
    ours = np.stack([top, left, bottom - top, right - left], 1)
    erased = ours[:, 2] > 0
    assert abs(erased.mean() - 0.7) < 5 * (0.21 / count) ** 0.5
    torch.manual_seed(0)
    made = [
        v2.RandomErasing(1, scale=(0.02, 0.5)).make_params([torch.empty(3, height, width)])
        for _ in range(count)
    ]
    theirs = np.array([[box[name] for name in "ijhw"] for box in made if box["v"] is not None])
    ours = ours[erased]
    error = np.sqrt(theirs.var(0) / len(theirs) + ours.var(0) / len(ours))
    assert (abs(theirs.mean(0) - ours.mean(0)) < 5 * error).all()
    assert np.allclose(theirs.std(0), ours.std(0), rtol=0.1)


def test_an_erased_box_has_the_value_that_it_had_before_normalization() -> None:
    before = images(40)
    erase = Augment([("RandomErasing", v2.RandomErasing(0.5, value=[0.1, 0.2, 0.3]))], 0, CLASSES, NORMALIZE)
    after = erase(batch((before - MEAN) / STD)).inputs * STD + MEAN
    changed = (after - before).abs().amax(1) > 1e-6  # [B, H, W]
    assert 5 < changed.flatten(1).any(1).sum() < 35
    for row, mask in enumerate(changed):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask.sum() == len(rows) * len(columns)  # a box
        value = torch.tensor([0.1, 0.2, 0.3])[:, None].expand(3, int(mask.sum()))
        assert torch.allclose(after[row][:, mask], value, atol=1e-6)


# --- mixing ----------------------------------------------------------------------------------------


def test_mixup_lays_each_image_over_its_neighbour_and_the_targets_tell_how_much() -> None:
    given = batch(images(8))
    mixed = Augment([("MixUp", MixUp(0.4))], 3, CLASSES)(given)
    own = beta(0.4, uniform(3, 2, np.arange(8), "mix", 4)[:, 1])
    for row, share in enumerate(own.tolist()):
        other = row + 1 if row % 2 == 0 else row - 1
        expected = share * given.inputs[row] + (1 - share) * given.inputs[other]
        assert torch.allclose(mixed.inputs[row], expected, atol=1e-6)
        target = share * one_hot(given.targets[row]) + (1 - share) * one_hot(given.targets[other])
        assert torch.allclose(mixed.targets[row], target, atol=1e-6)


def test_cutmix_gives_each_image_a_box_of_its_neighbour_and_the_targets_tell_its_share() -> None:
    given = batch(images(60))
    mixed = Augment([("CutMix", CutMix())], 3, CLASSES)(given)
    neighbours = given.inputs[torch.arange(60) ^ 1]
    foreign = (mixed.inputs == neighbours).all(1)  # [B, H, W]
    assert ((mixed.inputs == given.inputs).all(1) ^ foreign).all()
    shares = foreign.float().mean((1, 2))
    for row, mask in enumerate(foreign):
        assert mask.sum() == mask.any(1).sum() * mask.any(0).sum()  # a box
        own, other = one_hot(given.targets[row]), one_hot(given.targets[row ^ 1])
        assert torch.allclose(mixed.targets[row], (1 - shares[row]) * own + shares[row] * other, atol=1e-6)
    assert shares.max() > 0.6 and 0.2 < shares.mean() < 0.5


def test_of_both_each_sample_draws_one() -> None:
    given = batch(images(200))
    mixed = Augment([("MixUp", MixUp(1.0)), ("CutMix", CutMix())], 0, CLASSES)(given)
    neighbours = given.inputs[torch.arange(200) ^ 1]
    cut = ((mixed.inputs == given.inputs) | (mixed.inputs == neighbours)).flatten(1).all(1)
    assert 60 < cut.sum() < 140
    assert torch.allclose(mixed.targets.sum(1), torch.ones(200), atol=1e-6)


def test_a_last_odd_sample_is_mixed_with_the_one_before_it_and_a_single_one_stays() -> None:
    steps = [("MixUp", MixUp(1.0))]
    given = batch(images(5))
    mixed = Augment(steps, 3, CLASSES)(given)
    share = beta(1.0, uniform(3, 2, np.arange(5), "mix", 4)[:, 1])[4]
    assert torch.allclose(mixed.inputs[4], share * given.inputs[4] + (1 - share) * given.inputs[3], atol=1e-6)
    alone = Augment(steps, 3, CLASSES)(batch(given.inputs[:1]))
    assert torch.allclose(alone.inputs, given.inputs[:1], atol=1e-6)
    assert torch.allclose(alone.targets, one_hot(given.targets[:1]), atol=1e-6)


ALL = [
    ("ColorJitter", v2.ColorJitter(0.4, 0.4, 0.4)),
    ("RandomErasing", v2.RandomErasing(0.5)),
    ("MixUp", MixUp(0.2)),
    ("CutMix", CutMix()),
]


def test_what_is_done_to_a_sample_is_the_same_in_any_even_part_and_new_in_each_epoch() -> None:
    augment, inputs = Augment(ALL, 3, CLASSES, NORMALIZE), images(24)
    whole = augment(batch(inputs))
    for first, count in ((0, 12), (4, 2), (12, 12)):
        part = augment(batch(inputs[first : first + count], first))
        assert torch.allclose(part.inputs, whole.inputs[first : first + count], atol=1e-5)
        assert torch.equal(part.targets, whole.targets[first : first + count])
    given = batch(inputs)
    later = augment(given._replace(part=given.part._replace(epoch=3)))
    assert (later.inputs != whole.inputs).flatten(1).any(1).all()
    kept = inputs.to(memory_format=torch.channels_last)
    changed = augment(batch(kept)).inputs
    assert torch.equal(changed, whole.inputs) and changed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_mixture_is_the_mixture_of_the_losses(smoothing: float) -> None:
    given = batch(images(10))
    mixed = Augment(ALL[2:], 0, CLASSES)(given)
    scores = torch.randn(10, CLASSES, generator=torch.Generator().manual_seed(0))
    loss = Classification(label_smoothing=smoothing).loss(scores, mixed.targets)
    a, b = given.targets, given.targets[torch.arange(10) ^ 1]
    share = mixed.targets[torch.arange(10), a]
    each = [cross_entropy(scores, y, reduction="none", label_smoothing=smoothing) for y in (a, b)]
    assert torch.allclose(loss, share * each[0] + (1 - share) * each[1], atol=1e-5)


# --- in a run --------------------------------------------------------------------------------------

CONFIGURED = (
    "data.train_transform=[RandomHorizontalFlip,{ColorJitter: {brightness: 0.4, contrast: 0.4}},"
    "{RandomErasing: {p: 0.5}},{MixUp: {alpha: 0.4}},{CutMix: {alpha: 1.0}}]"
)
JOB = [*SMALL, CONFIGURED, "data.mean=[0.4]", "data.std=[0.3]", "task.args.label_smoothing=0.1",
       "model.name=cnn", "model.args={widths: [4, 4], dropout: 0.2}", "train.ema=0.9", "train.parts=2",
       "log.every=1", "checkpoint.every=4"]  # fmt: skip


@pytest.mark.long
def test_a_run_has_the_same_bits_on_two_ranks_after_kills_and_when_replayed(
    npz: Path,
    ranks: Callable[..., list[Finished]],
    begin_ranks: Callable[..., list[Process]],
    here: Callable[..., Any],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    """An epoch of 90 samples ends with a batch of 10: two parts of 5, in which the last one is odd."""
    here(*JOB, "run.name=one")
    first = ranks(2, "train", *JOB, "run.name=two")
    assert [rank.rc for rank in first] == [0, 0], first[0]
    assert "ColorJitter, RandomErasing, MixUp, CutMix: done to whole batches, on the device" in first[0].err
    killed = begin_ranks(2, "train", *JOB, "run.name=killed", "train.steps=12")
    metrics = tmp_path / "runs/killed/metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 5' in metrics.read_text(), killed[0])
    for rank in killed:
        rank.kill()
        rank.wait()
    here(*JOB, "run.name=killed")  # on one process
    for name in ("two", "killed"):
        assert same_bits(last(tmp_path, "one"), last(tmp_path, name)), name
    losses = {
        row["step"]: row["train/loss"] for row in read_metrics(tmp_path / "runs/two") if "train/loss" in row
    }
    for step in (3, 6):  # 6: the short batch
        replayed = replay(Path("runs/two"), step)
        assert replayed.loss == losses[step], step
    shown = [seen.label for seen in replayed.samples]
    assert any(" + " in label and "0." in label for label in shown), shown
    plain = data.build(config(data={"name": "arrays", "root": str(npz), "mean": [0.4], "std": [0.3]}))
    sample, seen = replayed.samples[0].sample, replayed.samples[0].image
    assert seen is not None and not torch.equal(seen, plain.train.sample(sample, 0)[0])


def test_evaluation_sees_images_and_classes_as_they_are(npz: Path) -> None:
    source = {"name": "arrays", "root": str(npz), "workers": 0}
    mixed = data.build(config(data=source | {"train_transform": ["MixUp"]}))
    assert data.first_batch(mixed.train).targets.shape == (2, 3)
    assert data.first_batch(mixed.eval).targets.shape == (2,)
    assert mixed.train.is_batched  # and what comes before is as quick as without


def test_colors_that_images_do_not_have_are_refused() -> None:
    erase = Augment([("RandomErasing", v2.RandomErasing(value=[0.1, 0.2, 0.3]))], 0, CLASSES)
    with pytest.raises(UserError, match="RandomErasing has 3 values, but the images have 1 channel"):
        erase(batch(images(4, channels=1)))
    with pytest.raises(UserError, match="ColorJitter needs 1 or 3 channels, not 2"):
        Augment(ALL[:1], 0, CLASSES)(batch(images(4, channels=2)))


def test_what_torchvision_alone_can_do_is_left_to_it() -> None:
    def done(*names: Any, lift: bool = True) -> tuple[int, list[str]]:
        single, batched = split(names, lift, "data.train_transform")
        return len(single), [name for name, _ in batched]

    assert done("RandomErasing", "RandomCrop") == (2, [])  # something comes after it
    assert done("RandomErasing", "ColorJitter", "CutMix") == (0, ["RandomErasing", "ColorJitter", "CutMix"])
    assert done({"ColorJitter": {"hue": 0.1}}, "RandomErasing") == (1, ["RandomErasing"])
    assert done({"RandomErasing": {"value": "random"}}, "MixUp") == (1, ["MixUp"])
    assert done("RandomErasing", "MixUp", lift=False) == (1, ["MixUp"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train_transform": ["MixUp", "RandomErasing"]},
            r"train_transform\[0\]: MixUp mixes samples; it stands once",
        ),
        ({"train_transform": ["MixUp", "MixUp"]}, r"train_transform\[0\]: MixUp mixes samples"),
        ({"eval_transform": ["CutMix"]}, r"eval_transform\[0\]: CutMix mixes samples"),
        ({"train_transform": [{"MixUp": {"alpha": 0}}]}, "alpha must be above 0, not 0"),
        (
            {"train_transform": [{"CutMix": {"num_classes": 3}}]},
            "CutMix has no such argument; it takes alpha",
        ),
        ({"train_transform": [{"RandomErasing": {"pp": 1}}]}, "RandomErasing has no such argument"),
    ],
)
def test_mistakes_are_one_sentence(npz: Path, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.build(config(data={"name": "arrays", "root": str(npz)} | options))


def test_targets_and_tasks_that_do_not_fit_to_mixtures_are_refused(
    small: list[str], here: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "def half(label):\n    return label / 2\n"
        "class Regression:\n    best = 'min eval/loss'\n"
        "    def loss(self, outputs, targets):\n        return (outputs[:, 0] - targets) ** 2\n"
        "    def metrics(self, outputs, targets):\n        return {}\n"
        "from dist_train.tasks import Classification\n"
        "class Hard(Classification):\n"
        "    def loss(self, outputs, targets):\n"
        "        return -outputs.log_softmax(1)[range(len(targets)), targets]\n"
    )
    job = [
        *small,
        "data.train_transform=[MixUp]",
        "data.target_transform=mine:half",
        "task.name=mine:Regression",
    ]
    with pytest.raises(
        UserError, match=r"'Hard' can't take outputs .* and targets \[\d+, 3\] of torch.float32"
    ):
        here(*small, "data.train_transform=[MixUp]", "task.name=mine:Hard")
    with pytest.raises(UserError, match="MixUp mix classes; they need a class for each image"):
        here(*job)
