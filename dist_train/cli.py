"""The commands: parse, call, print. Torch is imported when a command needs it, so that help comes at once."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_train import __version__
from dist_train.config import RunError, UserError, load_words, printable
from dist_train.config.schema import all_keys
from dist_train.console import flush, is_main, say
from dist_train.importing import importing

if TYPE_CHECKING:
    from dist_train.cluster.sweep import Task
    from dist_train.train import Result

BEGAN = time.monotonic()  # the imports to come count as seconds of the run

app = typer.Typer(
    name="dist-train",
    help="Train image models exactly: one loop for one CPU or many GPUs on many nodes.",
    epilog="KEY=VALUE arguments override the configuration, as in optim.lr=0.1 train.epochs=10.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
)

Trust = Annotated[
    bool, typer.Option("--trust", help="Import and run whatever objects the file names, as if it were yours.")
]
AllowChanges = Annotated[
    bool, typer.Option("--allow-changes", help="Go on also with a changed configuration.")
]
Configs = Annotated[
    list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE...]", show_default=False,
                              help="YAML files and overrides, merged from left to right.")
]  # fmt: skip


def main() -> None:
    """Runs the command line. A mistake of the user's is one sentence from rank 0, and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the terminal's encoding lacks is shown escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _refuse_keys_as_options(sys.argv[1:])
        app()
    except UserError as error:
        if is_main() or not error.everywhere:
            print(f"dist-train: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        if is_main():
            print(f"dist-train: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        flush()


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
    run: Annotated[str, typer.Argument(help="A run's folder or a checkpoint file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE...]")] = None,
    trust: Trust = False,
) -> None:
    """Measure a run's best checkpoint on the whole eval set, exactly, on any number of processes."""
    with importing():
        from dist_train.predict import evaluate_run

    metrics = evaluate_run(run, overrides or [], trust=trust)
    if is_main():
        for name, value in metrics.items():
            print(f"{printable(name)} {value:.6g}")


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="A run's folder or a checkpoint file.")],
    inputs: Annotated[list[str], typer.Argument(help="Image files, or folders of them; or a prompt.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show for each image.")] = 3,
    format: Annotated[str, typer.Option(help="table, csv or json.")] = "table",
    output: Annotated[Path | None, typer.Option(help="Write there instead of printing.")] = None,
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
    output: Annotated[Path, typer.Option(help="The PNG file.")] = Path("samples.png"),
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
    output: Annotated[Path | None, typer.Option(help="Draw the images to this PNG file.")] = None,
    trust: Trust = False,
) -> None:
    """Rebuild a step on one CPU: its samples as the model saw them, and each one's loss."""
    with importing():
        from dist_train.tools import replay as replaying

    replayed = replaying.replay(run, step, trust)
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
    file: Annotated[Path, typer.Argument(help="A sweep file in W&B's format; with --seeds a config file.")],
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
    tasks = running.of_seeds([str(file), *words], seeds) if seeds else sweeps.expand(file, words)
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
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what has become of runs: state, step, speed, SLURM job, last trouble."""
    from dist_train.tools import status as report

    rows = report.collect(runs or [])
    if json:
        print(report.as_json(rows))
    elif rows:
        report.show(rows)
    else:
        print("no runs in runs/")


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


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _refuse_keys_as_options(words: Sequence[str]) -> None:
    """Raises UserError for `--lr 0.1`, as other programs have it, where the key optim.lr is meant."""
    if not any(word.startswith("--") for word in words) or words[0] == "submit":
        return  # whose further options are sbatch's
    commands: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    params = getattr(commands.get(words[0]), "params", [])
    known = {"--help", *(name for param in params for name in [*param.opts, *param.secondary_opts])}
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if word.startswith("--") and option not in known:
            for key in all_keys():
                if name in (key, key.rpartition(".")[2]):
                    value = value if equals else "VALUE" if following.startswith("-") else following
                    raise UserError(f"there is no option '{option}'; write {key}={value}.")
