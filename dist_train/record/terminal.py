"""What rank 0 shows while it works: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from dist_train.config import printable

MOVE_SECONDS = 0.2  # the least time from one picture of the bar to the next


class Progress:
    """Shows rows of metrics and lines of text.

    Args:
        total: optimizer steps of the whole run.
        start: steps done before.
    """

    def __init__(self, total: int, start: int = 0) -> None:
        self.total = total
        self._bar: Any = None
        self._moved_at = 0.0
        if sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task("", total=total, completed=start, shown="")
            self._bar.start()

    def move(self, step: int) -> None:
        """Moves the bar to a step; drawn here, a few times a second, so that no thread works beside the loop.

        The device may be some steps behind: nobody waits for it.
        """
        if self._bar and (now := time.monotonic()) - self._moved_at >= MOVE_SECONDS:
            self._moved_at = now
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.update(self._task, completed=step)
                self._bar.refresh()

    def row(self, step: int, row: dict[str, Any]) -> None:
        """Shows a row of metrics."""
        text = describe(row)
        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=step, shown=text)
                self._bar.refresh()
            if "eval/loss" in row:
                self.say(f"step {step:,}/{self.total:,}  {text}")
        else:
            left = row.get("perf/seconds_left")
            self.say(f"step {step:,}/{self.total:,}  {text}" + (f"  {clock(left)} left" if left else ""))

    def say(self, text: str) -> None:
        """Shows a line. A terminal or pipe that is gone stops nothing."""
        text = printable(text)
        with contextlib.suppress(OSError):
            if self._bar:
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Gives the terminal back."""
        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None


def describe(row: dict[str, Any]) -> str:
    """A row of metrics in words: `train/loss 2.29  lr 0.001  21,300 samples/s`."""
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if not name.startswith(("perf/", "lr/", "kind", "step", "epoch", "time", "attempt"))
    ]
    if row.get("perf/samples_per_second"):
        shown.append(f"{row['perf/samples_per_second']:,.0f} samples/s")
    return "  ".join(shown)


def clock(seconds: float) -> str:
    """Seconds as `4s`, `3m12s` or `2h05m`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(points: Sequence[tuple[float, float]], width: int, blocks: str = BLOCKS) -> str:
    """A curve as a line of `width` characters, each the mean of its share of the x axis.

    Args:
        points: (x, y), in the order of x.
        blocks: from the lowest to the highest.
    """
    if not points:
        return ""
    first, last = points[0][0], points[-1][0]
    sums = [(0.0, 0)] * width
    for x, y in points:
        place = min(int((x - first) / max(last - first, 1e-9) * width), width - 1)
        sums[place] = sums[place][0] + y, sums[place][1] + 1
    means = [total / count if count else None for total, count in sums]
    known = [mean for mean in means if mean is not None]
    low, high = min(known), max(known)
    line, block = "", " "
    for mean in means:  # where there is no point the line stays as it was
        if mean is not None:
            block = blocks[min(int((mean - low) / max(high - low, 1e-12) * len(blocks)), len(blocks) - 1)]
        line += block
    return line


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
    )
