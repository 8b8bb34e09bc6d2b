"""Data: from the configuration to the batches of this rank.

    source.py      what a data set offers         order.py       which of its samples a step reads
    sources.py     data sets by name              samples.py     the batches made of them
    transforms.py  what is done to each image     batch.py       what a batch is
    labels.py      what a label may be            loader.py      fetching batches ahead of time
    draws.py       random numbers of a batch      feed.py        batches on their way to the device
    geometry.py    crops, flips and sizes         decode.py      JPEGs to pixels
    augment.py     what is done to batches there  normalize.py   pixels to numbers
    cache.py       images decoded once
    shards.py      images in tar files            windows.py     their order
    remote.py      files behind a URL

`build` is the face of the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset

from dist_train.config import Config, UserError
from dist_train.data.augment import Augment, split
from dist_train.data.batch import Batch
from dist_train.data.cache import with_cache
from dist_train.data.feed import Feed
from dist_train.data.labels import Labels
from dist_train.data.loader import described, make_loader, recorded
from dist_train.data.order import DistributedSampler, EvalSampler, Order, Part, steps_per_epoch
from dist_train.data.remote import Downloads
from dist_train.data.samples import Samples
from dist_train.data.source import Source, View
from dist_train.data.sources import open_source
from dist_train.data.transforms import ImageTransform, target_transform
from dist_train.nested import tensors
from dist_train.parts import default_parts, part_size
from dist_train.runtime import Runtime
from dist_train.seeds import generator, key

__all__ = [
    "Batch",
    "Data",
    "Feed",
    "ImageTransform",
    "Samples",
    "Source",
    "build",
    "described",
    "eval_transform",
    "first_batch",
    "opened",
    "recorded",
    "train_transforms",
]


@dataclass(frozen=True)
class Data:
    """The two sets of a run, and what the model must know about them."""

    train: Samples
    eval: Samples
    classes: list[str]
    sample_shape: tuple[int, ...]  # of one image in evaluation and prediction: (C, H, W); of several inputs
    train_shape: tuple[int, ...]  # the first; and the same of one in training: perhaps a crop
    notes: list[str]  # one line each, for the user

    def steps_per_epoch(self, config: Config) -> int:
        """Optimizer steps in an epoch."""
        return steps_per_epoch(len(self.train), config.train.batch_size, config.data.drop_last)

    def total_steps(self, config: Config) -> int:
        """Optimizer steps of the whole run."""
        return config.train.steps or (config.train.epochs or 0) * self.steps_per_epoch(config)

    def known(self, index: int) -> dict[str, Any]:
        """What a training sample is known by: its number, and the path of its file if it has one."""
        name = self.train.name(index)
        return {"sample": index} | ({} if name.startswith("sample ") else {"path": name})

    def order(self, config: Config) -> Order:
        """Which samples each step reads."""
        options = config.data
        return Order(
            len(self.train),
            config.train.batch_size,
            config.seed,
            options.shuffle,
            options.drop_last,
            self.train.source.groups(),
        )

    def train_loader(
        self, config: Config, runtime: Runtime, start: int, stop: int, parts: int | None = None
    ) -> Iterable[Batch]:
        """This rank's parts of the optimizer steps from `start` to `stop`.

        Args:
            parts: into which each global batch is cut; by default as a new run cuts it.
        """
        parts, size = _parts(config, runtime, parts)
        order = self.order(config)
        steps, soon = range(start, stop), self.train.source.soon
        sampler = DistributedSampler(order, steps, parts, runtime.rank, runtime.world_size, soon)
        return make_loader(self.train, sampler, config, runtime, _bytes(size, self.train_shape))

    def train_feed(
        self, config: Config, runtime: Runtime, start: int, stop: int, parts: int | None = None
    ) -> Feed:
        """The same on the device, as the model sees them."""
        loader = self.train_loader(config, runtime, start, stop, parts)
        return Feed(iter(loader), runtime.device, config.channels_last, self.train.augment)

    def eval_loader(self, config: Config, runtime: Runtime, parts: int | None = None) -> Iterable[Batch]:
        """This rank's share of the eval set, each sample once."""
        size = config.eval.batch_size or 4 * _parts(config, runtime, parts)[1]
        source = self.eval.source
        sampler = EvalSampler(
            len(self.eval), size, runtime.rank, runtime.world_size, source.groups(), source.soon
        )
        return make_loader(self.eval, sampler, config, runtime, _bytes(size, self.sample_shape))


def _parts(config: Config, runtime: Runtime, parts: int | None) -> tuple[int, int]:
    """How many parts a step has, and how many samples a part."""
    train = config.train
    parts = parts or default_parts(train.parts, runtime.world_size, train.accumulate)
    return parts, part_size(train.batch_size, parts, runtime.world_size, train.accumulate)


def opened(config: Config, train_data: Any = None, eval_data: Any = None) -> tuple[Any, Any]:
    """The training and evaluation set that are given, or else those that the configuration names.

    Some are downloaded now. There may be no evaluation set.
    """
    options = config.data
    if train_data is None:
        opening = partial(
            open_source, options.name, options.root, args=options.args, downloads=_downloads(config)
        )
        train_data = opening(train=True)
        if eval_data is None and not options.eval_fraction:
            eval_data = opening(train=False)
    return train_data, eval_data


def build(config: Config, train_data: Any = None, eval_data: Any = None) -> Data:
    """The data of a run, from the configuration or from the data sets that are given.

    Raises UserError for what can't be found, read, or trained on.
    """
    options = config.data
    train_data, eval_data = opened(config, train_data, eval_data)
    for part, items in (("training", train_data), ("evaluation", eval_data)):
        if items is None:
            continue
        if isinstance(items, IterableDataset) or not all(
            hasattr(items, m) for m in ("__len__", "__getitem__")
        ):
            raise UserError(
                f"data: the {part} set ({type(items).__name__}) has no samples by number; a map-style one is"
                " needed, with __len__ and __getitem__."
            )
        if len(items) == 0:
            raise UserError(f"data: the {part} set of '{options.name}' is empty.")
    classes = [str(name) for name in getattr(train_data, "classes", [])]
    eval_classes = [str(name) for name in getattr(eval_data, "classes", [])]
    if eval_classes != classes[: len(eval_classes)]:  # fewer may be missing at the end
        other = [name for name in eval_classes if name not in classes]
        detail = f"'{other[0]}' is only in the eval set" if other else "some are missing in between"
        raise UserError(
            f"data: the class names of the eval set are not those of the training set ({detail}), so label"
            " numbers would not mean the same; give both sets the same classes."
        )
    train_data = with_cache(train_data, options)
    eval_data = None if eval_data is None else with_cache(eval_data, options)
    notes = [
        note.removeprefix("; ") for note in (getattr(d, "note", "") for d in (train_data, eval_data)) if note
    ]
    if eval_data is None:
        train_data, eval_data = _hold_out(train_data, config)
    if options.drop_last and len(train_data) < config.train.batch_size:
        raise UserError(
            f"train.batch_size: {config.train.batch_size} is more than the {len(train_data):,} training"
            " samples, so with data.drop_last no batch is left; use a smaller one."
        )
    on_target = target_transform(options.target_transform, len(classes))
    labels = Labels(len(classes), config.task.name == "classification", on_target)
    training, evaluating = _transforms(config, all(View(d).is_images for d in (train_data, eval_data)))
    skip = options.on_bad_sample == "skip"
    train = Samples(train_data, training, labels, config.seed, "replace" if skip else "stop")
    evaluation = Samples(eval_data, evaluating, labels, config.seed, "leave out" if skip else "stop")
    if batched := train_transforms(config)[1]:
        assert training is not None
        train.augment = Augment(batched, config.seed, len(classes), training.normalize)
        notes.append(f"{', '.join(name for name, _ in batched)}: done to whole batches, on the device")
    train.check_labels("training")
    evaluation.check_labels("evaluation")
    read = Samples.readable if skip else Samples.sample
    shape, train_shape = (
        _shape(samples.collated("an input", [read(samples, 0, epoch=0)[0]]))
        for samples in (evaluation, train)
    )
    return Data(train, evaluation, classes, shape, train_shape, notes)


def _downloads(config: Config) -> Downloads:
    """Where what a URL holds is kept; an object is given up before other ranks, or the watchdog, give up."""
    least = min(filter(None, (config.timeout_seconds, config.watchdog_seconds)))
    return Downloads(config.data.download_dir, int(config.data.download_gb * 1e9), least / 4)


def first_batch(samples: Samples) -> Batch:
    """The first sample that can be read, twice, as the model gets it in a batch, on the CPU."""
    parts = (Part(0, 0, np.array([index, index]), 2, 2) for index in range(len(samples)))
    found = next(batch for part in parts for batch in samples.batches([part]) if batch.rows)
    batch = found.to(torch.device("cpu"))
    return samples.augment(batch) if samples.augment else batch


def _bytes(size: int, shape: tuple[int, ...]) -> int:
    """What a batch of float32 images takes, or of other inputs about."""
    return 4 * size * math.prod(shape)


def _shape(inputs: Any) -> tuple[int, ...]:
    """The shape of a sample in a batch's first tensor."""
    return tuple(next(tensors(inputs)).shape[1:])


def _transforms(config: Config, is_images: bool) -> tuple[ImageTransform | None, ImageTransform | None]:
    """What is done to images in training and in evaluation; nothing to other inputs.

    Raises UserError where something is to be done to those.
    """
    options = config.data
    if is_images:
        evaluating = eval_transform(config)
        if options.train_transform is None:
            return evaluating, evaluating
        return ImageTransform(train_transforms(config)[0], options.mean, options.std), evaluating
    for name in ("train_transform", "eval_transform", "mean", "std"):
        if getattr(options, name):
            raise UserError(
                f"data.{name}: the inputs of '{options.name}' are no images, so nothing is done to them here;"
                " leave it out."
            )
    return None, None


def train_transforms(config: Config) -> tuple[list[Any], list[tuple[str, Any]]]:
    """The transforms of single training images, and of whole batches on the device."""
    options = config.data
    if options.train_transform is None:
        return options.eval_transform, []
    return split(options.train_transform, config.task.name == "classification", "data.train_transform")


def eval_transform(config: Config) -> ImageTransform:
    """What evaluation and prediction do to an image."""
    options = config.data
    return ImageTransform(options.eval_transform, options.mean, options.std, "data.eval_transform")


def _hold_out(data: Any, config: Config) -> tuple[Any, Any]:
    """A training and an evaluation part of `data`, chosen by the seed."""
    held = int(len(data) * config.data.eval_fraction)
    if not 0 < held < len(data):
        raise UserError(
            f"data: '{config.data.name}' has no evaluation set; set data.eval_fraction=0.1 to hold out a"
            " tenth of the training samples."
        )
    order = torch.randperm(len(data), generator=generator(key(config.seed, "hold out"))).tolist()
    return Subset(data, sorted(order[held:])), Subset(data, sorted(order[:held]))
