"""Images as pretrained weights of torchvision and timm had them: transforms, mean and deviation of their own.

They become part of the configuration, where that says nothing else, so that a run records them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from dist_train.config import Config, UserError


class Images(NamedTuple):
    """What was done to the images that weights were trained on, as the configuration writes it."""

    weights: str
    eval_transform: list[Any]
    mean: list[float]
    std: list[float]


def with_own_transforms(config: Config) -> Config:
    """`config` with the transforms, mean and std of its pretrained weights, where it has none of its own."""
    own, data = images_of(config), config.data
    if own is None:
        return config
    steps = data.eval_transform or own.eval_transform
    mean, std = (data.mean, data.std) if data.mean or data.std else (own.mean, own.std)
    return replace(config, data=replace(data, eval_transform=steps, mean=mean, std=std))


def described(config: Config) -> list[str]:
    """A line on how images are prepared for pretrained weights, if there are such."""
    own, data = images_of(config), config.data
    if own is None:
        return []
    said = {
        f"data.{name}": getattr(data, name)
        for name in ("eval_transform", "mean", "std")
        if getattr(data, name) != getattr(own, name)
    }
    if said:
        return [f"images are not those of the weights {own.weights}: {', '.join(said)} are of your own"]
    train = " in evaluation" if data.train_transform is not None else ""
    steps = ", ".join(map(_called, own.eval_transform))
    return [f"images{train} as the weights {own.weights} had them: {steps}; mean {own.mean}, std {own.std}"]


def images_of(config: Config) -> Images | None:
    """How images were made ready for the pretrained weights that `config` names, if it does."""
    name, args = config.model.name, config.model.args
    if name.startswith("timm/"):
        return _of_timm(name.removeprefix("timm/"), args) if args.get("pretrained") else None
    return _of_torchvision(name, args["weights"]) if args.get("weights") and ":" not in name else None


def _of_torchvision(name: str, wanted: Any) -> Images | None:
    from torchvision import models

    try:
        weights = models.get_model_weights(name).verify(wanted)
    except (ValueError, KeyError, TypeError):  # told when the model is built
        return None
    preset = weights.transforms()
    mode = preset.interpolation.value
    steps = _sized(preset.resize_size, getattr(preset, "crop_size", None), mode)
    return Images(str(weights), steps, preset.mean, preset.std)


def _of_timm(name: str, args: dict[str, Any]) -> Images | None:
    try:
        import timm
        from timm.data import resolve_data_config
    except ModuleNotFoundError:  # told when the model is built
        return None
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None:
        return None
    found = known.to_dict() | dict(args.get("pretrained_cfg_overlay") or {})
    data = resolve_data_config(pretrained_cfg=found)
    size, crop = list(data["input_size"][1:]), data["crop_mode"]
    if crop != "squash" and (crop != "center" or size[0] != size[1]):
        raise UserError(
            f"model.name: timm prepares images for '{name}' by its crop mode '{crop}', which torchvision has"
            " not; set data.eval_transform."
        )
    whole = [int(side / data["crop_pct"]) for side in size]
    steps = _sized(whole[:1] if crop == "center" else whole, size, data["interpolation"])
    tag = f".{found['tag']}" if found.get("tag") and "." not in name else ""
    return Images(f"timm/{name}{tag}", steps, list(data["mean"]), list(data["std"]))


def _sized(resize: list[int], crop: list[int] | None, interpolation: str) -> list[Any]:
    """RGB images, resized and their middle cut out; grey ones get three equal channels."""
    mode = {"bicubic": {"interpolation": 3}, "nearest": {"interpolation": 0}}.get(interpolation, {})
    steps: list[Any] = ["RGB", {"Resize": {"size": _plain(resize)} | mode}]
    return [*steps, {"CenterCrop": {"size": _plain(crop)}}] if crop else steps


def _called(step: Any) -> str:
    """A transform as code calls it: `Resize(size=256)`."""
    if isinstance(step, str):
        return step
    ((name, args),) = step.items()
    return f"{name}({', '.join(f'{key}={value}' for key, value in args.items())})"


def _plain(size: list[int]) -> Any:
    """One number for a square or the shorter side, as a person would write it."""
    return size[0] if len(size) == 1 else list(size)
