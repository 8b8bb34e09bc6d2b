"""The comparison as a file: a page (.html), a picture (.png) or a table (.csv)."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from dist_train.config import UserError, counted
from dist_train.pages import page
from dist_train.tools.compare.groups import Comparison, Group
from dist_train.tools.compare.runs import Run, has
from dist_train.tools.compare.show import differences, each_run, missing, results, smoothed

FURTHER = ("eval/loss", "train/loss")  # curves of a page besides those of the metric


def check(path: Path) -> None:
    """Raises UserError for a kind of file that is not written, before anything is read."""
    if path.suffix not in WRITERS:
        raise UserError(f"--out: {path}: a file that ends in {', '.join(WRITERS)}.")


def write(comparison: Comparison, path: Path) -> None:
    """Writes a file, of the kind that its name tells, whole or not at all.

    Raises UserError where that is impossible.
    """
    data, temporary = WRITERS[path.suffix](comparison), path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"--out: {path} can't be written: {error.strerror}.") from None


def as_html(comparison: Comparison) -> bytes:
    """One page with everything."""
    groups, metric, axis = comparison.groups, comparison.metric, comparison.axis
    runs = [run for group in groups for run in group.runs]
    head, rows = differences(comparison)
    what = page.table(head, rows) if rows else page.text("Nothing but the seed.")
    further = [name for name in FURTHER if name != metric and has(runs, name)]
    made = page.page(
        f"{metric} of {counted(len(runs), 'run')}",
        page.section("What differs", what),
        page.section("What came of it", page.table(*results(comparison)), _verdicts(comparison)),
        page.section("Curves", *(_chart(comparison, name) for name in [metric, *further])),
        page.section("Each run", page.table(*each_run(comparison))),
        lead=f"{counted(len(groups), 'configuration')}, over {axis}; mean ± standard deviation over seeds",
    )
    return made.encode()


def _verdicts(comparison: Comparison) -> page.Html:
    return page.text(*comparison.verdicts, *missing(comparison))


def _chart(comparison: Comparison, metric: str) -> page.Html:
    curves = [
        page.Curve(group.name, *run.curve(metric, comparison.axis), _part(run, group))
        for group, run in _each(comparison)
    ]
    return page.chart(metric, comparison.axis, metric, curves, smooth=comparison.smooth)


def _each(comparison: Comparison) -> Iterator[tuple[Group, Run]]:
    for group in comparison.groups:
        for run in group.runs:
            yield group, run


def _part(run: Run, group: Group) -> str:
    """Which one of its group a run is."""
    return f"seed {run.config['seed']}" if len(group.runs) > 1 and "seed" in run.config else ""


def as_png(comparison: Comparison) -> bytes:
    """The curves as a picture; smoothed ones above what was measured."""
    from matplotlib.figure import Figure  # pyplot would take as long again to import

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, group in enumerate(comparison.groups):
        color, style = f"C{number % 10}", ("-", "--", ":")[number // 10 % 3]
        for index, run in enumerate(group.runs):
            x, y = run.curve(comparison.metric, comparison.axis)
            marker = "o" if len(x) <= 40 else ""
            label = _literal(group.name) if index == 0 else None
            if comparison.smooth:
                axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            line = smoothed(y, comparison.smooth)
            axes.plot(x, line, style, color=color, label=label, linewidth=1.4, marker=marker, markersize=3)
    axes.set(xlabel=_unit(comparison.axis), ylabel=_literal(comparison.metric))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    # Outside: to find the best place within, matplotlib looks at every point.
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def _unit(axis: str) -> str:
    return "time (s)" if axis == "time" else axis


def _literal(text: str) -> str:
    """Text in which no dollar begins a formula; with a `_` at its front matplotlib would leave it out."""
    return ("\u200a" if text.startswith("_") else "") + text.replace("$", r"\$")


def as_csv(comparison: Comparison) -> bytes:
    """A row for each run, with the keys in which configurations differ."""
    head, rows = each_run(comparison)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*head, *comparison.keys])
    for (group, _), row in zip(_each(comparison), rows, strict=True):
        writer.writerow([*row, *(group.config.get(key) for key in comparison.keys)])
    return table.getvalue().encode(errors="backslashreplace")  # a folder's name may be no text


WRITERS: dict[str, Callable[[Comparison], bytes]] = {".html": as_html, ".png": as_png, ".csv": as_csv}
