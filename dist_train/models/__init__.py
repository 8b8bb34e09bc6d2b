"""Models by name: our own, torchvision's, timm's, and the user's. Imports only the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy

from dist_train.config import UserError, construct, import_object, nearest
from dist_train.models.cnn import cnn, resnet18_small
from dist_train.models.gpt import GPT
from dist_train.nested import tensors


def mlp(
    input_shape: Sequence[int] = (1, 28, 28),
    num_classes: int = 10,
    hidden: Sequence[int] = (512, 512),
    dropout: float = 0.0,
) -> nn.Module:
    """The network of PyTorch's quickstart tutorial: flat pixels, hidden layers, ReLU, an output per class.

    `[B, C, H, W]` -> `[B, K]`.
    """
    widths = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al., 2015): a score of each class for each pixel."""

    def __init__(self, in_channels: int, num_classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        befores = [in_channels, *widths[:-1]]
        self.down = nn.ModuleList(
            _convolutions(before, width) for before, width in zip(befores, widths, strict=True)
        )
        self.up = nn.ModuleList(_convolutions(high + low, high) for high, low in pairwise(widths))
        self.scores = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` -> `[B, K, H, W]`."""
        levels = [self.down[0](images)]
        for block in self.down[1:]:
            levels.append(block(nn.functional.max_pool2d(levels[-1], 2)))
        values = levels.pop()
        for block in reversed(self.up):
            # To the size of the level, which a size that can't be halved well is not twice this one.
            values = nn.functional.interpolate(values, levels[-1].shape[-2:])
            values = block(torch.cat([levels.pop(), values], 1))
        return self.scores(values)  # type: ignore[no-any-return]


def unet(in_channels: int = 1, num_classes: int = 10, widths: Sequence[int] = (16, 32, 64)) -> nn.Module:
    """A small U-Net (Ronneberger et al., 2015) for segmentation: each further width halves the image once.

    `[B, C, H, W]` -> `[B, K, H, W]`.
    """
    return UNet(in_channels, num_classes, widths)


def _convolutions(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (before, after):
        layers += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet18_small": resnet18_small,
    "unet": unet,
    "gpt": GPT,
}

# What wrong arguments make a model raise: sizes below zero, unknown weights, weights out of reach.
REFUSALS = (TypeError, ValueError, RuntimeError, KeyError, AssertionError, OSError)


def build(name: str, args: dict[str, Any], sample_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The model `name` for images `[C, H, W]` and a number of classes.

    Raises UserError for an unknown name or arguments that the model refuses.
    """
    channels = sample_shape[0]
    if name in MODELS or ":" in name:
        return construct(
            MODELS[name] if name in MODELS else import_object(name, "model.name"),
            args,
            "model.args",
            REFUSALS if name in MODELS else (TypeError, ValueError),
            input_shape=tuple(sample_shape),
            in_channels=channels,
            num_classes=num_classes,
        )
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"), args, channels, num_classes)
    import torchvision  # half a second

    known = torchvision.models.list_models(module=torchvision.models) + segmentation_models()
    if name not in known:
        raise UserError(
            f"model.name: there is no model '{name}'{nearest(name, [*MODELS, *known])}; use"
            f" {', '.join(MODELS)}, a classifier or segmentation model of torchvision.models, timm/NAME, or"
            " package.module:object."
        )
    return _torchvision(name, args, sample_shape, num_classes)


SPARE = 64 * 2**20  # bytes


@contextmanager
def no_larger(file_size: int, where: str) -> Iterator[None]:
    """Models made within are those of a file: one that grows far beyond its size raises UserError at once.

    Args:
        file_size: of the file that holds the weights, in bytes.
    """
    made = 0

    def count(module: nn.Module, name: str, value: torch.Tensor | None) -> None:
        nonlocal made
        if value is not None and not is_lazy(value):
            made += value.numel() * value.element_size()
        if made > 4 * file_size + SPARE:
            raise UserError(f"{where}: the model that it asks for is far larger than the weights in it.")

    hooks = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def probe(model: nn.Module, inputs: Any, name: str) -> torch.Tensor:
    """The outputs `[2, ...]` for two samples; raises UserError where model and samples don't fit.

    Args:
        inputs: of the samples: images `[2, C, H, W]`, or other tensors, also nested ones.
    """
    shapes = " and ".join(str(list(tensor.shape[1:])) for tensor in tensors(inputs))
    images = "images" if isinstance(inputs, torch.Tensor) and inputs.ndim == 4 else "inputs"
    training = model.training
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if not is_lazy(buffer)}
    model.eval()  # leaves BatchNorm's averages alone
    try:
        with torch.no_grad():
            output = model(inputs)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        mend = "Choose another model."
        if images == "images":
            mend = "Resize them by data.eval_transform and data.train_transform, or choose another model."
        raise UserError(
            f"model.name: '{name}' can't take {images} of shape {shapes}: {reason}. {mend}"
        ) from None
    finally:
        model.train(training)
        for name, buffer in model.named_buffers():
            if name in before:
                buffer.data.copy_(before[name])
    if not isinstance(output, torch.Tensor) or output.shape[:1] != (2,):
        tensor = isinstance(output, torch.Tensor)
        given = f"outputs of shape {list(output.shape)}" if tensor else f"a {type(output).__name__}"
        raise UserError(
            f"model.name: '{name}' gives {given} for 2 {images}; it must give one tensor [B, ...] for B"
            f" {images}."
        )
    return output


def segmentation_models() -> list[str]:
    """The names of torchvision's segmentation models."""
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models.segmentation)
    return names


def _torchvision(name: str, args: dict[str, Any], sample_shape: Sequence[int], num_classes: int) -> nn.Module:
    import torchvision

    args, segments = dict(args), name in segmentation_models()
    if name in ("googlenet", "inception_v3") and not args.get("weights"):
        args = {"aux_logits": False, "init_weights": True} | args
    if name.startswith("vit_"):
        args.setdefault("image_size", sample_shape[1])
    if segments:
        args.setdefault("weights_backbone", None)  # nothing is downloaded unasked
    if not args.get("weights"):
        args["num_classes"] = num_classes
    model = construct(torchvision.models.get_model_builder(name), args, "model.args", REFUSALS)
    if args.get("weights"):
        (replace_heads if segments else replace_last)(model, num_classes)
    replace_first(model, sample_shape[0])
    return model


def replace_first(model: nn.Module, channels: int) -> None:
    """Gives the first convolution `channels` input channels, its weights averaged over the old ones."""
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if old.in_channels == channels:
        return
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        old.groups,
        old.bias is not None,
        old.padding_mode,
    )
    with torch.no_grad():  # the same response to a grey image, in which all channels are alike
        mean = old.weight.mean(1, keepdim=True) * (old.in_channels / channels)
        new.weight.copy_(mean.expand_as(new.weight))
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    _set(model, name, new)


def replace_last(model: nn.Module, size: int) -> None:
    """Puts a fresh layer with `size` outputs in place of the last linear one (pretrained weights).

    Where there is none, as in SqueezeNet, the last convolution gives the outputs.
    """
    layers = list(model.named_modules())
    linear = [(name, layer) for name, layer in layers if isinstance(layer, nn.Linear)]
    if not linear:
        name, last = [(name, layer) for name, layer in layers if isinstance(layer, nn.Conv2d)][-1]
        _set(model, name, nn.Conv2d(last.in_channels, size, last.kernel_size))  # type: ignore[arg-type]
    elif linear[-1][1].out_features != size:
        name, old = linear[-1]
        _set(model, name, nn.Linear(old.in_features, size))


def replace_heads(model: nn.Module, size: int) -> None:
    """Puts fresh layers with `size` outputs in place of the last ones of a segmentation model."""
    heads = ("classifier.4", "aux_classifier.4", "classifier.low_classifier", "classifier.high_classifier")
    for name, old in list(model.named_modules()):
        if name in heads and isinstance(old, nn.Conv2d):
            _set(model, name, nn.Conv2d(old.in_channels, size, 1))


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _timm(name: str, args: dict[str, Any], channels: int, num_classes: int) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError(
            f"model.name: 'timm/{name}' needs the package timm: pip install 'dist-train[timm]'."
        ) from None
    if not timm.is_model(name):  # which may name its weights, too: resnet18.a1_in1k
        raise UserError(f"model.name: timm has no '{name}'{nearest(name, timm.list_models())}.")
    options = {"in_chans": channels, "num_classes": num_classes} | args
    return construct(timm.create_model, {"model_name": name, **options}, "model.args")
