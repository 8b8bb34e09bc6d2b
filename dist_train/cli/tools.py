"""Commands that look at a job, its data and its steps."""

from __future__ import annotations

import bdb
from pathlib import Path
from typing import Annotated

import typer

from dist_train.cli.app import Configs, Trust, app, new_file
from dist_train.config import RunError, UserError, load_words
from dist_train.console import say
from dist_train.importing import importing


@app.command()
def config(arguments: Configs) -> None:
    """Print the configuration that the files and arguments give."""
    from dist_train.config import to_yaml

    print(to_yaml(load_words(arguments, say)), end="")


@app.command()
def summary(arguments: Configs) -> None:
    """Print the model's layers with shapes, parameters and multiply-adds."""
    config = load_words(arguments, say)
    with importing():
        from dist_train.tools.summary import summarize

    summarize(config)


@app.command()
def samples(
    arguments: Configs,
    output: Annotated[Path, new_file("The PNG file.")] = Path("samples.png"),
    count: Annotated[int, typer.Option(min=1, max=200, help="How many images.")] = 16,
) -> None:
    """Draw training images with their class names, as they are read and as the model sees them."""
    config = load_words(arguments, say)
    with importing():
        from dist_train.tools.samples import draw

    draw(config, output, count)
    print(f"written: {output}")


@app.command()
def profile(
    arguments: Configs,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps that are timed.")] = 20,
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace for Chrome or Perfetto to this new file.")
    ] = None,
) -> None:
    """Show where the time of a step goes: data, forward, backward, optimizer, operators. Leaves no run."""
    config = load_words(arguments, say)
    with importing():
        from dist_train.tools.profiler import profile, show

    if measured := profile(config, steps, trace):
        show(measured)
        if trace:
            print(f"\nwritten: {trace}")


@app.command("find-lr")
def find_lr(
    arguments: Configs,
    output: Annotated[Path, new_file("The PNG file.")] = Path("find-lr.png"),
    steps: Annotated[int, typer.Option(min=20, help="Steps, if the loss does not blow up before.")] = 100,
    lowest: Annotated[float, typer.Option(help="The rate of the first step.")] = 1e-6,
    highest: Annotated[float, typer.Option(help="The rate of the last step.")] = 10.0,
) -> None:
    """Try rising learning rates, draw the loss over them, and suggest one. Leaves no run."""
    config = load_words(arguments, say)
    with importing():
        from dist_train.tools import find_lr as finder

    if found := finder.find_lr(config, steps, lowest, highest):
        finder.draw(found, output)
        print(f"{finder.told(found)}\nwritten: {output}")


@app.command("find-batch-size")
def find_batch_size(arguments: Configs) -> None:
    """Find the largest batch of a process: on a GPU by trying, on a CPU by the memory of small ones."""
    config = load_words(arguments, say)
    with importing():
        from dist_train.tools import find_batch_size as finder

    for line in finder.told(finder.find_batch_size(config), config):
        print(line)


@app.command()
def estimate(
    arguments: Configs,
    processes: Annotated[int, typer.Option(min=1, help="How many the job is to have.")] = 1,
    speed: Annotated[float | None, typer.Option(min=0, help="Samples per second of one process.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the speed on this machine.")] = False,
) -> None:
    """Estimate parameters, steps, memory under DDP and FSDP2, and hours. Nothing of it is allocated."""
    config = load_words(arguments, say)
    with importing():
        from dist_train.tools import estimate as estimating

    estimating.show(estimating.estimate(config, processes, speed, measure))


@app.command()
def shard(
    source: Annotated[Path, typer.Argument(metavar="FOLDER|CSV", help="What holds or lists the images.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the shards.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[data.args.KEY=VALUE...]")] = None,
    size: Annotated[float, typer.Option(min=0.01, help="Megabytes of a shard.")] = 64,
    seed: Annotated[int, typer.Option(help="Chooses how training images are mixed.")] = 0,
) -> None:
    """Write images as shards, tar files with an index, to train from a disk or an object store."""
    from dist_train.tools import shard as sharding

    for line in sharding.make(source, out, overrides or [], int(size * 1e6), seed):
        print(line)
    print(f"written: {out}")


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    step: Annotated[int, typer.Argument(help="The optimizer step, as in metrics.jsonl.")],
    output: Annotated[Path | None, new_file("Draw the images to this PNG file.")] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Show what modules of this name, or pattern, give; repeatable."),
    ] = None,
    until: Annotated[
        bool, typer.Option("--until", help="Stop just before the step, in Python's debugger.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Rebuild a step on one CPU: samples, losses, gradients, and the first number that is not finite."""
    with importing():
        from dist_train.tools import replay as replaying

    try:
        replayed = replaying.replay(run, step, trust, replaying.Look(tuple(layer or ()), until))
    except bdb.BdbQuit:  # the user has left the debugger
        return
    print(replaying.table(replayed))
    if output:
        replaying.picture(replayed, output)
        print(f"written: {output}")


@app.command()
def verify(
    arguments: Configs,
    kills: Annotated[int, typer.Option(min=1, help="How often the job is killed.")] = 3,
    processes: Annotated[
        str, typer.Option(help="Ranks of the job; several numbers, as 1,2,4, must give the same bits.")
    ] = "1",
    steps: Annotated[int, typer.Option(min=3, help="Optimizer steps of the job.")] = 30,
    seed: Annotated[int, typer.Option(help="Chooses where it is killed.")] = 0,
) -> None:
    """Prove on your own job that a killed run, and one on other numbers of ranks, gives the same bits."""
    config = load_words(arguments, say)
    numbers = [word.strip() for word in processes.split(",")]
    if not all(word.isdecimal() and int(word) for word in numbers):
        raise UserError(f"--processes: a number, or several as 1,2,4, not '{processes}'.")
    import tempfile

    from dist_train.tools.verify import Trial, verify

    trial = Trial(steps, kills, tuple(map(int, numbers)), seed)
    with tempfile.TemporaryDirectory(prefix="dist-train-verify-") as folder:
        differences = verify(config, Path(folder), trial, print)
    if differences:
        raise RunError("\n".join(differences))
    print("identical bit for bit: samples, inputs, targets, losses, weights and averages of every step")
