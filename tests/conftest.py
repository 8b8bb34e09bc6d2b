"""The fixtures: what `processes.py` and `worlds.py` offer, gone after the test.

What is missing skips a test on a user's machine and fails it where `CI` is set: see `missing`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests import warm
from tests.browser import Browser
from tests.browser import missing as browser_missing
from tests.processes import (
    Finished,
    environment,
    finish,
    kill,
    world,
)
from tests.worlds import (
    SMALL,
    listing,
    write_csv_data,
    write_image_folder,
    write_npz,
)

Process = subprocess.Popen[str] | warm.Process


# They take minutes, of one CPU or of waiting for Slurm and launchers: others run beside them.
FIRST = ["test_training.py", "test_docs.py", "test_watchdog.py", "test_accuracy.py", "test_verify.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, the others in their order."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def own_modules_forgotten(tmp_path: Path) -> Iterator[None]:
    """What a test imported from its own folder is no module of the next test's: many name theirs `mine`."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def own_random_numbers() -> None:
    """A test's draws from torch's global generator are its own, whatever ran before it in this process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


# --- processes -----------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start(*command, cwd=tmp_path, env={}) -> Popen in a session of its own; gone after the test.

    A command that starts with `-` is one for this Python: start("-m", "dist_train", ...).
    """
    running: list[subprocess.Popen[str]] = []

    def begin(
        *command: Any, cwd: Path = tmp_path, env: dict[str, Any] | None = None
    ) -> subprocess.Popen[str]:
        words = [str(word) for word in command]
        process = subprocess.Popen(
            [sys.executable, *words] if words[0].startswith("-") else words,
            cwd=cwd,
            env=environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        kill(process)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


@pytest.fixture
def run(start: Callable[..., Any]) -> Callable[..., Finished]:
    """run(*command, cwd=tmp_path, env={}, timeout=120) -> Finished; the command as for `start`."""

    return lambda *command, timeout=120, **options: finish(start(*command, **options), timeout)


@pytest.fixture
def begin(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., warm.Process]]:
    """begin("train", ..., cwd=tmp_path, env={}) -> Process: `dist-train train ...`, gone after the test.

    It is a process of its own that need not import torch. See `warm.Process` for scripts and functions.
    """
    running: list[warm.Process] = []

    def process(*command: Any, cwd: Path = tmp_path, env: dict[str, Any] | None = None) -> warm.Process:
        folder = tmp_path_factory.mktemp("said")
        running.append(warm.Process(command, cwd, environment(**(env or {})), folder / "out", folder / "err"))
        return running[-1]

    yield process
    for one in running:
        kill(one)
        one.wait()


@pytest.fixture
def cli(begin: Callable[..., warm.Process]) -> Callable[..., Finished]:
    """cli("train", ..., cwd=tmp_path, env={}, timeout=120) -> Finished: dist-train in its own process."""
    return lambda *command, timeout=120, **options: finish(begin(*command, **options), timeout)


@pytest.fixture
def begin_ranks(begin: Callable[..., warm.Process]) -> Callable[..., list[warm.Process]]:
    """begin_ranks(2, "train", ..., cwd=tmp_path, env={}) -> [Process of rank 0, of rank 1]."""

    def together(
        count: int, *command: Any, env: dict[str, Any] | None = None, **options: Any
    ) -> list[warm.Process]:
        return [begin(*command, env=rank | (env or {}), **options) for rank in world(count)]

    return together


@pytest.fixture
def ranks(begin_ranks: Callable[..., list[warm.Process]]) -> Callable[..., list[Finished]]:
    """ranks(2, "train", ..., cwd=tmp_path, env={}, timeout=120) -> [Finished of rank 0, of rank 1].

    Started without any launcher. ranks(4, function, *its_arguments) calls a function of a test's module on
    four ranks that know of each other by torch's variables: what it prints is in `out`.
    """

    def together(count: int, *command: Any, timeout: float = 120, **options: Any) -> list[Finished]:
        return [finish(rank, timeout) for rank in begin_ranks(count, *command, **options)]

    return together


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """here("train.steps=3", ..., **objects) -> Result: `fit` in this process: no start of torch."""
    import torch

    from dist_train import fit, load

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    precision = torch.get_float32_matmul_precision()
    yield lambda *arguments, **objects: fit(load([], arguments), **objects)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """wait_for(condition, process, seconds=180): until condition(); fails if the process ends."""

    def wait(condition: Callable[[], Any], process: Process, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if process.poll() is not None:
                pytest.fail(f"ended too early: {finish(process, 5)}")
            if time.monotonic() > deadline:
                kill(process)
                pytest.fail(f"nothing came in {seconds} s: {finish(process, 5)}")
            time.sleep(0.02)

    return wait


@pytest.fixture
def under_way(wait_for: Callable[..., None], npz: Path, tmp_path: Path) -> Callable[..., Any]:
    """under_way(process, until=...) -> process: a training on `npz` that has done some steps.

    `until` is a condition on its run's folder, runs/run; by default 5 steps are done.
    """
    from dist_train.record.history import read_status

    run = tmp_path / "runs" / "run"

    def watch(
        process: Process,
        until: Callable[[Path], Any] = lambda run: read_status(run).get("step", 0) >= 5,
    ) -> Process:
        wait_for(lambda: until(run), process)
        return process

    return watch


@pytest.fixture
def missing() -> Callable[[str], NoReturn]:
    """missing("g++ is not here"): skips the test, or fails it where CI is set."""

    def report(what: str) -> NoReturn:
        if os.environ.get("CI"):
            pytest.fail(what)
        pytest.skip(what)

    return report


# --- data ----------------------------------------------------------------------------------------


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """The path of what `write_npz` writes."""
    return write_npz(tmp_path)


@pytest.fixture
def small(npz: Path) -> list[str]:
    """Arguments of a training of 12 steps on `npz`, recorded in runs/run; later ones win."""
    return [*SMALL, f"data.root={npz}"]


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """The path of what `write_image_folder` writes."""
    return write_image_folder(tmp_path)


@pytest.fixture
def csv_data(tmp_path: Path) -> Path:
    """The path of what `write_csv_data` writes."""
    return write_csv_data(tmp_path)


@pytest.fixture
def files() -> Callable[[Path], dict[str, tuple[int, int]]]:
    """The function `listing`."""
    return listing


# --- pages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium, for the whole session."""
    if lacking := browser_missing():
        what = f"a page is looked at by {' and '.join(lacking)} (Debian: chromium, chromium-driver)"
        pytest.fail(what) if os.environ.get("CI") else pytest.skip(what)
    running = Browser(tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


# --- SLURM ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A throwaway real Slurm of three nodes on this machine, for the whole session."""
    from tests.slurm import cluster

    lacking = cluster.missing() or ([] if os.geteuid() == 0 else ["the rights of root"])
    if lacking:
        what = f"a throwaway Slurm needs {', '.join(lacking)} (Debian: slurm-wlm, munge)"
        pytest.fail(what) if os.environ.get("CI") else pytest.skip(what)
    with cluster.Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as running:
        yield running
