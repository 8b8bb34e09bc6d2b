"""The commands: parse, call, print. Torch is imported when a command needs it, so that help comes at once."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_train import __version__
from dist_train.config import RunError, UserError

BEGAN = time.time()  # the imports to come count as seconds of the run

app = typer.Typer(
    name="dist-train",
    help="Train image models exactly: one loop for one CPU or many GPUs on many nodes.",
    epilog="KEY=VALUE arguments override the configuration, as in optim.lr=0.1 train.epochs=10.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
)

Configs = Annotated[
    list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE...]", show_default=False,
                              help="YAML files and overrides, merged from left to right.")
]  # fmt: skip


def main() -> None:
    """Runs the command line. A mistake of the user's is one sentence from rank 0, and exit code 2."""
    try:
        app()
    except UserError as error:
        if _is_main() or not error.everywhere:
            print(f"dist-train: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        if _is_main():
            print(f"dist-train: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def train(
    arguments: Configs,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on also with a changed configuration.")
    ] = False,
) -> None:
    """Train, or go on with the run where it stopped. Exit code 75: interrupted, state saved."""
    from dist_train.interrupt import EXIT_INTERRUPTED, around_training, before_training

    before_training()
    config = _load(arguments)
    from dist_train.train import fit

    around_training()
    result = fit(config, allow_changes=allow_changes, started=BEGAN)
    if _is_main():
        print(f"{result.state} at step {result.step:,}: {result.folder}")
    sys.exit(EXIT_INTERRUPTED if result.state == "interrupted" else 0)


@app.command("eval")
def evaluate(
    run: Annotated[str, typer.Argument(help="A run's folder or a checkpoint file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE...]")] = None,
) -> None:
    """Measure a run's best checkpoint on the whole eval set, exactly, on any number of processes."""
    from dist_train.predict import evaluate_run

    metrics = evaluate_run(run, overrides or [])
    if _is_main():
        for name, value in metrics.items():
            print(f"{name} {value:.6g}")


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="A run's folder or a checkpoint file.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show for each image.")] = 3,
    format: Annotated[str, typer.Option(help="table, csv or json.")] = "table",
    output: Annotated[Path | None, typer.Option(help="Write there instead of printing.")] = None,
) -> None:
    """Name the classes of images. Exit code 2 if any of them can't be read, after the others are done."""
    from dist_train import predict as prediction

    prediction.check_format(format)
    rows, errors = prediction.predict(run, images, top)
    prediction.write(rows, format, output)
    if errors:
        raise UserError("\n".join(errors))


@app.command()
def config(arguments: Configs) -> None:
    """Print the resolved configuration."""
    from dist_train.config import to_yaml

    print(to_yaml(_load(arguments)), end="")


@app.command()
def summary(arguments: Configs) -> None:
    """Print the model's layers with shapes, parameters and multiply-adds."""
    config = _load(arguments)
    from dist_train.report.summary import summarize

    summarize(config)


@app.command()
def samples(
    arguments: Configs,
    output: Annotated[Path, typer.Option(help="The PNG file.")] = Path("samples.png"),
    count: Annotated[int, typer.Option(min=1, max=200, help="How many images.")] = 16,
) -> None:
    """Draw training images with their class names, before and after augmentation."""
    config = _load(arguments)
    from dist_train.report.samples import draw

    draw(config, output, count)
    print(f"written: {output}")


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    step: Annotated[int, typer.Argument(help="The optimizer step, as in metrics.jsonl.")],
    output: Annotated[Path | None, typer.Option(help="Draw the images to this PNG file.")] = None,
) -> None:
    """Rebuild a step on one CPU: its samples as the model saw them, and each one's loss."""
    from dist_train import replay as replaying

    replayed = replaying.replay(run, step)
    print(replaying.table(replayed))
    if output:
        replaying.picture(replayed, output)
        print(f"written: {output}")


@app.command()
def verify(
    arguments: Configs,
    kills: Annotated[int, typer.Option(min=1, help="How often the job is killed.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Ranks of the job.")] = 1,
    steps: Annotated[int, typer.Option(min=3, help="Optimizer steps of the job.")] = 30,
    seed: Annotated[int, typer.Option(help="Chooses where it is killed.")] = 0,
) -> None:
    """Prove on your own job that a killed run ends as an undisturbed one, bit for bit."""
    config = _load(arguments)
    import tempfile

    from dist_train.verify import verify

    with tempfile.TemporaryDirectory(prefix="dist-train-verify-") as folder:
        differences = verify(config, Path(folder), steps, kills, processes, seed, print)
    if differences:
        raise RunError("\n".join(differences))
    print("identical bit for bit: samples, inputs, targets, losses and weights of every step")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _load(arguments: list[str]) -> Any:
    """Files are what holds no `=`; overrides may stand anywhere among them."""
    from dist_train.config import load

    return load([a for a in arguments if "=" not in a], [a for a in arguments if "=" in a])


def _is_main() -> bool:
    """Whether this is rank 0, also before the process group is there."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return rank == "0"
