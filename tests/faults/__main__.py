"""A long series of faults: python -m tests.faults --n 200 [--seed 7]

After it a short run is killed ahead of each of its operations on files.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.faults.driver import KINDS, Driver, check
from tests.faults.operations import kill_ahead_of, undisturbed

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--n", type=int, default=20, help="injections")
parser.add_argument("--seed", type=int, default=int(time.time()), help="chooses kinds, victims and moments")
arguments = parser.parse_args()
with tempfile.TemporaryDirectory(prefix="faults-") as name:
    driver = Driver(Path(name), arguments.seed)
    driver.inject(arguments.n, list(KINDS))
    check(driver)
    short = Path(name, "short")  # its runs have names that the long one's have
    short.mkdir()
    operations = len(undisturbed(short))
    kill_ahead_of(short, range(1, operations + 1))
print(f"a short run was killed ahead of each of its {operations} operations on files")
print("the run ended as one that nobody had disturbed")
