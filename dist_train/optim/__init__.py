"""Optimizers by name, over weights in groups, and the moving average of weights."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dist_train.checkpoint.snapshot import unreadable
from dist_train.config import Config, UserError, construct, counted, import_object, nearest
from dist_train.optim.groups import Place, grouped, places
from dist_train.optim.muon import Muon, split
from dist_train.rows import is_sharded, local


def build(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over all trainable weights of `model`.

    Each of its groups of weights keeps its own rate, which the schedule scales, as `initial_lr`. Raises
    UserError for an unknown name, wrong arguments or groups, a model with nothing to train, and an optimizer
    that can't take a step, or whose state could not be read back from a checkpoint.
    """
    name = config.optim.name
    of_weights = places(config, model)
    if not of_weights:
        raise UserError(f"model.name: '{config.model.name}' has no weights to train.")
    for position in ("params", "lr"):
        if position in config.optim.args:
            raise UserError(f"optim.args.{position}: set optim.lr; the weights are given already.")
    parts = split(model) if name == "Muon" else (list(of_weights), [])
    optimizer = _assemble(config, of_weights, *parts)
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise UserError(f"optim.name: '{name}' must be told of each evaluation, which this loop doesn't do.")
    for group in optimizer.param_groups:
        group["initial_lr"] = rate = float(group.get("lr", config.optim.lr))
        if not (math.isfinite(rate) and rate >= 0):
            raise UserError(f"optim.lr: the rate of a group of weights of '{name}' is {rate}.")
    _try(config, of_weights, *parts)
    return optimizer


def _assemble(
    config: Config,
    places: Mapping[nn.Parameter, Place],
    weights: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter],
) -> torch.optim.Optimizer:
    """The optimizer of `weights`; those that Muon leaves alone are `others`."""
    name, args = config.optim.name, dict(config.optim.args)
    if name == "Muon":
        args["rest"] = _rest(config, places, args.get("rest", {"AdamW": {}}), others)
    cls = import_object(name, "optim.name") if ":" in name else _named(name, "optim.name")
    optimizer = _make(config, cls, grouped(config, places, weights, config.optim.lr), args, "optim.args")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optim.name: '{name}' made a {type(optimizer).__name__}, no optimizer of torch.")
    return optimizer


def _rest(
    config: Config, places: Mapping[nn.Parameter, Place], named: Any, weights: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """What steps the weights that Muon leaves alone, named as `{name: {argument: value}}`."""
    key = "optim.args.rest"
    if not isinstance(named, dict) or len(named) != 1:
        raise UserError(f"{key}: write the optimizer of all other weights as `{{AdamW: {{lr: 0.001}}}}`.")
    ((name, args),) = named.items()
    args = args or {}
    rate = args.get("lr")
    groups = grouped(config, places, weights, rate if isinstance(rate, (int, float)) else config.optim.lr)
    return _make(config, _named(str(name), key), groups, args, f"{key}.{name}")


def _named(name: str, key: str) -> Any:
    """The class of this name in torch.optim or timm.optim; but our own Muon, for convolutions, too."""
    if name == "Muon":
        return Muon
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"), key)
    known = [
        item
        for item, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and item not in ("Optimizer", "LBFGS", "SparseAdam")  # need closures, sparse gradients
    ]
    if name not in known:
        raise UserError(
            f"{key}: torch.optim has no optimizer '{name}' that works with this loop{nearest(name, known)}."
        )
    return getattr(torch.optim, name)


def _timm(name: str, key: str) -> Any:
    """An optimizer of timm, with the arguments that timm gives it."""
    try:
        from timm.optim import get_optimizer_class, list_optimizers
    except ModuleNotFoundError:
        raise UserError(
            f"{key}: 'timm/{name}' needs the package timm: pip install 'dist-train[timm]'."
        ) from None
    known = [str(item) for item in list_optimizers()]
    if name not in known:
        raise UserError(f"{key}: timm has no optimizer '{name}'{nearest(name, known)}.")
    try:
        return get_optimizer_class(name)
    except (ImportError, AssertionError) as error:  # those of other packages, for GPUs alone
        raise UserError(f"{key}: 'timm/{name}' can't be used here: {error}.") from None


def _make(config: Config, cls: Any, groups: Sequence[Any], args: dict[str, Any], key: str) -> Any:
    """An optimizer of weights, maybe in groups, with the rate of the configuration unless it is in `args`."""
    weights = [weight for item in groups for weight in (item["params"] if isinstance(item, dict) else [item])]
    if not {"foreach", "fused", "capturable", "differentiable"} & set(args):
        # One kernel for all weights. Not with fp16, whose scaler must see every step.
        fits = "fused" in inspect.signature(cls).parameters and config.precision != "fp16"
        if weights and is_sharded(weights[0]):  # of shards torch's Adams alone have one
            fits = fits and cls in (torch.optim.Adam, torch.optim.AdamW)
        fused = fits and bool(weights) and weights[0].device.type in ("cpu", "cuda")
        args = args | ({"fused": True} if fused else {})
    optimizer = construct(partial_named(cls, groups), args, key, lr=config.optim.lr)
    known = getattr(optimizer, "defaults", {})
    for group in groups:
        for option in group if isinstance(group, dict) else ():
            if option not in {"params", "lr", *known}:
                name = type(optimizer).__name__
                raise UserError(
                    f"optim: {name} has no option '{option}', which optim.groups or optim.no_decay gives to"
                    f" weights{nearest(option, known)}."
                )
    return optimizer


def partial_named(
    cls: Callable[..., torch.optim.Optimizer], groups: Sequence[Any]
) -> Callable[..., torch.optim.Optimizer]:
    """`cls` with its weights given, under its own name, for the error messages."""
    function = partial(cls, groups)
    function.__name__ = getattr(getattr(cls, "func", cls), "__name__", "optimizer")  # type: ignore[attr-defined]
    return function


def _try(
    config: Config,
    places: Mapping[nn.Parameter, Place],
    weights: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter],
) -> None:
    """Lets such an optimizer take a step on small weights, and looks at the state that it then has."""
    small = {
        weight: nn.Parameter(torch.ones([min(n, 2) for n in weight.shape], device=weight.device))
        for weight in places
    }
    try:
        optimizer = _assemble(
            config,
            {small[weight]: place for weight, place in places.items()},
            [small[weight] for weight in weights],
            [small[weight] for weight in others],
        )
    except Exception:  # one of the user's own, made for these very weights
        return
    for weight in small.values():
        weight.grad = torch.ones_like(weight)
    try:
        optimizer.step()
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(
            f"optim.name: '{config.optim.name}' can't take a step in this loop: {reason}."
        ) from error
    if bad := unreadable(optimizer.state_dict(), "optimizer"):
        raise UserError(f"optim.name: no checkpoint could hold the state of '{config.optim.name}': {bad}.")


def describe(optimizer: torch.optim.Optimizer) -> str:
    """Its groups of weights in a few words."""
    groups = optimizer.param_groups
    rates = [group["initial_lr"] for group in groups]
    bare = sum(len(group["params"]) for group in groups if not group.get("weight_decay"))
    total = sum(len(group["params"]) for group in groups)
    return (
        f"{len(groups)} groups of weights, with rates from {min(rates):g} to {max(rates):g}, {bare} of"
        f" {counted(total, 'weight')} without decay"
    )


def restore(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Restores the optimizer's tensors, and the options of its groups of weights.

    Options that may lie in a group as state stay as they were saved, unless the configuration's are others
    now. The rate that the schedule scales, and how steps are computed, are the configuration's.

    Args:
        before, now: the section `optim` of the saved configuration and of this one.

    Raises ValueError where weights are in other groups now.
    """
    if _partition(before) != _partition(now):
        raise ValueError(
            "optim.groups, optim.no_decay or optim.layer_decay put weights into other groups now"
        )
    present, count = len(optimizer.param_groups), len(saved["param_groups"])
    if present != count:
        plural = "s" if present > 1 else ""
        raise ValueError(f"the optimizer has {present} group{plural} of weights, the saved one {count}")
    is_changed = any(before.get(name) != now.get(name) for name in ("args", "groups"))
    ours = {"initial_lr", "fused", "foreach"}
    groups = []
    for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        kept = {"params"} if is_changed else old.keys() - ours
        groups.append(new | {name: old[name] for name in kept})
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _partition(optim: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides which weights are together, of the section `optim` of a configuration."""
    matches = [group["match"] for group in optim.get("groups", [])]
    return matches, optim.get("no_decay", []), optim.get("layer_decay", 1) != 1


def scale_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Gives each group of weights this share of its own learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share


def average_updater(average: nn.Module, model: nn.Module, decay: float) -> Callable[[int], None]:
    """A function of the step that moves the moving average `average` towards `model`.

    A young average moves faster, by the step alone: nothing but the weights is state. Numbers that are
    not floating point (BatchNorm's counters) are copied, and so is what modules keep beside tensors.
    """
    both = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    pairs = [pair for pair in both if isinstance(pair[0], torch.Tensor)]  # not what get_extra_state gives
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    others = [pair for pair in pairs if not pair[0].is_floating_point()]
    old, new = [local(pair[0]) for pair in floats], [local(pair[1]) for pair in floats]  # if sharded
    modules = zip(average.modules(), model.modules(), strict=True)
    keeping = [pair for pair in modules if type(pair[1]).get_extra_state is not nn.Module.get_extra_state]

    @torch.no_grad()
    def update(step: int) -> None:
        torch._foreach_lerp_(old, new, 1 - min(decay, (1 + step) / (10 + step)))
        for target, value in others:
            target.copy_(value)
        for module, followed in keeping:
            module.set_extra_state(copy.deepcopy(followed.get_extra_state()))

    return update
