"""What all commands share."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from dist_train import __version__

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


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
