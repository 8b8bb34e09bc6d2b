"""`dist-train watch`: a live view of runs on a terminal, from their files, also on another machine."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dist_train.config import printable
from dist_train.record.history import Followed
from dist_train.record.terminal import BLOCKS, clock, sparkline
from dist_train.tools.seen import KEPT, Seen, look, statuses

PIPE_WIDTH = 160  # characters of a line where no terminal tells how many it has
STYLES = {"running": "green", "completed": "blue", "interrupted": "yellow", "lost": "red", "failed": "red"}
# Characters that a column has in any case; what a terminal has more goes to them in the order of MORE.
COLUMNS = {"run": 8, "state": 9, "progress": 10, "step": 9, "left": 6, "samples/s": 9, "curve": 12,
           "last": 14, "best": 6, "trouble": 12}  # fmt: skip
MORE = ("state", "step", "left", "samples/s", "best", "last", "run", "trouble")
BETWEEN = 3  # characters between two columns, of which there are as many around the table
NAME = 48  # characters of a run's name in a table, its last ones
PLAIN = "_.-=+*%#"  # the blocks of a terminal that knows ASCII only


def watch(runs: Sequence[Path], every: float, once: bool) -> None:
    """Shows runs until `q` or Ctrl-C; one picture if asked for `once`, and where there is no terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    view = View(runs, console)
    if once or not console.is_terminal:
        console.width = console.width if console.is_terminal else PIPE_WIDTH
        console.print(view.picture(height=None))
        return
    live = Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop")
    with contextlib.suppress(KeyboardInterrupt), _keys() as is_over, live:
        while True:
            live.update(view.picture(console.height), refresh=True)
            if is_over(every):
                break
    console.print(view.picture(console.height))  # what was seen last stays on the terminal


class View:
    """What is shown of some runs."""

    def __init__(self, runs: Sequence[Path], console: Console) -> None:
        self.runs, self.console = list(runs), console
        self.followed: dict[str, Followed] = {}
        is_plain = not (console.encoding or "").lower().startswith("utf")
        self.blocks, self.bar = (PLAIN, ("#", ".")) if is_plain else (BLOCKS, ("█", "░"))

    def picture(self, height: int | None) -> RenderableType:
        """The runs as they are now: one in full, several as a table of no more than `height` lines."""
        found = statuses(self.runs)
        if not found:
            return Text("no runs in runs/")
        if len(found) == 1:
            return self._whole(self._look(found[0]))
        room = len(found) if height is None else max(1, height - 4)
        shown = [self._look(run) for run in found[:room]]
        more = len(found) - len(shown)
        return Group(self._table(shown), *([Text(f"and {more:,} more")] if more else []))

    def _look(self, run: dict[str, Any]) -> Seen:
        name = run["run"]
        return look(run, self.followed.setdefault(name, Followed(Path(name), KEPT)))

    def _whole(self, seen: Seen) -> RenderableType:
        """All that is known of a run."""
        run, width = seen.status, min(60, max(10, self.console.width - 45))
        where = f"  on {run['host']}" if run.get("host") else ""
        processes = f"  {run['processes']} processes" if run.get("processes", 1) > 1 else ""
        head = Text.assemble(printable(run["run"]), "  ", _state(run["state"]), printable(where), processes)
        table = Table.grid(padding=(0, 2))
        table.add_row("progress", self._progress(seen, width), _step(seen))
        table.add_row("", self._speed(seen), "")
        best = run.get("best") or {}
        for name, curve in seen.curves.items():
            values = f"{curve[-1][1]:.4g}" + (f"  best {best[name]:.4g}" if name in best else "")
            table.add_row(printable(name), sparkline(curve, width, self.blocks), values)
        lines = [(seen.ranks, "ranks")] if seen.ranks else []
        others = [trouble for trouble in seen.troubles if trouble != seen.ranks]
        lines += [(trouble, "" if number else "trouble") for number, trouble in enumerate(others)]
        told = Table.grid(padding=(0, 2))
        for line, name in lines:
            told.add_row(name, Text(printable(line), STYLES["failed"] if line in seen.troubles else ""))
        return Group(head, table, told)

    def _table(self, seen: Sequence[Seen]) -> Table:
        """A line for each run."""
        lines = [self._line(each) for each in seen]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, width in self._widths(lines).items():
            right = name in ("step", "left", "samples/s", "best")
            table.add_column(
                name, justify="right" if right else "left", no_wrap=True, width=width, overflow="ellipsis"
            )
        for line in lines:
            table.add_row(*line)
        return table

    def _widths(self, lines: Sequence[Sequence[str | Text]]) -> dict[str, int]:
        """How many characters each column has: what it needs, as far as the terminal has them."""
        widths = dict(COLUMNS)
        spare = self.console.width - sum(widths.values()) - BETWEEN * len(widths)
        for name in MORE:
            at = list(COLUMNS).index(name)
            needed = max(cell_len(str(line[at])) for line in lines)
            more = max(0, min(needed - widths[name], spare))
            widths[name] += more
            spare -= more
        return widths

    def _line(self, seen: Seen) -> list[str | Text]:
        """The cells of a run."""
        run = seen.status
        last, best = run.get("metrics") or {}, run.get("best") or {}
        name = next(iter(best or last), "train/loss")
        curve = seen.curves.get(name, [])
        shown = printable(run["run"])
        return [
            shown if len(shown) <= NAME else f"…{shown[1 - NAME :]}",
            _state(run["state"]),
            self._progress(seen, COLUMNS["progress"]),
            _step(seen),
            clock(seen.left) if seen.left is not None else "-",
            _number(run.get("samples_per_second"), ",.0f", "-"),
            sparkline(curve, COLUMNS["curve"], self.blocks),
            f"{printable(name.removeprefix('eval/'))} {curve[-1][1]:.4g}" if curve else "-",
            _number(best.get(name), ".4g", "-"),
            printable("; ".join(seen.troubles)),
        ]

    def _progress(self, seen: Seen, width: int) -> Text:
        done = round(seen.share * width)
        full, empty = self.bar
        return Text(full * done + empty * (width - done), STYLES.get(seen.status["state"], ""))

    def _speed(self, seen: Seen) -> str:
        run = seen.status
        goodput = run.get("goodput")
        told = [
            f"{clock(seen.left)} left" if seen.left is not None else "",
            f"{run['samples_per_second']:,.0f} samples/s" if run.get("samples_per_second") else "",
            f"goodput {goodput:.1%}" if isinstance(goodput, float) else "",
        ]
        return "  ".join(filter(None, told))


def _state(state: str) -> Text:
    return Text(state, STYLES.get(state, ""))


def _step(seen: Seen) -> str:
    step, total = seen.status.get("step"), seen.status.get("total_steps")
    return f"{step:,}/{total:,}" if isinstance(step, int) and isinstance(total, int) else ""


def _number(value: object, form: str, none: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else none


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds, and tells whether `q` was typed; nothing typed is shown."""
    if not sys.stdin.isatty():
        yield threading.Event().wait  # which nobody sets
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)  # Ctrl-C stays a signal

    def is_over(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([sys.stdin], [], [], left)[0]:
                typed = os.read(sys.stdin.fileno(), 64)
                if not typed or b"q" in typed.lower():
                    return True
        return False

    try:
        yield is_over
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
