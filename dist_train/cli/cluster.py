"""Commands for clusters: what is submitted, what has become of it, and what a machine can do."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_train.cli.app import Configs, app
from dist_train.config import UserError, load_words
from dist_train.console import flush, is_main, say
from dist_train.importing import importing

if TYPE_CHECKING:
    from dist_train.cluster.sweep import Task


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    arguments: Configs,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of each node.")] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes on each node; by default one per GPU, else one.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, as 12:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the command.")] = False,
) -> None:
    """Submit a training to SLURM, after a check. Other options go to sbatch as they are: --qos=long."""
    further = [word for word in arguments if word.startswith("-")]
    words = [word for word in arguments if not word.startswith("-")]
    options: dict[str, str | int | None] = {
        "nodes": nodes,
        "ntasks-per-node": tasks_per_node,
        "gpus-per-node": gpus_per_node,
        "time": time,
        "partition": partition,
        "account": account,
    }
    config = load_words(words, say)
    from dist_train.cluster import submit as submission

    command = submission.command(config, words, options, further)
    print(shlex.join(command), flush=True)
    if not dry_run:
        print(submission.submit(command))


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="A sweep file in W&B's format; with --seeds a config file.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG...] [KEY=VALUE...]", help="For all tasks.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="So many seeds of one configuration, instead of a file's tasks.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print what would run (the default).")] = False,
    task: Annotated[int | None, typer.Option(help="Print the arguments of this task for train.")] = None,
    count: Annotated[bool, typer.Option("--count", help="Print the number of tasks.")] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Train them here, one after the other, and print the results.")
    ] = False,
    results: Annotated[bool, typer.Option("--results", help="Print what has come out so far.")] = False,
) -> None:
    """Print the runs of a sweep, each checked, for SLURM's job arrays (slurm/sweep.sbatch); or train them."""
    from dist_train.cluster import sweep as sweeps
    from dist_train.tools import sweep as running

    if list_ + count + train + results + (task is not None) > 1:
        raise UserError("sweep: give one of --list, --task, --count, --train and --results.")
    words = arguments or []
    tasks = running.of_seeds([file, *words], seeds) if seeds else sweeps.expand(Path(file), words)
    if task is not None:
        print("\n".join(sweeps.pick(tasks, task).arguments))
        return
    for item in tasks:
        item.check()
        if not (count or train or results):
            print(f"{item.number:4}  {' '.join(item.overrides)}")
    if count:
        print(len(tasks))
    if train:
        _train_all(tasks)
    if (train or results) and is_main():
        print("\n".join(running.results(tasks)))


def _train_all(tasks: Sequence[Task]) -> None:
    """Trains the runs of a sweep; the process ends with 75 where one is interrupted."""
    from dist_train.guard.interrupt import EXIT_INTERRUPTED, before_training, launcher_watched
    from dist_train.tools import sweep as running

    before_training()
    with launcher_watched(), importing():
        from dist_train import train  # noqa: F401 - with all that it takes
    if not running.train(tasks):
        if is_main():
            print("interrupted; the same command goes on")
        flush(fails=False)
        sys.exit(EXIT_INTERRUPTED)


@app.command()
def status(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of runs; all under runs/.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only those; also !=, <, <=, > and >=.")
    ] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="[-]KEY", help="By a key; with - from the greatest down.")
    ] = None,
    show: Annotated[list[str] | None, typer.Option(metavar="KEY", help="A column more.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="For tables.")] = False,
) -> None:
    """Show what has become of runs: state, step, speed, trouble; chosen and sorted by keys and metrics."""
    from dist_train.tools import asked
    from dist_train.tools import status as report

    if json and csv:
        raise UserError("status: give one of --json and --csv.")
    comparisons = [asked.Comparison.parse(text) for text in where or []]
    keys = [*(item.key for item in comparisons), *([sort.removeprefix("-")] if sort else []), *(show or [])]
    rows = report.collect(runs or [])
    found = bool(rows)
    if keys:
        rows = asked.answer(rows, keys)
        rows = [row for row in rows if all(item.holds(row["asked"]) for item in comparisons)]
        rows = asked.in_order(rows, sort) if sort else rows
    if json or csv:
        print(report.as_json(rows) if json else report.as_csv(rows, keys), end="\n" if json else "")
    elif rows:
        report.show(rows, list(dict.fromkeys(keys)))
    else:
        print("none of the runs is so" if found else "no runs in runs/")


@app.command()
def doctor(
    runs: Annotated[Path, typer.Option(help="Folder of the runs, whose disk is measured.")] = Path("runs"),
) -> None:
    """Measure what this machine can do. Exit code 1: something makes training impossible."""
    from dist_train.tools.doctor import examine

    impossible = False
    for finding in examine(runs):
        print(finding, flush=True)
        impossible |= finding.failure
    sys.exit(int(impossible))
