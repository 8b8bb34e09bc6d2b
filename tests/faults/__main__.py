"""A long series of faults: python -m tests.faults --n 200 [--seed 7]"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.faults.driver import Driver, check

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--n", type=int, default=20, help="injections")
parser.add_argument("--seed", type=int, default=int(time.time()), help="chooses kinds, victims and moments")
arguments = parser.parse_args()
with tempfile.TemporaryDirectory(prefix="faults-") as name:
    driver = Driver(Path(name), arguments.seed)
    driver.inject(arguments.n)
    check(driver)
print("the run ended as one that nobody had disturbed")
