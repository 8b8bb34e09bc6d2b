"""Transforms: from an image as it is read to the tensor that the model gets, keyed per sample.

Names are those of torchvision.transforms.v2. What a random transform does to a sample is a function of
(seed, epoch, index): the same in any thread or worker process, on any rank, and when a step is replayed.
torchvision is imported only for what needs it: that takes half a second.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dist_train.config import UserError, construct, import_object, nearest
from dist_train.data import geometry
from dist_train.data.draws import uniform
from dist_train.data.geometry import Step, as_batch
from dist_train.data.masks import IGNORED
from dist_train.data.normalize import Normalization, from_array
from dist_train.nested import map_tensors, tensors

# Transforms without randomness that take a batch [B, C, H, W] as well as one image.
BATCHED = {"CenterCrop", "ConvertImageDtype", "Grayscale", "Normalize", "Pad", "RGB", "Resize", "ToDtype"}
OF_OTHERS = {"Compose", "RandomApply", "RandomChoice", "RandomOrder"}  # made of further transforms
QUICK = {"RandomCrop", "RandomHorizontalFlip", "RandomVerticalFlip"}  # random, and no work for threads


class ImageTransform:
    """uint8 images `[C, H, W]` to normalized float32 `[C, H', W']`.

    Args:
        names: names of v2 transforms, `{name: arguments}`, `package.module:object`, or callables.
        mean, std: of each channel, of values from 0 to 1; empty for no normalization.
        where: the configuration key that an error names.
    """

    def __init__(
        self,
        names: Sequence[Any] = (),
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        where: str = "data.train_transform",
    ) -> None:
        self.where = where
        built = [build(name, f"{where}[{position}]") for position, name in enumerate(names)]
        self.names = [name for _, name in built]
        self.steps = [step for step, _ in built]
        self.ours = all(name for _, name in built)  # only v2's, which draw from torch alone
        drawing = [_by_numbers(step, name) for step, name in built]
        self.keyed = [step for step in drawing if step is not None]  # the same steps, by numbers drawn ahead
        self.is_keyed = len(self.keyed) == len(built)  # whether all of them are there
        others = (built[place] for place, step in enumerate(drawing) if step is None)
        self.not_keyed = next((name or _name(step) for step, name in others), "")  # the first that isn't
        self.draws = sum(step.draws for step in self.keyed)
        known = BATCHED | QUICK if self.is_keyed else BATCHED
        self.batched = all(name in known for _, name in built)  # whether it is quick for whole batches
        self.normalize = Normalization(tuple(mean), tuple(std))

    def __call__(self, image: Any) -> torch.Tensor:
        """One image `[C, H, W]`, or where `batched` a batch `[B, C, H, W]`."""
        return self.normalize(self.geometry(image))

    def pair(self, inputs: Any, target: Any) -> tuple[Any, Any]:
        """An image and its target; what lies on it (tv_tensors.Mask and such) by the same random numbers.

        Inputs that are no single image are a dict or tuple; images in it are tv_tensors.Image, all other
        values are only passed through.
        """
        inputs, target = self.geometry_of_pair(inputs, target)

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            return self.normalize(tensor) if _is_tv(tensor, "Image") else _plain(tensor)

        nested = isinstance(inputs, (dict, tuple, list))
        inputs = map_tensors(convert, inputs) if nested else self.normalize(inputs)
        return inputs, map_tensors(_plain, target)

    def geometry_of_pair(self, inputs: Any, target: Any) -> tuple[Any, Any]:
        """The named transforms alone, of the image, or of both where they belong together.

        Then a transform of one's own gets the pair of both, too.
        """
        nested = isinstance(inputs, (dict, tuple, list))
        if nested or any(map(_is_tv, tensors(target))):
            both: tuple[Any, Any] = self.geometry((from_array(inputs), target))
            return both
        return self.geometry(inputs), target

    def drawn(self, seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
        """The numbers by which `batch` transforms the samples `indices` `[B]` in an epoch, `[B, draws]`."""
        if not self.draws:  # a hundredth of a small step
            return np.empty((len(indices), 0))
        return uniform(seed, epoch, indices, "geometry", self.draws)

    def batch(self, images: torch.Tensor, drawn: np.ndarray) -> torch.Tensor:
        """Where it `is_keyed`: the named transforms of images `[B, C, H, W]`, by the numbers of each."""
        for position, step in enumerate(self.keyed):
            numbers, drawn = drawn[:, : step.draws], drawn[:, step.draws :]
            images = self._step(position, step.apply, images, numbers)
        return images

    def geometry(self, image: Any) -> Any:
        """The named transforms alone, before conversion and normalization.

        Random ones draw from torch's generator, or where they are the user's own from any.
        """
        if self.is_keyed and not self.draws and type(image) is torch.Tensor:  # one way to each pixel
            images = image if image.ndim == 4 else as_batch(image)
            images = self.batch(images, np.empty((len(images), 0)))
            return images if image.ndim == 4 else images[0]
        for position, step in enumerate(self.steps):
            if self.names[position]:  # torchvision's pass an array over in silence
                image = from_array(image)
            image = self._step(position, step, image)
        return image

    def _step(self, position: int, step: Callable[..., Any], image: Any, *drawn: np.ndarray) -> Any:
        """One transform. Raises UserError, naming its place, where the image doesn't suit it."""
        try:
            return step(image, *drawn)
        except (RuntimeError, TypeError, ValueError) as error:
            if not self.names[position]:  # the user's own: its traceback tells more
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            shapes = " and ".join(str(list(t.shape[-3:])) for t in tensors(image)) or "[]"
            raise UserError(
                f"{self.where}[{position}]: {self.names[position]} can't be applied to an image of"
                f" shape {shapes}: {reason}."
            ) from error


def _by_numbers(step: Callable[[Any], Any], name: str) -> Step | None:
    """A named transform by numbers that are drawn ahead; None for a random one that we don't do so."""
    if (found := geometry.step(name, step)) is not None:
        return found
    if name in BATCHED and not getattr(step, "inplace", False):
        return Step(0, partial(_whole, step=step))
    return None


def _whole(images: torch.Tensor, drawn: np.ndarray, step: Callable[[Any], Any]) -> torch.Tensor:
    transformed: torch.Tensor = step(images)
    return transformed


def _name(step: Callable[[Any], Any]) -> str:
    return str(getattr(step, "__name__", type(step).__name__))


def _is_tv(tensor: torch.Tensor, kind: str = "TVTensor") -> bool:
    """Whether it is of a class of torchvision.tv_tensors; a plain tensor is of none."""
    if type(tensor) is torch.Tensor:
        return False
    from torchvision import tv_tensors

    return isinstance(tensor, getattr(tv_tensors, kind))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Without torchvision's word for what it is; the classes of a mask as int64, as torch's loss wants."""
    plain = tensor.as_subclass(torch.Tensor)
    return plain.long() if _is_tv(tensor, "Mask") else plain


class OneHot:
    """A class number to a float vector `[K]` with a one at its place."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, label: Any) -> torch.Tensor:
        """The vector of one label, or those `[B, K]` of labels `[B]`."""
        numbers = torch.as_tensor(label)
        if numbers.is_floating_point():
            raise UserError(
                "data.target_transform: one_hot takes numbers of classes, but the labels are floats."
            )
        return torch.nn.functional.one_hot(numbers.long(), self.classes).float()


def target_transform(name: str | None, classes: int) -> Callable[[Any], Any] | None:
    """The target transform that the configuration names."""
    if name is None:
        return None
    if name == "one_hot":
        return OneHot(classes)
    if ":" in name:
        return import_object(name, "data.target_transform")
    raise UserError(
        f"data.target_transform: there is no '{name}'{nearest(name, ['one_hot'])};"
        " use one_hot or package.module:object."
    )


def build(name: Any, where: str) -> tuple[Callable[[Any], Any], str]:
    """The transform, and its name if it is one of torchvision's."""
    if callable(name):
        return name, ""
    name, args = parsed(name, where)
    if ":" in name:
        target = import_object(name, where)
        # A class or a factory is called with the arguments; a plain function is the transform.
        return (construct(target, args, where) if args or isinstance(target, type) else target), ""
    from torchvision.transforms import v2

    known = [item for item in dir(v2) if isinstance(getattr(v2, item), type)]
    if name not in known or name == "Transform":
        raise UserError(f"{where}: torchvision.transforms.v2 has no '{name}'{nearest(name, known)}.")
    if name in ("CutMix", "MixUp"):
        raise UserError(f"{where}: {name} mixes samples; it stands once, at the end of data.train_transform.")
    if name in OF_OTHERS and isinstance(args.get("transforms"), list):
        places = enumerate(args["transforms"])
        args = args | {"transforms": [build(item, f"{where}.{name}[{n}]")[0] for n, item in places]}
    return construct(getattr(v2, name), _filling(getattr(v2, name), args), f"{where}.{name}"), name


def parsed(name: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of what is written as `Name` or `Name: {argument: value}`."""
    args: Any = {}
    if isinstance(name, dict) and len(name) == 1:
        name, args = next(iter(name.items()))
    if not isinstance(name, str):
        raise UserError(f"{where}: write a transform as `Name` or `Name: {{argument: value}}`.")
    if args is None:
        args = {}
    if not isinstance(args, dict):
        raise UserError(f"{where}.{name}: arguments are `argument: value` pairs, not {args!r}.")
    return name, args


def _filling(cls: type, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a transform that may bring in pixels from outside: in a mask those are ignored."""
    fill = inspect.signature(cls).parameters.get("fill")
    if fill is None or isinstance(args.get("fill"), dict):
        return args
    from torchvision import tv_tensors

    return args | {"fill": {tv_tensors.Mask: IGNORED, "others": args.get("fill", fill.default)}}
