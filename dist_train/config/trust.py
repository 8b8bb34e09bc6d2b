"""Configurations in files that may come from elsewhere: what is not done in their name (docs/security.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dist_train.config.errors import UserError
from dist_train.config.interpolation import texts
from dist_train.config.load import from_mapping
from dist_train.config.objects import GIVEN
from dist_train.config.schema import Config, each_key, get

NAMES = ("model.name", "data.name", "task.name", "optim.name", "schedule.name", "data.target_transform")
TRANSFORMS = ("data.eval_transform", "data.train_transform")

# Whose classes `module:Class` may name: to make one of them runs nothing but its own code.
CLASSES = {
    "torch.nn": "Module",
    "torch.optim": "Optimizer",
    "torchvision.models": "Module",
    "torchvision.transforms.v2": "Transform",
    "dist_train.tasks": "Classification",
}
# Data sets that neither unpack nor unpickle what they find, and whether they would download.
SOURCES = dict.fromkeys(
    ("image_folder", "image_masks", "text", "csv", "arrays", "shards", "FakeData", "ImageFolder"), False
) | dict.fromkeys(
    ("fashion_mnist", "FashionMNIST", "MNIST", "KMNIST", "CIFAR10", "CIFAR100", "STL10", "SVHN"), True
)
# Arguments of timm's models that read files, also pickled ones, or name another model, also one of a hub.
FILES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "model_name")
LENGTH = 10_000  # the greatest length in a transform's arguments, in pixels


def from_file(
    values: Mapping[str, Any],
    where: Path,
    overrides: Sequence[str] = (),
    *,
    needed: Sequence[str],
    trust: bool = False,
) -> Config:
    """The configuration that a checkpoint or a run's folder holds.

    Args:
        where: the file or folder, for messages.
        overrides: `key=value`, the user's own.
        needed: how the full keys begin that will be used; the others are left out.
        trust: whether it may name any object, as the user's own configuration may.

    Raises UserError for a name that is not ours, torch's, torchvision's or timm's, for what is to be taken
    from the environment, and for sizes without sense.
    """
    values = only(values, needed)
    given = _given(values, overrides)
    try:
        written = list(texts(values))
    except RecursionError:
        raise UserError(f"{where}: its configuration is nested too deeply.") from None
    for place, text in written:
        key = ".".join(map(str, place))
        if "${" in text and not trust and not _is_given(key, given):
            raise UserError(
                f"{where}: '{key}' is {text!r}, and nothing is looked up for a file that may come from"
                f" elsewhere; give {key}=VALUE yourself, or trust the file by --trust (trust=True)."
            )
    try:
        config = from_mapping(values, overrides)
    except UserError as error:
        raise UserError(f"{where}: {error}" if str(error).startswith("config") else str(error)) from None
    if trust:
        return config
    for key, why in _objections(config):
        if not _is_given(key, given):
            raise UserError(f"{where}: {key}: {why}; if you trust the file: --trust (trust=True).")
    if not _is_given("data.cache", given):
        config.data.cache = "none"  # nothing is written in its name
    if not _is_given("data.cache_dir", given):
        config.data.cache_dir = None
    downloads = SOURCES.get(config.data.name) and not _is_given("data.root", given)
    if downloads and not _is_given("data.args.download", given):
        config.data.args["download"] = False
    return config


def only(values: Mapping[str, Any], needed: Sequence[str]) -> dict[str, Any]:
    """What is needed of a configuration, and a length, without which it is none."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            kept[name] = {k: v for k, v in value.items() if f"{name}.{k}".startswith(tuple(needed))}
        elif str(name).startswith(tuple(needed)):
            kept[name] = value
    length = kept.setdefault("train", {})
    if isinstance(length, dict) and not (length.get("epochs") or length.get("steps")):
        length["steps"] = 1
    return kept


def _given(values: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """The full keys that the user sets, all arguments among them of an object other than the file's."""
    given = []
    for word in overrides:
        key, _, text = word.removeprefix("~").partition("=")
        given.append(key)
        section, _, name = key.partition(".")
        held = values.get(section)
        named = held.get("name") if isinstance(held, Mapping) else None
        if name == "name" and text.strip("'\"") != named:  # who names the same vouches for the name alone
            given.append(f"{section}.args")
    return given


def _is_given(key: str, given: Sequence[str]) -> bool:
    """Whether the user has set a full key, or what it belongs to."""
    return any(key == other or key.startswith((f"{other}.", f"{other}[")) for other in given)


def _objections(config: Config) -> Iterator[tuple[str, str]]:
    """(full key, why not) of what a file from elsewhere may not ask for."""
    for key, name, args in _named(config):
        if ":" in name and not name.startswith(GIVEN) and not _is_class(name):
            yield key, f"'{name}' would be imported and run, and the file may come from elsewhere"
        if "_transform" in key and (size := max(_numbers(args), default=0)) > LENGTH:
            yield key, f"{name} with {size:,} is out of all proportion"
        if name.startswith("timm/"):
            for argument in sorted(set(FILES) & set(args)):
                yield f"model.args.{argument}", "timm would read a file that it names"
    for key, rule, value in each_key(config):
        if rule.most_from_file is not None and (value or 0) > rule.most_from_file:
            yield key, f"{value:,} is more than a file from elsewhere may ask for ({rule.most_from_file:,})"
    if "root" in config.data.args:
        yield "data.args.root", "it would take the place of data.root"
    if config.data.download_dir:
        yield "data.download_dir", "files would be written and deleted in a folder that the file names"
    source = config.data.name
    if source == "shards" and "://" in (config.data.root or ""):
        yield "data.root", "the file says where it would be fetched from, with the keys of whoever reads it"
    if ":" not in source and source not in SOURCES:
        yield "data.root", f"{source} may unpack or unpickle what lies in a folder that the file names"


def _named(config: Config) -> Iterator[tuple[str, str, Any]]:
    """(full key, name, arguments) of each object that the configuration names."""
    for key in NAMES:
        section = getattr(config, key.partition(".")[0])
        yield key, get(config, key) or "", section.args
    for key in TRANSFORMS:
        yield from _transforms(get(config, key), key)


def _transforms(items: Any, key: str) -> Iterator[tuple[str, str, Any]]:
    """(full key, name, arguments) of each transform in a list, and of those that it is made of."""
    for position, item in enumerate(items if isinstance(items, list) else ()):
        for name, args in item.items() if isinstance(item, dict) else [(item, {})]:
            yield f"{key}[{position}]", str(name), args
            if isinstance(args, dict):
                yield from _transforms(args.get("transforms"), f"{key}[{position}].{name}")


def _is_class(name: str) -> bool:
    """Whether it is one of the classes of CLASSES."""
    module, _, attribute = name.partition(":")
    found = getattr(import_module(module), attribute, None) if module in CLASSES else None
    if not isinstance(found, type):
        return False
    return CLASSES[module] in (base.__name__ for base in found.__mro__)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in nested mappings and lists."""
    if isinstance(value, (int, float)):
        yield abs(value)
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
