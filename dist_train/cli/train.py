"""Commands that train a model, and use it."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_train.cli.app import BEGAN, AllowChanges, Configs, Trust, app, new_file
from dist_train.config import UserError, load_words, printable
from dist_train.console import flush, is_main, say
from dist_train.importing import importing

if TYPE_CHECKING:
    from dist_train.train import Result


@app.command()
def train(
    arguments: Configs,
    allow_changes: AllowChanges = False,
) -> None:
    """Train, or go on with the run where it stopped. Exit code 75: interrupted, state saved."""
    from dist_train.guard.interrupt import before_training, launcher_watched

    before_training()
    with launcher_watched(), importing():
        config = load_words(arguments, say)
        from dist_train.train import fit

    _tell_end(fit(config, allow_changes=allow_changes, started=BEGAN))


@app.command()
def launch(
    arguments: Configs,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine; on GPUs one for each.")],
    max_restarts: Annotated[int, typer.Option(min=0, help="How many deaths of processes are mended.")] = 10,
    spare: Annotated[
        bool, typer.Option("--spare/--no-spare", help="Keep one more, which has read the data, in reserve.")
    ] = True,
    allow_changes: AllowChanges = False,
) -> None:
    """Train on several processes of this machine, and replace those that are killed."""
    from dist_train.guard.interrupt import before_training

    before_training()
    config = load_words(arguments, say)
    with importing():
        from dist_train import train as training
        from dist_train.cluster import board
        from dist_train.launch import Plan, launch

    kept = training.Kept()
    plan = Plan(nproc, max_restarts, (lambda: kept.prepare(config)) if spare else None)
    if (code := launch(plan)) is not None:
        sys.exit(code)
    started = time.monotonic() if board.is_restart() else BEGAN
    _tell_end(training.run(config, training.Given(allow_changes=allow_changes), kept, started))


def _tell_end(result: Result) -> None:
    """Says how a training has ended, and ends the process so."""
    from dist_train.guard.interrupt import EXIT_INTERRUPTED

    if is_main():
        from dist_train.record.terminal import describe

        more = "; the same command goes on with it" if result.state == "interrupted" else ""
        more = f": {result.stopped}" if result.stopped and not more else more
        shown = result.metrics | {f"best {name}": value for name, value in result.best.items()}
        lines = [f"{result.state} at step {result.step:,}: {result.folder}{more}", describe(shown)]
        with contextlib.suppress(OSError):
            print("\n".join(filter(None, lines)))
        flush(fails=False)
    sys.exit(EXIT_INTERRUPTED if result.state == "interrupted" else 0)


@app.command("eval")
def evaluate(
    run: Annotated[str, typer.Argument(help="A run's folder, a checkpoint or an exported file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE...]")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write predictions, classes and confusions to RUN/evaluations.")
    ] = False,
    by: Annotated[str, typer.Option(help="Measure by the values of this column of the CSV file, too.")] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what --save wrote before of the same evaluation.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Measure a run's best checkpoint on the whole eval set, exactly, on any number of processes."""
    with importing():
        from dist_train.predict import evaluate_run

    if save or by:
        from dist_train.tools import evaluation

        done = evaluation.evaluate(run, overrides or [], save=save, by=by, overwrite=overwrite, trust=trust)
        metrics = done.metrics
    else:
        metrics = evaluate_run(run, overrides or [], trust=trust)
    if is_main():
        for name, value in metrics.items():
            print(f"{printable(name)} {value:.6g}")
        for line in evaluation.told(done) if save or by else ():
            print(line)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="A run's folder, a checkpoint or an exported file.")],
    inputs: Annotated[list[str], typer.Argument(help="Image files, or folders of them; or a prompt.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show for each image.")] = 3,
    format: Annotated[str, typer.Option(help="table, csv or json.")] = "table",
    output: Annotated[Path | None, new_file("Write there instead of printing.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Of a segmentation: the folder for the masks.")] = None,
    length: Annotated[int, typer.Option(min=0, help="Of a text: bytes that go on with the prompt.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="Of a text: 0 draws nothing, 1 freely.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Of a text: another seed, another text.")] = 0,
    trust: Trust = False,
) -> None:
    """Name the classes of images or of their pixels, or continue a text. Exit code 2 for a bad image."""
    with importing():
        from dist_train import predict as prediction

    prediction.check_format(format)
    if prediction.task_of(run) == "language":
        from dist_train.tools.generate import continue_prompt

        text = continue_prompt(run, " ".join(inputs), length, temperature, seed, trust)
        prediction.write_text(f"{text}\n", output)
        return
    images = [Path(place) for place in inputs]
    if masks is not None:
        from dist_train.tools.segment import predict_masks

        written, errors = predict_masks(run, images, masks, trust=trust)
        print(f"{len(written)} masks written: {masks}")
    else:
        rows, errors = prediction.predict(run, images, top, trust=trust)
        prediction.write(rows, format, output)
    if errors:
        raise UserError("\n".join(errors))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's folder or a checkpoint file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE...]")] = None,
    to: Annotated[str, typer.Option(help="safetensors, torch.export or onnx.")] = "onnx",
    out: Annotated[Path | None, new_file("The new file; by default called as the run.")] = None,
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="Take uint8 images, and give probabilities.")
    ] = False,
    resize: Annotated[
        bool, typer.Option("--resize", help="The same of any size: Resize and CenterCrop are inside.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Write a run's model to one file for other programs, checked on samples of the eval set."""
    with importing():
        from dist_train.tools.export import export

    words = overrides or []
    done = export(run, to, out, preprocess=preprocess, resize=resize, overrides=words, trust=trust)
    print(f"written: {done.path} ({done.path.stat().st_size / 1e6:.3g} MB)")
    print(f"{done.input} -> {done.output}")
    print(f"checked: off by {done.difference:.1e} at most, on {done.samples} samples of the eval set")
