"""`python -m dist_train` and `dist-train`: what must be there from the first moment, then the commands."""

from __future__ import annotations

import sys

from dist_train.guard.interrupt import before_training


def main() -> None:
    """Runs the command line. A signal while Python still imports ends it as plainly as a later one."""
    try:
        if sys.argv[1:2] == ["train"]:
            before_training()
        from dist_train import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
