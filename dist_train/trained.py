"""A trained model: from a run's folder, from a checkpoint, or from a file that was exported from one.

Each holds all that is needed: the weights or the program, the configuration, the class names and the shape
of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from dist_train import checkpoint, exported, models
from dist_train.config import Config, UserError, from_file

MOST_VALUES = 2**26  # in an image of a model that may come from elsewhere
# What arguments without sense make a model raise.
UNBUILDABLE = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError,
               RuntimeError, MemoryError)  # fmt: skip


def load_model(
    place: str | Path, *, model: nn.Module | None = None, trust: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model in evaluation mode, on the CPU, and the checkpoint's other contents.

    Args:
        place: a run's folder (its best checkpoint, else its newest), a checkpoint or an exported file.
        model: gets the weights, instead of a model that is made by its name; one that a program gave to
            `fit` has none.
        trust: whether the file may name any object, which is imported and called; otherwise only the models
            of this package, torchvision and timm.

    Raises UserError if there is none, or none that can be trusted.
    """
    path, saved = contents(place)
    config = from_file(saved["config"], path, needed=["model."] if model is None else [], trust=trust)
    return trained(path, saved, config, model, trust), saved


def contents(place: str | Path, warn: Callable[[str], None] = checkpoint.tell) -> tuple[Path, dict[str, Any]]:
    """The whole file that `place` means, and what is in it: of an exported one what it has of a checkpoint.

    `warn` hears of what is damaged and passed over. Raises UserError if there is nothing that can be used.
    """
    if exported.is_exported(place):
        return Path(place), exported.read(Path(place))
    path = checkpoint.find(place, warn)
    return path, checkpoint.load(path, verified=True)


def trained(
    path: Path, saved: dict[str, Any], config: Config, model: nn.Module | None, trust: bool
) -> nn.Module:
    """`model`, or the one that `config` names, with the weights that `contents` found, or its program."""
    what = f"model '{config.model.name}'"
    if math.prod(saved["sample_shape"]) > MOST_VALUES and not trust and model is None:
        raise UserError(
            f"{path}: images of shape {saved['sample_shape']}; if you trust the file: --trust (trust=True)."
        )
    if "program" in saved:
        return exported.Program(path, saved, trust).eval()
    if model is not None:
        what = f"the {type(model).__name__} that is given"
    else:
        args = dict(config.model.args)
        loaded = ("weights", "weights_backbone", "pretrained")
        for name in loaded if ":" not in config.model.name else ("weights",):
            args.pop(name, None)  # those in the file take their place
        try:
            with nullcontext() if trust else models.no_larger(checkpoint.size_of(path), str(path)):
                classes = max(1, len(saved["classes"]))
                model = models.build(config.model.name, args, saved["sample_shape"], classes)
        except UNBUILDABLE as error:
            if trust:
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"{path}: {what} can't be built: {type(error).__name__}: {reason}.") from None
    try:
        model.load_state_dict(saved["average"] or saved["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: does not fit {what}: {reason}") from None
    return model.eval()
