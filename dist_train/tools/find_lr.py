"""`dist-train find-lr`: a learning-rate range test (Smith, "Cyclical Learning Rates", WACV 2017).

The rate rises from one step to the next by the same factor, and with it, beyond some rate, the loss. The
suggestion is a tenth of the rate at which the smoothed loss is lowest, a rule of fastai's: there it falls
fast, with a margin to where training breaks.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

from dist_train import runtime
from dist_train.checkpoint.files import write_output
from dist_train.config import Config, UserError
from dist_train.tools.dryrun import DryRun
from dist_train.tree import tree_sum

BLOWN_UP = 4  # times the lowest smoothed loss: there the test ends
MEMORY = 0.9  # of the losses before, in the smoothed one
EARLY = 10  # steps in which the smoothed loss says little yet


@dataclass(frozen=True)
class RangeTest:
    """The loss `[N]` at each rate `[N]`; the smoothed loss, and where that is lowest."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    lowest: int

    @property
    def fell(self) -> bool:
        """Whether the smoothed loss fell by more than single losses are off it."""
        off = (abs(loss - smooth) for loss, smooth in zip(self.losses, self.smoothed, strict=True))
        return self.smoothed[EARLY] - self.smoothed[self.lowest] > 3 * median(islice(off, self.lowest + 1))

    @property
    def suggestion(self) -> float | None:
        """A learning rate; None where the loss did not fall, or had not risen by the end."""
        return self.rates[self.lowest] / 10 if self.fell and self.lowest < len(self.rates) - 1 else None


def find_lr(config: Config, steps: int, lowest: float, highest: float) -> RangeTest | None:
    """Trains up to so many steps, the rate `optim.lr` rising from `lowest` to `highest`; leaves no run.

    None on all ranks but the first. Raises UserError if the job can't be trained so.
    """
    if not 0 < lowest < highest:
        raise UserError(
            f"--highest: {highest:g} must be more than --lowest, {lowest:g}, and that more than 0."
        )
    if not config.optim.lr:
        raise UserError("optim.lr: is 0, of which no other rate is a multiple; give another one.")
    ranks = runtime.start(config)
    try:
        job = DryRun(config, ranks)
        rates: list[float] = []
        losses: list[float] = []
        smoothed: list[float] = []
        for number in range(steps):
            rate = lowest * (highest / lowest) ** (number / (steps - 1))
            weight, total = ranks.sum(tree_sum(job.step(rate / config.optim.lr).sums)[:2]).tolist()
            loss = total / weight if weight else math.nan
            if not math.isfinite(loss):
                break
            rates.append(rate)
            losses.append(loss)
            smoothed.append(_smooth(losses))
            if number >= EARLY and smoothed[-1] > BLOWN_UP * min(smoothed[EARLY:]) > 0:
                break
        if len(losses) <= EARLY:
            raise UserError(
                f"--lowest: the loss is not finite at a rate of {rate:.2g} already; begin with a lower one."
            )
    finally:
        runtime.stop(ranks.accelerator)
    where = min(range(EARLY, len(losses)), key=smoothed.__getitem__)
    return RangeTest(rates, losses, smoothed, where) if ranks.is_main else None


def _smooth(losses: list[float]) -> float:
    """A mean of all losses, in which each counts less than the one after it."""
    weights = [MEMORY**age for age in range(len(losses))]
    return sum(w * loss for w, loss in zip(weights, reversed(losses), strict=True)) / sum(weights)


def draw(found: RangeTest, output: Path) -> None:
    """Draws the losses over the rates to a PNG file, and where the suggestion is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.semilogx(found.rates, found.losses, color="0.8", label="loss of a step")
    axis.semilogx(found.rates, found.smoothed, color="C0", label="smoothed")
    axis.axvline(found.rates[found.lowest], color="0.5", linestyle=":", label="lowest")
    if found.suggestion:
        axis.axvline(found.suggestion, color="C3", label=f"suggestion {found.suggestion:.2g}")
    low, high = min(found.losses), max(found.smoothed[: found.lowest + 1])
    axis.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    axis.set_xlabel("optim.lr")
    axis.set_ylabel("training loss")
    axis.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    plt.close(figure)
    write_output(output, drawn.getvalue())


def told(found: RangeTest) -> str:
    """The suggestion in a sentence, with how it was found."""
    rate = found.rates[found.lowest]
    if found.suggestion:
        return (
            f"suggestion: optim.lr={found.suggestion:.2g}, a tenth of the rate at which the smoothed loss"
            f" was lowest ({found.smoothed[found.lowest]:.4g} at {rate:.2g})"
        )
    if found.fell:
        return f"no suggestion: at {rate:.2g} the loss still falls; give a higher --highest"
    return (
        f"no suggestion: up to {found.rates[-1]:.2g} the loss hardly fell; give a higher --highest, or more"
        " --steps"
    )
