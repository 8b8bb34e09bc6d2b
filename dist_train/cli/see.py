"""Commands that show what runs have recorded, and what a network does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dist_train.cli.app import Configs, Trust, app, new_file
from dist_train.config import UserError, counted, is_override, load_words
from dist_train.console import say
from dist_train.importing import importing


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Folders of runs, folders of such, globs; wandb:ENTITY/PROJECT/ID.", show_default=False
        ),
    ],
    metric: Annotated[
        str, typer.Option(help="As 'eval/accuracy' or 'max eval/accuracy'; by default what chooses the best.")
    ] = "",
    x: Annotated[str, typer.Option(help="step, time, samples or epoch.")] = "step",
    smooth: Annotated[
        float, typer.Option(help="Weight of what came before in a moving average, as 0.9.")
    ] = 0.0,
    out: Annotated[
        list[Path] | None,
        new_file("Write a page (.html), a picture (.png) or a table (.csv)."),
    ] = None,
) -> None:
    """Compare runs: what differs in their configurations, what came of it, and which is better."""
    with importing():
        from dist_train.tools.compare import files, groups, show
        from dist_train.tools.compare.runs import find

    for path in out or []:
        files.check(path)
    comparison = groups.compare(find(runs), metric, x, smooth)
    show.show(comparison)
    for path in out or []:
        files.write(comparison, path)
        print(f"written: {path}")


@app.command()
def explain(
    arguments: Configs,
    depth: Annotated[
        int, typer.Option(min=1, help="Modules inside of so many others are shown, larger ones as a whole.")
    ] = 1,
    out: Annotated[Path | None, new_file("Draw the network to this PNG file.")] = None,
) -> None:
    """Explain autograd on one batch: what modules give, the loss, each gradient. Leaves no run."""
    config = load_words(arguments, say)
    with importing():
        from dist_train.tools import explain as explaining

    explained = explaining.explain(config, depth)
    explaining.show(explained)
    if out:
        explaining.draw(explained, out)
        print(f"\nwritten: {out}")


@app.command()
def watch(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of runs; all under runs/.")] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds from one look to the next.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
) -> None:
    """Watch runs as they go, from their files: progress, curves, ranks, trouble. `q` or Ctrl-C ends it."""
    from dist_train.tools.watch import watch

    watch(runs or [], every, once)


@app.command()
def sync(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [KEY=VALUE...]",
            show_default=False,
            help="Folders of runs, or of folders of runs.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what W&B is to have: a line of JSON for each step.")
    ] = False,
) -> None:
    """Send W&B what it lacks of runs that were made offline or cut off: each step once."""
    from dist_train.tools import sync as syncing

    overrides = [word for word in runs if is_override(word) and not Path(word).exists()]
    for folder in syncing.found([Path(word) for word in runs if word not in overrides]):
        if not dry_run:
            print(syncing.send(folder, overrides), flush=True)
            continue
        lines = list(syncing.described(folder, overrides))
        print(f"{folder}: {counted(len(lines), 'step')}", file=sys.stderr)
        print("\n".join(lines))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE...]")] = None,
    out: Annotated[
        Path | None,
        new_file("The page, one HTML file; by default report.html in the run's folder."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Measure and look at all images, however many there are.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Tell all of a run on one page: curves, time, classes, calibration, worst images, data, leaks."""
    with importing():
        from dist_train.tools import report as reporting

    page = out or run / "report.html"
    if out is None and page.is_symlink():
        raise UserError(f"{page}: is a link, which may lead anywhere; --out names another file.")
    reporting.report(run, page, overrides or [], everything=everything, trust=trust)
