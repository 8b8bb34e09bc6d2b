"""What a process knows of the launcher that started it: torchrun or `accelerate launch`.

torchrun's variables (RANK, WORLD_SIZE, ...) are torch's own and need no translation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path


def asked_of_accelerate() -> int | None:
    """The number of processes that `accelerate launch` was asked for, if it started this one alone.

    Accelerate gives a single child an address to meet the others at, but not their number: that is read
    from the launcher's command line, found among our ancestors, with Accelerate's own parser.
    """
    env = os.environ
    if "WORLD_SIZE" in env or not {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= env.keys():
        return None
    import psutil
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        for process in psutil.Process().parents():
            words = process.cmdline()
            arguments = _after_launch(words)
            if arguments is None:
                continue
            args = launch_command_parser().parse_args(arguments)
            file = os.path.join(process.cwd(), args.config_file or default_config_file)
            if args.num_processes is None and os.path.isfile(file):
                return int(load_config_from_file(file).num_processes)
            return args.num_processes
    except (psutil.Error, OSError, ValueError, SystemExit):
        pass  # a foreign or vanished ancestor: nothing can be known
    return None


def _after_launch(words: list[str]) -> list[str] | None:
    """The arguments of `accelerate launch` in a command line; None if it is another program's."""
    names = ["", *(Path(word).name.removesuffix(".py") for word in words)]
    for position, (before, name) in enumerate(pairwise(names), 1):
        if name in ("accelerate-launch", "accelerate.commands.launch") or (
            name == "launch" and before in ("accelerate", "accelerate.commands.accelerate_cli")
        ):
            return words[position:]
    return None


def was_launched(env: Mapping[str, str]) -> bool:
    """Whether torchrun or `accelerate launch` started this process, so that its parent is the launcher."""
    return "TORCHELASTIC_RUN_ID" in env or "ACCELERATE_MIXED_PRECISION" in env
