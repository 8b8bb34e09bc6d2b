"""The commands: parse, call, print. Torch is imported when a command needs it, so that help comes at once.

train.py   train a model, and use it
tools.py   look at a job, its data and its steps
see.py     see what runs have recorded
cluster.py submit jobs, and see what has become of them
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any

import typer

from dist_train.cli.app import app
from dist_train.config import RunError, UserError, printable
from dist_train.config.schema import all_keys
from dist_train.console import flush, is_main

# In the order of the help.
from dist_train.cli import train, tools, see, cluster  # isort: skip

__all__ = ["app", "cluster", "main", "see", "tools", "train"]


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
