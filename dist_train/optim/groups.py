"""Which weights are trained otherwise than the rest: by their names, by their kind, and by their depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from dist_train.config import Config, UserError, nearest

KINDS = ("norms", "biases", "embeddings")  # which `optim.no_decay` knows besides patterns
LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Place(NamedTuple):
    """To which group a weight belongs."""

    rule: int | None  # the first of `optim.groups` that matches its name
    above: int  # layers between its own and the last one; 0 without `optim.layer_decay`
    decays: bool


def places(config: Config, model: nn.Module) -> dict[nn.Parameter, Place]:
    """The group of each trained weight, in the order of the model.

    Raises UserError for a pattern that matches no weight, or only such as an earlier one has matched.
    """
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    rules = _rules(config.optim.groups, named, model)
    above = _above(model) if config.optim.layer_decay != 1 else {}
    bare = _undecayed(config.optim.no_decay, named, model)
    return {
        weight: Place(rules.get(name), above.get(weight, 0), name not in bare)
        for name, weight in named.items()
    }


def grouped(
    config: Config, places: Mapping[nn.Parameter, Place], weights: Sequence[nn.Parameter], lr: float
) -> list[Any]:
    """`weights` as an optimizer takes them: as they are, or in groups with options of their own.

    Args:
        lr: the rate of weights in no group.
    """
    if all(places[weight] == Place(None, 0, True) for weight in weights):
        return list(weights)
    groups: dict[Place, dict[str, Any]] = {}
    for weight in weights:
        place = places[weight]
        if place not in groups:
            groups[place] = {"params": [], **_options(config, place, lr)}
        groups[place]["params"].append(weight)
    return list(groups.values())


def _options(config: Config, place: Place, lr: float) -> dict[str, Any]:
    """What the weights of a place have of their own."""
    own = {} if place.rule is None else dict(config.optim.groups[place.rule])
    own.pop("match", None)
    rate = own.pop("lr", lr)
    rate = float(rate[1:]) * lr if isinstance(rate, str) else rate
    rate *= config.optim.layer_decay**place.above
    return ({} if place.decays else {"weight_decay": 0.0}) | own | ({} if rate == lr else {"lr": rate})


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern`, in which `*` is any text, is a weight's name or that of a module that holds it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _rules(groups: Sequence[Any], named: Mapping[str, nn.Parameter], model: nn.Module) -> dict[str, int]:
    """The number of the first of `groups` that matches, by the name of the weight."""
    found: dict[str, int] = {}
    for number, group in enumerate(groups):
        patterns = group["match"] if isinstance(group["match"], list) else [group["match"]]
        for pattern in patterns:
            key = f"optim.groups[{number}].match"
            new = [name for name in _matched(key, pattern, named, model) if name not in found]
            if not new:
                raise UserError(f"{key}: all weights that match '{pattern}' are in groups before it.")
            found |= dict.fromkeys(new, number)
    return found


def _matched(key: str, pattern: str, named: Mapping[str, nn.Parameter], model: nn.Module) -> list[str]:
    """The trained weights whose names match. Raises UserError, naming `key`, if there is none."""
    if found := [name for name in named if matches(name, pattern)]:
        return found
    known = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    if any(matches(name, pattern) for name in known):
        raise UserError(f"{key}: nothing that matches '{pattern}' has weights to train.")
    raise UserError(f"{key}: no weight's name matches '{pattern}'{nearest(pattern, known)}.")


def _undecayed(words: Sequence[str], named: Mapping[str, nn.Parameter], model: nn.Module) -> set[str]:
    """The names of weights that `optim.no_decay` means."""
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(prefix, recurse=False):
            if "norm" in type(module).__name__.lower():  # LayerNorm2d, BatchNormAct2d, RMSNorm, ...
                kinds["norms"].append(name)
            if name.endswith("bias"):
                kinds["biases"].append(name)
            if isinstance(module, nn.Embedding):
                kinds["embeddings"].append(name)
    key, bare = "optim.no_decay", set()
    for word in words:
        near = nearest(word, KINDS)
        if word not in kinds and near and not any(matches(name, word) for name in named):
            raise UserError(f"{key}: no weight's name matches '{word}'{near}.")
        bare |= set(kinds[word] if word in kinds else _matched(key, word, named, model))
    return bare


# --- depth ----------------------------------------------------------------------------------------


def _above(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many layers lie between the one of each weight and the last one."""
    numbers = layers(model)
    return {weight: max(numbers.values()) - number for weight, number in numbers.items()}


def layers(model: nn.Module) -> dict[nn.Parameter, int]:
    """The number of the layer of each weight, from the input on.

    A model of timm knows its own layers. Of others these are the children of Sequentials and lists, and what
    stands beside those, in the order in which they were made; norms, tables of embeddings and loose weights,
    such as a class token, go with the layer before them.
    """
    if matcher := getattr(model, "group_matcher", None):
        from timm.models import group_parameters

        by_name = group_parameters(model, matcher(coarse=False), reverse=True)
        return {weight: by_name[name] for name, weight in model.named_parameters()}
    numbers: dict[nn.Parameter, int] = {}
    number, is_begun = 0, False
    for module, weights, is_whole in _parts(model):
        is_table = isinstance(module, nn.Embedding)
        is_layer = is_whole and not is_table and any(weight.ndim > 1 for weight in weights)
        number += is_layer and is_begun
        is_begun |= is_layer or is_table
        for weight in weights:
            numbers.setdefault(weight, number)
    return numbers


def _parts(
    module: nn.Module, is_listed: bool = False, is_top: bool = True
) -> Iterator[tuple[nn.Module, list[nn.Parameter], bool]]:
    """(module, its weights, whether these are all that it holds) in the order in which they were made.

    Opened is what holds a list, but for the items of lists, whatever they hold.
    """
    is_list = _kind(module) in LISTS
    is_opened = (
        is_list or is_top or (not is_listed and any(_kind(inner) in LISTS for inner in module.modules()))
    )
    yield module, list(module.parameters(recurse=not is_opened)), not is_opened
    if is_opened:
        holding = sum(1 for child in module.children() if next(child.parameters(), None) is not None)
        for child in module.children():
            yield from _parts(child, is_list, is_top and holding == 1)  # nothing but a wrapper


def _kind(module: nn.Module) -> type:
    """Its class, below the one that FSDP2 puts on top."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed"))
