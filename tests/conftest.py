"""Small worlds for the tests: data of a few kilobytes, and the program as a real process.

What is missing skips a test on a user's machine and fails it where `CI` is set: see `missing`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import pytest
from PIL import Image

from tests import warm

REPO = Path(__file__).resolve().parent.parent
CLASSES = ["bright", "dark", "striped"]


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a process ended."""

    rc: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.rc}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take minutes come first: others run beside them."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


# --- processes -----------------------------------------------------------------------------------


def environment(**extra: Any) -> dict[str, str]:
    """This environment without what a launcher or W&B put there; one CPU thread; and `extra`."""
    strange = ("WANDB_", "SLURM_", "ACCELERATE_", "TORCHELASTIC_", "MASTER_", "OMP_")
    named = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NETRC"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(strange) and k not in named}
    kept |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])),
        "NETRC": os.devnull,  # no API key of the person who runs the tests
        "COLUMNS": "100",
    }
    return kept | {name: str(value) for name, value in extra.items()}


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _finish(process: subprocess.Popen[str], timeout: float) -> Finished:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        pytest.fail(f"still running after {timeout} s: {process.args}\n{out}\n{err}")
    return Finished(process.returncode, out, err)


def kill(process: subprocess.Popen[Any] | warm.Process) -> None:
    """Kills a process that `start` began, with all that it started, in whatever session they are."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def lives(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


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

    def finish(*command: Any, timeout: float = 120, **options: Any) -> Finished:
        return _finish(start(*command, **options), timeout)

    return finish


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Finished]:
    """cli("train", ..., cwd=tmp_path, env={}, timeout=120) -> Finished: dist-train in its own process."""

    def finish(
        *arguments: Any, cwd: Path = tmp_path, env: dict[str, Any] | None = None, timeout: float = 120
    ) -> Finished:
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            process = warm.Process(list(map(str, arguments)), cwd, environment(**(env or {})), out, err)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                kill(process)
                pytest.fail(f"still running after {timeout} s: {process.args}\n{err.read_text()}")
            return Finished(process.wait(), out.read_text(), err.read_text())

    return finish


ONE_AFTER_THE_OTHER = """
import contextlib, io, json, os, sys, traceback
from dist_train import cli

for folder, arguments in json.load(sys.stdin):
    os.chdir(folder)
    sys.argv, code, out, err = ["dist-train", *arguments], 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def one_after_the_other(jobs: Sequence[tuple[Path, Sequence[Any]]], timeout: float = 300) -> list[Finished]:
    """(folder, arguments of dist-train) of many commands, run by one process: torch is slow to start."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER],
        input=json.dumps([[str(folder), list(map(str, words))] for folder, words in jobs]),
        env=environment(PYTHONDONTWRITEBYTECODE=1),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return [Finished(*json.loads(line)) for line in done.stdout.splitlines()]


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
def ranks(start: Callable[..., Any]) -> Callable[..., list[Finished]]:
    """ranks(2, "train", ...) -> [Finished of rank 0, of rank 1]: started without any launcher."""

    def together(
        count: int,
        *arguments: Any,
        timeout: float = 120,
        env: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[Finished]:
        shared = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        processes = [
            start(
                "-m",
                "dist_train",
                *arguments,
                env={**shared, "RANK": rank, "LOCAL_RANK": rank, **(env or {})},
                **options,
            )
            for rank in range(count)
        ]
        return [_finish(process, timeout) for process in processes]

    return together


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """wait_for(condition, process, seconds=60): until condition(); fails if the process ends."""

    def wait(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if process.poll() is not None:
                pytest.fail(f"ended too early: {_finish(process, 5)}")
            if time.monotonic() > deadline:
                kill(process)
                pytest.fail(f"nothing came in {seconds} s: {_finish(process, 5)}")
            time.sleep(0.02)

    return wait


@pytest.fixture
def under_way(
    start: Callable[..., Any], wait_for: Callable[..., None], npz: Path, tmp_path: Path
) -> Callable[..., subprocess.Popen[str]]:
    """under_way(*command, until=..., env={}) -> Popen of a training on `npz` that has done some steps.

    `until` is a condition on its run's folder, runs/run; by default 5 steps are done.
    """
    from dist_train.tracking import read_status

    run = tmp_path / "runs" / "run"

    def begin(
        *command: Any,
        until: Callable[[Path], Any] = lambda run: read_status(run).get("step", 0) >= 5,
        env: dict[str, Any] | None = None,
    ) -> subprocess.Popen[str]:
        process = start(*command, env=env)
        wait_for(lambda: until(run), process)
        return process

    return begin


@pytest.fixture
def missing() -> Callable[[str], NoReturn]:
    """missing("g++ is not here"): skips the test, or fails it where CI is set."""

    def report(what: str) -> NoReturn:
        if os.environ.get("CI"):
            pytest.fail(what)
        pytest.skip(what)

    return report


# --- data ----------------------------------------------------------------------------------------


def pictures(count: int, size: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`count` grey images uint8 [N, size, size] of the CLASSES in turn, and labels int64 [N]."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = generator.integers(0, 60, (count, size, size))
    images[labels == 0] += 190
    images[labels == 1] += 10
    images[labels == 2, ::2] += 190
    return images.astype(np.uint8), labels.astype(np.int64)


def write_images(folder: Path, count: int, size: int = 8, seed: int = 0) -> list[tuple[Path, str]]:
    """`count` PNG files of the three CLASSES in turn; returns (path, class name) of each."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (image, label) in enumerate(zip(*pictures(count, size, seed), strict=True)):
        path = folder / f"{number:03}.png"
        Image.fromarray(image).convert("RGB").save(path)
        written.append((path, CLASSES[label]))
    return written


def write_npz(folder: Path) -> Path:
    """arrays.npz: 90 training and 37 eval images of 8 x 8 pixels, in 3 learnable classes."""
    x_train, y_train = pictures(90)
    x_test, y_test = pictures(37, seed=1)
    path = folder / "arrays.npz"
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def write_image_folder(folder: Path) -> Path:
    """images/{train,val}/{bright,dark,striped}/*.png: 30 and 12 RGB images of 8 x 8 pixels."""
    top = folder / "images"
    for part, count, seed in (("train", 30, 0), ("val", 12, 1)):
        for path, name in write_images(folder / "loose", count, seed=seed):
            (top / part / name).mkdir(parents=True, exist_ok=True)
            path.rename(top / part / name / path.name)
    (folder / "loose").rmdir()
    return top


def write_csv_data(folder: Path) -> Path:
    """csv/{train.csv,eval.csv,pictures/*.png}: 30 and 12 images, a header, labels by name."""
    top = folder / "csv"
    for part, count, seed in (("train", 30, 0), ("eval", 12, 1)):
        rows = write_images(top / "pictures" / part, count, seed=seed)
        shown = [(f"{part}/{path.name}", name) for path, name in rows]
        write_csv(top / f"{part}.csv", [("file_name", "label"), *shown])
    return top


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """The path of what `write_npz` writes."""
    return write_npz(tmp_path)


SMALL = [
    "data.name=arrays",
    "data.root=arrays.npz",
    "data.workers=0",
    "optim.lr=0.1",
    "train.batch_size=16",
    "train.steps=12",
    "log.every=4",
    "device=cpu",
    "wandb.mode=disabled",
]


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


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    """A CSV file of these rows."""
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, mtime in ns)} of all that lies in a folder, to see what changed."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def files() -> Callable[[Path], dict[str, tuple[int, int]]]:
    """The function `listing`."""
    return listing


# --- SLURM ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A throwaway real Slurm of three nodes on this machine, for the whole session."""
    from tests.slurm import cluster  # which imports this file

    lacking = cluster.missing() or ([] if os.geteuid() == 0 else ["the rights of root"])
    if lacking:
        what = f"a throwaway Slurm needs {', '.join(lacking)} (Debian: slurm-wlm, munge)"
        pytest.fail(what) if os.environ.get("CI") else pytest.skip(what)
    with cluster.Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as running:
        yield running
