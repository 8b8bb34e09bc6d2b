"""The fixture `slurm`: a throwaway real Slurm for all tests here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm of two nodes on this machine; where it can't be, tests skip, or fail if CI is set."""
    lacking = missing() or ([] if os.geteuid() == 0 else ["the rights of root"])
    if lacking:
        what = f"a throwaway Slurm needs {', '.join(lacking)} (Debian: slurm-wlm, munge)"
        pytest.fail(what) if os.environ.get("CI") else pytest.skip(what)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
