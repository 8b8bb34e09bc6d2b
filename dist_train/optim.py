"""Optimizers by name, the learning rate as a function of the step, and the moving average of weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dist_train.config import Config, Every, UserError, construct, counted, import_object, nearest
from dist_train.muon import Muon, split
from dist_train.rows import is_sharded, local


def build(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over all trainable weights of `model`.

    Each of its groups of weights keeps its own rate, which the schedule scales, as `initial_lr`. Raises
    UserError for an unknown name, wrong arguments, or a model with nothing to train.
    """
    name, args = config.optim.name, dict(config.optim.args)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise UserError(f"model.name: '{config.model.name}' has no weights to train.")
    for position in ("params", "lr"):
        if position in args:
            raise UserError(f"optim.args.{position}: set optim.lr; the weights are given already.")
    if name == "Muon":
        weights, others = split(model)
        args["rest"] = _rest(config, args.get("rest", {"AdamW": {}}), others)
    own = import_object(name, "optim.name") if ":" in name else None
    optimizer = _make(config, own or _named(name, "optim.name"), weights, args, "optim.args")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optim.name: '{name}' made a {type(optimizer).__name__}, no optimizer of torch.")
    for group in optimizer.param_groups:
        group["initial_lr"] = rate = float(group.get("lr", config.optim.lr))
        if not (math.isfinite(rate) and rate >= 0):
            raise UserError(f"optim.lr: the rate of a group of weights of '{name}' is {rate}.")
    return optimizer


def _rest(config: Config, named: Any, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What steps the weights that Muon leaves alone, named as `{name: {argument: value}}`."""
    key = "optim.args.rest"
    if not isinstance(named, dict) or len(named) != 1:
        raise UserError(f"{key}: write the optimizer of all other weights as `{{AdamW: {{lr: 0.001}}}}`.")
    ((name, args),) = named.items()
    return _make(config, _named(str(name), key), weights, args or {}, f"{key}.{name}")


def _named(name: str, key: str) -> Any:
    """The class of this name in torch.optim; but our own Muon, which takes convolutions, too."""
    if name == "Muon":
        return Muon
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


def _make(config: Config, cls: Any, weights: list[nn.Parameter], args: dict[str, Any], key: str) -> Any:
    """An optimizer of these weights, with the rate of the configuration unless it is among `args`."""
    if not {"foreach", "fused", "capturable", "differentiable"} & set(args):
        # One kernel for all weights. Not with fp16, whose scaler must see every step.
        fits = "fused" in inspect.signature(cls).parameters and config.precision != "fp16"
        if weights and is_sharded(weights[0]):  # of shards torch's Adams alone have one
            fits = fits and issubclass(cls, (torch.optim.Adam, torch.optim.AdamW))
        fused = fits and weights[0].device.type in ("cpu", "cuda")
        args = args | ({"fused": True} if fused else {})
    return construct(partial_named(cls, weights), args, key, lr=config.optim.lr)


def partial_named(
    cls: Callable[..., torch.optim.Optimizer], weights: Sequence[nn.Parameter]
) -> Callable[..., torch.optim.Optimizer]:
    """`cls` with its weights given, under its own name, for the error messages."""
    function = partial(cls, weights)
    function.__name__ = getattr(cls, "__name__", "optimizer")  # type: ignore[attr-defined]
    return function


# --- the learning rate ----------------------------------------------------------------------------
# Each schedule is the share of the peak learning rate at a moment t, from 0 (the end of the warm-up)
# to 1 (the end of the training).


def constant(t: float) -> float:
    """Always the peak."""
    return 1.0


def linear(t: float, final: float = 0.0, rise: float = 0.0) -> float:
    """Straight up in the first `rise` of the time, then straight down to the share `final`."""
    if not 0 <= rise < 1:
        raise ValueError(f"rise is a share of the time, from 0 to below 1, not {rise}")
    return t / rise if t < rise else 1 + (final - 1) * (t - rise) / (1 - rise)


def cosine(t: float, final: float = 0.0) -> float:
    """Half a cosine down to the share `final` (Loshchilov and Hutter, 2017, without restarts)."""
    return final + (1 - final) * (1 + math.cos(math.pi * t)) / 2


def one_cycle(t: float, rise: float = 0.3, start: float = 0.04, final: float = 0.0) -> float:
    """Up by a cosine from the share `start` in the first `rise` of the time, then down to `final`.

    The policy of Smith and Topin (2018), momentum left alone.
    """
    if not 0 <= rise <= 1:
        raise ValueError(f"rise is a share of the time, from 0 to 1, not {rise}")
    if t < rise or rise == 1:
        return 1 + (start - 1) * (1 + math.cos(math.pi * t / rise)) / 2
    return cosine((t - rise) / (1 - rise), final)


def step(t: float, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1) -> float:
    """Times `gamma` at each of the moments `milestones`, from 0 to 1."""
    if not isinstance(milestones, (list, tuple)) or not all(0 <= moment <= 1 for moment in milestones):
        raise ValueError(f"milestones is a list of moments from 0 to 1, not {milestones!r}")
    return gamma ** sum(t >= moment for moment in milestones)


SCHEDULES = {f.__name__: f for f in (constant, linear, cosine, one_cycle, step)}


def schedule(config: Config, total: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The share of its learning rate that a weight gets at optimizer step k, k from 0 to total - 1.

    The same for any world size. Raises UserError for what would be no share at some step.
    """
    name, args = config.schedule.name, config.schedule.args
    function = import_object(name, "schedule.name") if ":" in name else SCHEDULES[name]
    if not callable(function):
        raise UserError(f"schedule.name: '{name}' is no function of the moment t.")
    if "t" in args:
        raise UserError("schedule.args.t: the moment is not yours to set.")
    warmup = Every.parse(config.schedule.warmup).in_steps(steps_per_epoch)
    if warmup >= total and warmup:
        raise UserError(
            f"schedule.warmup: {counted(warmup, 'step')} of warm-up in a training of"
            f" {counted(total, 'step')}; shorten it."
        )
    for t in _corners(args):  # what is wrong at any step, before the first one
        value = construct(function, args, "schedule.args", (TypeError, ValueError, ArithmeticError), t=t)
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            shown = f"{value:g}" if isinstance(value, (int, float)) else repr(value)
            raise UserError(
                f"schedule.args: with {args} the share of the learning rate by {name} is {shown} at the"
                f" moment {t:g} (from 0 to 1); it must be a number from 0 on."
            )

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return function(t=(step - warmup) / max(1, total - 1 - warmup), **args)

    return share


def _corners(args: dict[str, Any]) -> list[float]:
    """Moments from 0 to 1 that show what a schedule does: some everywhere, and those about each argument."""
    values = [item for value in args.values() for item in (value if isinstance(value, list) else [value])]
    moments = [value for value in values if isinstance(value, (int, float)) and 0 < value < 1]
    about = [
        near for moment in moments for near in (math.nextafter(moment, 0), moment, math.nextafter(moment, 1))
    ]
    return [*(k / 20 for k in range(21)), *about]


def scale_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Gives each group of weights this share of its own learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share


def average_updater(average: nn.Module, model: nn.Module, decay: float) -> Callable[[int], None]:
    """A function of the step that moves the moving average `average` towards `model`.

    A young average moves faster, by the step alone: nothing but the weights is state. Numbers that are
    not floating point (BatchNorm's counters) are copied.
    """
    both = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    pairs = [pair for pair in both if isinstance(pair[0], torch.Tensor)]  # not what get_extra_state gives
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    others = [pair for pair in pairs if not pair[0].is_floating_point()]
    old, new = [local(pair[0]) for pair in floats], [local(pair[1]) for pair in floats]  # if sharded

    @torch.no_grad()
    def update(step: int) -> None:
        torch._foreach_lerp_(old, new, 1 - min(decay, (1 + step) / (10 + step)))
        for target, value in others:
            target.copy_(value)

    return update
