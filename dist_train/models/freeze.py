"""Frozen weights: which of a model's weights are not trained, to the end or up to a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dist_train.config import UserError, nearest


class Frozen:
    """The weights of a model that patterns name, and the normalizations among them.

    A frozen weight has no gradient, so no optimizer moves it: not by momentum, not by weight decay. BatchNorm
    of frozen layers stays in evaluation mode, since its averages would move. Dropout has nothing that
    could, and is left as it is: it is noise for the layers behind.

    Args:
        patterns: as in `model.freeze`.
        until: the step from which on all weights are trained; None: never.

    Raises UserError for a pattern that matches nothing, and where nothing is left to train.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str], until: int | None) -> None:
        self.model, self.until = model, until
        self.names = frozen(model, patterns)
        self.norms = [
            module
            for name, module in model.named_modules()
            if isinstance(module, _NormBase) and _is_frozen(name, module, self.names, patterns)
        ]
        if self.names and until is None:  # for good: nobody needs to make room for their gradients
            self._let_train(False)

    def set(self, step: int) -> bool:
        """Makes the model ready for a step; returns whether other weights are trained now than before."""
        trained = self.until is not None and step >= self.until
        for module in self.norms:  # in each step, as an evaluation leaves them in training mode
            module.train(trained)
        if not self.names or self._are_trained == trained:
            return False
        self._let_train(trained)
        return True

    _are_trained = True

    def _let_train(self, trained: bool) -> None:
        for name, weight in self.model.named_parameters():  # FSDP has put others in their place
            if name in self.names:
                weight.requires_grad_(trained)
        self._are_trained = trained


def frozen(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The names of the weights that patterns name, by themselves or by a layer that holds them.

    The last pattern that matches decides; `!` before it takes back.
    """
    weights = [name for name, _ in model.named_parameters()]
    known = [name for name, _ in model.named_modules() if name] + weights
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in known):
            raise UserError(
                f"model.freeze: no layer or weight is named like '{pattern}'{nearest(pattern, known)}."
            )
    found = {name for name in weights if _is_named(name, patterns)}
    if found and all(name in found or not weight.requires_grad for name, weight in model.named_parameters()):
        raise UserError(
            "model.freeze: all weights of the model are frozen, so there is nothing to train; take some back,"
            f" as by '!{weights[-1].rpartition('.')[0] or weights[-1]}'."
        )
    return found


def frozen_for_good(model: nn.Module, section: Mapping[str, Any]) -> set[str]:
    """The weights that a recorded section `model` leaves out of the optimizer."""
    if section.get("freeze_until") is not None:
        return set()
    return {name for name, _ in model.named_parameters() if _is_named(name, section.get("freeze", []))}


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether patterns name a layer or weight, or what holds it."""
    parts = name.split(".")
    places = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    named = False
    for pattern in patterns:
        if any(fnmatchcase(place, pattern.removeprefix("!")) for place in places):
            named = not pattern.startswith("!")
    return named


def _is_frozen(name: str, module: nn.Module, names: set[str], patterns: Sequence[str]) -> bool:
    """Whether all weights of a layer are frozen; of one without weights, whether it is named."""
    own = [f"{name}.{weight}" for weight, _ in module.named_parameters(recurse=False)]
    return names.issuperset(own) if own else _is_named(name, patterns)
