"""What all commands share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_train import __version__
from dist_train.config import UserError

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


def new_file(told: str) -> Any:
    """The option for new files, whose folders have to be there: seen before the work, not after it."""
    return typer.Option("--out", "--output", help=told, callback=_in_a_folder)


def _in_a_folder(given: Path | list[Path] | None) -> Path | list[Path] | None:
    for path in given if isinstance(given, list) else [given]:
        if path and not path.parent.is_dir():
            raise UserError(f"--out: {path}: there is no folder {path.parent}.")
    return given


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
