"""What a training on the CPU frees is kept for its next step, and is taken in huge pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train import heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc than glibc")

PAGES = 48_000 * 4096 // os.sysconf("SC_PAGE_SIZE")  # of what a step takes
STEPS = """
import resource
from dist_train import runtime
from dist_train.config import from_mapping
runtime.start(from_mapping({"device": "cpu", "train": {"steps": 1}}))
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    pieces = [torch.ones(size) for _ in range(12) for size in (1_000_000, 3_000_000)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**env: str) -> int:
    """The page faults of six steps, each of which takes 192 MB, while what the last one took is freed."""
    others = {name: value for name, value in os.environ.items() if name not in heap.OWN_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env={**others, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_steps_take_their_memory_once() -> None:
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    has_huge = huge.exists() and "[never]" not in huge.read_text()
    assert faults() < (0.1 if has_huge else 2.5) * PAGES


def test_glibcs_own_variables_come_first() -> None:
    assert faults(MALLOC_TRIM_THRESHOLD_="100000") > 2.5 * PAGES
