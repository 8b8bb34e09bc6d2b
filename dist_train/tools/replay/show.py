"""What a replayed step did, as lines of text and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dist_train.config import UserError, counted, printable
from dist_train.tools.pictures import write_grid
from dist_train.tools.replay.step import Replayed, Seen
from dist_train.tools.trace import LOSS, Fault, Statistics

COLUMNS = 8
MOST_DRAWN = 64  # samples, those of the greatest losses
MOST_NAMED = 8  # samples of a number that is not finite

AT_FAULT = {
    ("forward", "input"): "its input is at fault",
    ("forward", "weight"): "its weight is at fault",
    ("forward", "computation"): "its computation is at fault: its input and its weights are finite",
    ("backward", "computation"): "its computation is at fault: the gradient that it was given is finite",
}


def table(replayed: Replayed) -> str:
    """The step as lines of text.

    The samples, those at fault and of a great loss first; the gradient of each layer; what modules gave, if
    that was asked for; whether the gradient is finite; and who made the first number that isn't.
    """
    lines = [
        f"from {replayed.start}: loss {replayed.loss:.9g} over {counted(len(replayed.samples), 'sample')}"
    ]
    lines += [_line(seen, replayed) for seen in _worst_first(replayed)]
    if replayed.layers:
        rows = [
            [each.name, each.kind, f"{each.gradient:.4g}", f"{each.weights:.4g}"] for each in replayed.layers
        ]
        lines += ["", *columns([["layer", "type", "gradient norm", "weight norm"], *rows], numbers=2)]
    if replayed.activations:
        named = [[name or "(model)", kind] for name, (kind, _) in replayed.activations.items()]
        numbers = [cells(each) for _, each in replayed.activations.values()]
        rows = [[*names, *row] for names, row in zip(named, numbers, strict=True)]
        lines += ["", *columns([["activations of", "type", *HEADINGS], *rows], numbers=len(HEADINGS))]
    if len(lines) > 1 + len(replayed.samples):
        lines.append("")
    broken = [name for name, norm in replayed.gradients.items() if not math.isfinite(norm)]
    if broken:
        lines.append(f"the gradient is not finite: {printable(', '.join(broken))}")
    else:
        norm = sum(value**2 for value in replayed.gradients.values()) ** 0.5
        lines.append(f"the gradient is finite, its norm {norm:.6g}")
    return "\n".join(lines + _faults(replayed, bool(broken)))


HEADINGS = ("shape", "mean", "std", "min", "max", "zeros", "not finite")


def cells(numbers: Statistics) -> list[str]:
    """Statistics in the cells of a table, under HEADINGS."""
    values = (numbers.mean, numbers.std, numbers.low, numbers.high)
    if not numbers.count:
        return [str(list(numbers.shape)), "-", "-", "-", "-", "-", f"{numbers.broken:,}"]
    zeros = f"{numbers.zeros / (numbers.count + numbers.broken):.1%}"
    return [str(list(numbers.shape)), *(f"{value:.4g}" for value in values), zeros, f"{numbers.broken:,}"]


def columns(rows: Sequence[Sequence[str]], numbers: int) -> list[str]:
    """Rows of cells as aligned lines; of each the last `numbers` to the right."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    left = len(widths) - numbers
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in shown
    ]


def picture(replayed: Replayed, output: Path) -> None:
    """Draws the samples as the model saw them, those at fault and of a great loss first.

    Above each stand its class, the prediction, loss and number. Raises UserError where samples are no images.
    """
    worst = [seen for seen in _worst_first(replayed) if seen.image is not None]
    if not worst:
        raise UserError("the inputs of this run are no images, so they can't be drawn.")
    drawn = [(seen.image, _title(seen)) for seen in worst[:MOST_DRAWN] if seen.image is not None]
    write_grid([drawn[first : first + COLUMNS] for first in range(0, len(drawn), COLUMNS)], output)


def _worst_first(replayed: Replayed) -> list[Seen]:
    """The samples at which the first number that is not finite came up; then by their loss."""
    found = {id(seen) for fault in replayed.faults for seen in _samples(fault, replayed)}

    def place(seen: Seen) -> tuple[bool, float]:
        return id(seen) not in found, -math.inf if math.isnan(seen.loss) else -seen.loss

    return sorted(replayed.samples, key=place)


def _samples(fault: Fault, replayed: Replayed) -> list[Seen]:
    part = [seen for seen in replayed.samples if seen.part == fault.part]
    return [part[row] for row in fault.rows]


def _line(seen: Seen, replayed: Replayed) -> str:
    label = printable(seen.label)
    if seen.prediction:
        label += f" -> {printable(seen.prediction)} {seen.probability:.0%}"
    place = f"{_rank(seen, replayed)}  sample {seen.sample:>8}"
    return f"{place}  loss {seen.loss:<12.6g} {label}  {printable(seen.path)}".rstrip()


def _rank(seen: Seen, replayed: Replayed) -> str:
    """Who computed a sample: its part, too, where a rank had several."""
    several = any(each.part != each.rank for each in replayed.samples)
    return f"rank {seen.rank}  part {seen.part}" if several else f"rank {seen.rank}"


def _title(seen: Seen) -> str:
    lines = [seen.label] if seen.label else []
    if seen.prediction:
        mark = "✓" if seen.prediction == seen.label else "✗"
        lines.append(f"{mark} {seen.prediction} {seen.probability:.0%}")
    return "\n".join([*lines, f"loss {seen.loss:.3g}, sample {seen.sample}"])


def _faults(replayed: Replayed, is_broken: bool) -> list[str]:
    """A line for each different fault, with the samples at which it came up."""
    found: dict[Fault, list[Seen]] = {}
    for fault in replayed.faults:
        found.setdefault(replace(fault, part=0, rows=()), []).extend(_samples(fault, replayed))
    lines = [_fault(fault, samples, replayed) for fault, samples in found.items()]
    if replayed.broken and not is_broken and not lines:
        names = printable(", ".join(replayed.broken))
        lines.append(f"update: the optimizer made weights that are not finite, by a finite gradient: {names}")
    return lines


def _fault(fault: Fault, samples: list[Seen], replayed: Replayed) -> str:
    name = fault.module or "the model"
    what = fault.what
    if fault.phase == "backward":
        gives, what = "the first whose gradients are not all finite", f"operation {what}"
    elif fault.module == LOSS:
        gives = "not finite, but what the model gives is"
    else:
        gives = "the first module that gives numbers that are not finite"
    line = f"{fault.phase}: {printable(name)} ({fault.kind}) is {gives}; {AT_FAULT[fault.phase, fault.cause]}"
    places = [f"{_rank(seen, replayed)} sample {seen.sample}" for seen in samples[:MOST_NAMED]]
    if len(samples) > MOST_NAMED:
        places.append(f"{len(samples) - MOST_NAMED:,} more")
    return "; ".join([line, *([printable(what)] if what else []), *([", ".join(places)] if places else [])])
