"""The learning rate as a function of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dist_train.config import Config, Every, UserError, construct, counted, import_object
from dist_train.config.stopping import is_better

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


def wsd(t: float, decay: float = 0.2, final: float = 0.0, shape: str = "linear") -> float:
    """Warm-up, stable, decay: the peak, then in the last `decay` of the time down to the share `final`.

    Down by a line, or with `shape: root` by one minus the root of the time (Hägele et al., 2024).
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is a share of the time, from 0 to 1, not {decay}")
    if shape not in ("linear", "root"):
        raise ValueError(f"shape is linear or root, not {shape!r}")
    begun = max(0.0, t - (1 - decay)) / decay if decay else 0.0
    return 1 + (final - 1) * (begun if shape == "linear" else math.sqrt(begun))


def plateau(
    values: Sequence[float],
    sign: int = -1,
    factor: float = 0.1,
    patience: int = 10,
    by: float = 0.0,
    final: float = 0.0,
    metric: str = "min eval/loss",
) -> float:
    """Times `factor`, at least `final`, whenever more than `patience` evaluations brought no better value.

    A value of `metric` is better if it is so by more than `by`. A function of all evaluations so far, which
    lie in the checkpoint.
    """
    if not (0 < factor < 1 and patience >= 0 and by >= 0 and 0 <= final <= 1):
        raise ValueError("factor lies between 0 and 1, patience and by are from 0 on, final is from 0 to 1")
    share, best, since = 1.0, math.nan, 0
    for value in values:
        best, since = (value, 0) if is_better(value, best, sign, by) else (best, since + 1)
        if since > patience:
            share, since = max(share * factor, final), 0
    return share


SCHEDULES: dict[str, Callable[..., float]] = {
    f.__name__: f for f in (constant, linear, cosine, one_cycle, step, wsd, plateau)
}
History = Mapping[str, Sequence[float]]  # of each metric its values in all evaluations so far


def schedule(config: Config, total: int, steps_per_epoch: int) -> Callable[[int, History], float]:
    """The share of its learning rate that a weight gets at optimizer step k, k from 0 to total - 1.

    A function of k, and for `plateau` of the evaluations before it; the same for any world size. Raises
    UserError for what would be no share at some step.
    """
    name = config.schedule.name
    function = import_object(name, "schedule.name") if ":" in name else SCHEDULES[name]
    if not callable(function):
        raise UserError(f"schedule.name: '{name}' is no function of the moment t.")
    for given in ("t",) if function is not plateau else ("values", "sign"):
        if given in config.schedule.args:
            raise UserError(f"schedule.args.{given}: it is not yours to set.")
    warmup = Every.parse(config.schedule.warmup).in_steps(steps_per_epoch)
    if warmup >= total and warmup:
        raise UserError(
            f"schedule.warmup: {counted(warmup, 'step')} of warm-up in a training of"
            f" {counted(total, 'step')}; shorten it."
        )
    if function is plateau:
        return _by_evaluations(config.schedule.args, warmup)
    time = max(1, total - 1 - warmup)
    args = {
        key: [_share(item, warmup, time, steps_per_epoch) for item in value]
        if isinstance(value, list)
        else _share(value, 0, time, steps_per_epoch)
        for key, value in config.schedule.args.items()
    }
    for t in _corners(args):  # what is wrong at any step, before the first one
        value = construct(function, args, "schedule.args", (TypeError, ValueError, ArithmeticError), t=t)
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            shown = f"{value:g}" if isinstance(value, (int, float)) else repr(value)
            raise UserError(
                f"schedule.args: with {args} the share of the learning rate by {name} is {shown} at the"
                f" moment {t:g} (from 0 to 1); it must be a number from 0 on."
            )

    def share(step: int, history: History) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return function(t=(step - warmup) / time, **args)  # type: ignore[no-any-return]

    return share


def watched(args: Mapping[str, Any]) -> tuple[str, int]:
    """By which metric `plateau` judges, and whether its best value is the greatest (1) or smallest (-1).

    Raises UserError for what is none.
    """
    wanted = args.get("metric", "min eval/loss")
    direction, _, metric = str(wanted).partition(" ")
    if direction not in ("min", "max") or not metric.startswith("eval/"):
        raise UserError(f"schedule.args.metric: is written as `max eval/accuracy`, not {wanted!r}.")
    return metric, 1 if direction == "max" else -1


def _by_evaluations(args: dict[str, Any], warmup: int) -> Callable[[int, History], float]:
    """The schedule `plateau`, after a warm-up."""
    metric, sign = watched(args)
    construct(plateau, args, "schedule.args", values=())

    def share(step: int, history: History) -> float:
        return (step + 1) / warmup if step < warmup else plateau(history.get(metric, ()), sign, **args)

    return share


def _share(value: Any, start: int, time: int, steps_per_epoch: int) -> Any:
    """A length such as `2 epochs`, or a moment so long after the beginning, as a share of the time.

    Args:
        start, time: steps before the schedule begins, and those that it takes.
    """
    if not isinstance(value, str) or not re.fullmatch(r"\d+ (step|epoch)s?", value):
        return value
    return (Every.parse(value).in_steps(steps_per_epoch) - start) / time


def _corners(args: dict[str, Any]) -> list[float]:
    """Moments from 0 to 1 that show what a schedule does: some everywhere, and those about each argument."""
    values = [item for value in args.values() for item in (value if isinstance(value, list) else [value])]
    moments = [value for value in values if isinstance(value, (int, float)) and 0 < value < 1]
    about = [
        near for moment in moments for near in (math.nextafter(moment, 0), moment, math.nextafter(moment, 1))
    ]
    return [*(k / 20 for k in range(21)), *about]
