"""The long series: python -m tests.faults --n 200 [--seed S]."""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from tests.faults.driver import series

parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
parser.add_argument("--n", type=int, default=200, help="how many faults")
parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="chooses faults and moments")
arguments = parser.parse_args()
with tempfile.TemporaryDirectory(prefix="dist-train-faults-") as folder:
    series(Path(folder), arguments.n, arguments.seed, lambda line: print(line, flush=True))
