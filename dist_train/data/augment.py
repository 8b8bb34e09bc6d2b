"""What is done to training batches of images on the device: color, erasing, mixing.

Names and meaning are those of torchvision.transforms.v2. The numbers of a whole batch are drawn at once, by
the CPU: what is done to a sample is a function of (seed, epoch, index). One code changes the pixels on any
device, and nothing waits for it. Samples are mixed with their neighbours in a part of the global batch, so
processes need nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dist_train.config import UserError, construct, counted
from dist_train.data.batch import Batch
from dist_train.data.draws import beta, uniform
from dist_train.data.normalize import Normalization
from dist_train.data.transforms import build, parsed

TRIES = 10  # boxes that RandomErasing draws until one fits
CACHED = 2**20  # bytes of images whose color a CPU changes at a time: they stay in its cache
GREY = (0.2989, 0.587, 0.114)  # what red, green and blue add to a shade of grey

Draw = Callable[[int], np.ndarray]  # so many numbers from 0 to below 1 for each sample, `[B, n]`


class MixUp:
    """Each image is laid over its neighbour (Zhang et al., ICLR 2018).

    Args:
        alpha: of the Beta distribution of the shares; the smaller, the rarer are those near one half.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, not {alpha}")
        self.alpha = alpha


class CutMix(MixUp):
    """Each image gets a box of its neighbour (Yun et al., ICCV 2019)."""


MIXING = {"MixUp": MixUp, "CutMix": CutMix}


def split(names: Sequence[Any], lift: bool, where: str) -> tuple[list[Any], list[tuple[str, Any]]]:
    """The transforms of single images, and those after them that are done to batches, by name.

    Args:
        names: as the configuration has them.
        lift: whether color and erasing at the end are done to batches.
        where: the configuration key that an error names.

    Raises UserError for wrong arguments.
    """
    single, batched = list(names), list[tuple[str, Any]]()
    while single and not callable(single[-1]):
        name, args = parsed(single[-1], where)
        place = f"{where}[{len(single) - 1}]"
        if name in MIXING and name not in dict(batched) and {*dict(batched)} <= MIXING.keys():
            transform = construct(MIXING[name], args, f"{place}.{name}")
        elif lift and name in ("ColorJitter", "RandomErasing"):
            transform, _ = build(single[-1], place)
            # A hue, and noise for each pixel, are left to torchvision.
            if getattr(transform, "hue", None) is not None or getattr(transform, "value", 0) is None:
                break
        else:
            break
        single.pop()
        batched.insert(0, (name, transform))
    return single, batched


class Augment:
    """Transforms of whole batches, one after the other.

    Args:
        steps: names and what holds the arguments, as torchvision's transforms do; those that mix come last.
        classes: how many there are.
        normalize: what was done to images before; transforms see them without it.
    """

    def __init__(
        self,
        steps: Sequence[tuple[str, Any]],
        seed: int,
        classes: int,
        normalize: Normalization = Normalization(),  # noqa: B008
    ) -> None:
        self.steps = [(name, transform) for name, transform in steps if name not in MIXING]
        self.alphas = {name: transform.alpha for name, transform in steps if name in MIXING}
        self.seed, self.classes = seed, classes
        self.mean, self.std = (
            np.array(values or [default], np.float32).astype(np.float64).reshape(-1, 1, 1)
            for values, default in ((normalize.mean, 0), (normalize.std, 1))
        )

    def __call__(self, batch: Batch) -> Batch:
        """The batch with changed images `[B, C, H, W]`; where they are mixed, with probabilities `[B, K]`."""
        images, targets, part = batch.inputs, batch.targets, batch.part
        if not isinstance(images, torch.Tensor) or images.ndim != 4:
            raise UserError("data.train_transform: what is done to whole batches needs images, one a sample.")
        for number, (name, transform) in enumerate(self.steps):
            draw = partial(uniform, self.seed, part.epoch, part.indices, f"{name} {number}")
            if name == "ColorJitter":
                mean, std = sent(self.mean, images), sent(self.std, images)
                images = jittered(images, transform, draw, mean, std)
            else:
                if len(transform.value) not in (1, images.shape[1]):
                    given = counted(len(transform.value), "value")
                    needed = counted(images.shape[1], "channel")
                    raise UserError(
                        f"data.train_transform: RandomErasing has {given}, but the images have {needed}."
                    )
                value = (np.array(transform.value).reshape(-1, 1, 1) - self.mean) / self.std
                boxes = erased_boxes(images.shape, transform, draw)
                images = torch.where(inside(boxes, images), sent(value, images), images)
        if self.alphas:
            draw = partial(uniform, self.seed, part.epoch, part.indices, "mix")
            images, targets = mixed(images, self.probabilities(targets), self.alphas, draw)
        return batch._replace(inputs=images, targets=targets)

    def probabilities(self, targets: Any) -> torch.Tensor:
        """Of class numbers `[B]` probabilities `[B, K]`; these as they are. Raises UserError for others."""
        if isinstance(targets, torch.Tensor) and targets.is_floating_point() and targets.ndim == 2:
            return targets
        is_number = isinstance(targets, torch.Tensor) and not targets.is_floating_point()
        if not is_number or targets.ndim != 1 or not self.classes:
            raise UserError(
                f"data.train_transform: {' and '.join(self.alphas)} mix classes; they need a class for each"
                " image, and a data set that names its classes."
            )
        numbers = torch.arange(self.classes, device=targets.device)
        return (targets[:, None] == numbers).float()


def jittered(
    images: torch.Tensor, transform: Any, draw: Draw, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Brightness, contrast and saturation of each image `[B, C, H, W]` changed, in an order of its own.

    Each is a mixture with something else: black, the mean shade of grey, the shade of each pixel. Images are
    normalized by `mean` and `std`.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise UserError(f"data.train_transform: ColorJitter needs 1 or 3 channels, not {channels}.")
    ranges = {"brightness": transform.brightness, "contrast": transform.contrast}
    if channels == 3:  # grey has no saturation
        ranges["saturation"] = transform.saturation
    names = np.array([name for name, limits in ranges.items() if limits is not None])
    if not len(names):
        return images
    low, high = np.array([ranges[name] for name in names]).T
    drawn = draw(2 * len(names))
    order, factors = drawn[:, : len(names)].argsort(1), low + drawn[:, len(names) :] * (high - low)
    factors = np.take_along_axis(factors, order, 1)
    kinds = names[order]
    table = np.stack([factors, kinds == "contrast", kinds == "saturation"])  # [3, B, places in the order]
    numbers = sent(table.transpose(2, 0, 1)[..., None, None, None], images)
    some = len(images) if images.is_cuda else max(1, CACHED // images[0].nbytes)
    pieces = zip(images.split(some), numbers.split(some, 2), strict=True)
    return torch.cat([_blended(piece, places, mean, std) for piece, places in pieces])


def _blended(
    images: torch.Tensor, places: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Images `[B, C, H, W]`, at each of the `places` `[places, 3, B, 1, 1, 1]` mixed with something else."""
    images = torch.addcmul(mean, images, std)
    for factor, contrast, saturation in places:
        grey = images
        if images.shape[1] == 3:
            red, green, blue = images.split(1, 1)
            grey = (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])
        other = torch.addcmul(contrast * grey.mean((1, 2, 3), keepdim=True), saturation, grey)
        images = torch.lerp(other, images, factor).clamp_(0, 1)
    return images.sub_(mean).div_(std)


def erased_boxes(shape: Sequence[int], transform: Any, draw: Draw) -> np.ndarray:
    """(top, left, bottom, right) `[4, B]` of what is erased of images `[B, C, H, W]`; perhaps empty.

    The first of 10 boxes of random area and shape that fits (Zhong et al., "Random Erasing", AAAI 2020).
    """
    height, width = shape[-2:]
    drawn = draw(3 + 2 * TRIES)
    coin, y, x = drawn[:, :3].T
    (smallest, largest), ratios = transform.scale, np.log(transform.ratio)
    area = height * width * (smallest + drawn[:, 3 : 3 + TRIES] * (largest - smallest))
    aspect = np.exp(ratios[0] + drawn[:, 3 + TRIES :] * (ratios[1] - ratios[0]))
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < height) & (widths < width)
    first = np.arange(len(drawn)), fits.argmax(1)
    erases = fits[first] & (coin < transform.p)
    h, w = heights[first] * erases, widths[first] * erases
    top, left = np.floor(y * (height - h + 1)), np.floor(x * (width - w + 1))
    return np.stack([top, left, top + h, left + w])


def mixed(
    images: torch.Tensor, targets: torch.Tensor, alphas: dict[str, float], draw: Draw
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[B, C, H, W]` and probabilities `[B, K]`, each mixed with those of its neighbour 2k or 2k + 1.

    By MixUp, CutMix or, where there are `alphas` for both, the one that a sample draws. A last, odd sample
    is mixed with the one before it.
    """
    coin, drawn, y, x = draw(4).T
    names = np.array(list(alphas))  # one, or both
    chosen = np.floor(coin * len(names)).astype(int)  # of them by each sample
    share = np.choose(chosen, [beta(alpha, drawn) for alpha in alphas.values()])
    cuts = names[chosen] == "CutMix"
    boxes = cut_boxes(images.shape, share, y, x) * cuts
    kept = 1 - (boxes[2] - boxes[0]) * (boxes[3] - boxes[1]) / (images.shape[-2] * images.shape[-1])
    partners = np.minimum(np.arange(len(images)) ^ 1, len(images) - 1)
    if len(images) % 2 and len(images) > 1:
        partners[-1] = len(images) - 2
    others = sent(partners, images, torch.int64)
    if "MixUp" in alphas:
        own = sent(np.where(cuts, 1, share)[:, None, None, None], images)
        blended = torch.lerp(images[others], images, own)
    else:
        blended = images
    if "CutMix" in alphas:
        blended = torch.where(inside(boxes, images), images[others], blended)
    own = sent(np.where(cuts, kept, share)[:, None], targets)
    return blended, own * targets + (1 - own) * targets[others]


def cut_boxes(shape: Sequence[int], share: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(top, left, bottom, right) `[4, B]` of boxes of 1 - `share` of images, less what lies outside of them.

    Args:
        y, x: where their middle lies, from 0 to below 1.
    """
    size = np.array(shape[-2:])[:, None]  # height and width
    middle = np.floor(np.stack([y, x]) * size)
    half = np.floor(0.5 * np.sqrt(1 - share) * size)
    return np.concatenate([np.maximum(middle - half, 0), np.minimum(middle + half, size)])


def inside(boxes: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """Whether each pixel of images `[B, C, H, W]` lies in the box of its image, `[B, 1, H, W]`."""
    top, left, bottom, right = sent(boxes[..., None, None, None], images, torch.int32)
    rows = torch.arange(images.shape[2], device=images.device)[:, None]
    columns = torch.arange(images.shape[3], device=images.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def sent(values: np.ndarray, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`values` as a tensor of the type and on the device of `like`, without a wait for that."""
    tensor = torch.from_numpy(values).to(dtype or like.dtype)
    if like.is_cuda:  # a copy from other memory might wait for the stream
        tensor = tensor.pin_memory()
    return tensor.to(like.device, non_blocking=True)
