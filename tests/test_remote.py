"""Shards behind a URL: a real S3 server, a network that fails, and the folder that all processes share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_train import fetch
from dist_train.config import UserError
from dist_train.data import remote
from dist_train.data.remote import Downloads
from dist_train.data.shards import BadShard, Shards
from dist_train.data.sources import open_source
from dist_train.tools import shard
from dist_train.tools.replay import replay
from tests import store
from tests.distributed.ranks import equal, last
from tests.processes import Finished
from tests.store import Network
from tests.test_shards import SIZE, TRAIN
from tests.worlds import write_image_folder

PATIENCE = 2.0  # seconds


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of `write_image_folder`."""
    folder = tmp_path_factory.mktemp("made")
    shard.make(write_image_folder(folder), folder / "shards", [], SIZE, seed=0)
    return folder / "shards"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, made: Path) -> Iterator[int]:
    """The port of a real S3 server that has the shards at s3://pictures/shards."""
    with store.s3_server(tmp_path_factory.mktemp("s3")) as port:
        store.upload(port, made, "shards")
        yield port


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Shards]]:
    """reached(url, port=0) -> Shards: behind a URL, in a process of its own that copies to tmp_path/kept."""

    def opened(url: str, port: int = 0, limit: int = 10**8, train: bool = True, **args: Any) -> Shards:
        for name, value in store.reach(port).items():
            monkeypatch.setenv(name, value)
        downloads = Downloads(str(tmp_path / "kept"), limit, PATIENCE)
        found = open_source("shards", url, train, {"window": 2} | args, downloads)
        assert isinstance(found, Shards)
        return found

    _end_copier()
    yield opened
    _end_copier()


def _end_copier() -> None:
    if remote._copier and remote._copier.stdin:
        remote._copier.stdin.close()
        remote._copier.wait(10)
    remote._copier, remote._starts = None, 0


def contents(source: Shards) -> list[tuple[bytes, int]]:
    return [source.encoded(number) for number in range(len(source))]


def kept(folder: Path) -> int:
    """Bytes in a folder for objects, also of those that are on their way.

    It is looked through under its lock: else a file may be deleted and another one take its room between the
    looks at the one and at the other, and both would be counted.
    """
    total = 0
    with fetch._locked(folder):
        for item in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a note of a failure, a copy that was given up
                total += item.stat().st_size * (item.name != "lock")
    return total


# --- the same as from a disk -------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_from_s3_has_the_bits_of_one_from_a_disk_on_any_number_of_processes_and_interrupted(
    ranks: Callable[..., list[Finished]],
    here: Callable[..., Any],
    made: Path,
    server: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _end_copier()
    for name, value in store.reach(server).items():
        monkeypatch.setenv(name, value)
    s3 = [*TRAIN, "data.root=s3://pictures/shards", "data.download_dir=kept", "data.download_gb=0.001"]
    disk = here(*TRAIN, f"data.root={made}", "run.name=disk")
    results = ranks(4, "train", *s3, "run.name=s3", "train.steps=3")
    assert [result.rc for result in results] == [0] * 4, results[0]
    results = ranks(2, "train", *s3, "run.name=s3", "train.steps=7", "data.workers=1")
    assert [result.rc for result in results] == [0] * 2, results[0]
    metrics = here(*s3, "run.name=s3").metrics
    assert equal(last(tmp_path, "disk")["model"], last(tmp_path, "s3")["model"])
    assert metrics == disk.metrics
    one, other = (replay(tmp_path / "runs" / name, 6, trust=True) for name in ("disk", "s3"))
    assert [(seen.sample, seen.loss) for seen in one.samples] == [
        (seen.sample, seen.loss) for seen in other.samples
    ]
    _end_copier()


@pytest.mark.long
def test_worker_processes_and_threads_fetch_what_they_need(
    ranks: Callable[..., list[Finished]], made: Path, tmp_path: Path
) -> None:
    words = [*TRAIN, f"data.root=file://{made}", "data.download_dir=kept", "train.steps=4", "data.workers=2"]
    for name, transform in (("threads", "RandomHorizontalFlip"), ("processes", "RandomGrayscale")):
        (result,) = ranks(1, "train", *words, f"run.name={name}", f"data.train_transform=[{transform}]")
        assert result.rc == 0, result


# --- a network that fails ----------------------------------------------------------------------------


def test_connections_that_are_cut_lose_nothing(
    reached: Callable[..., Shards], made: Path, server: int
) -> None:
    network = Network(server, lambda number, passed: "cut" if passed > 20_000 else "pass")
    source = reached("s3://pictures/shards", network.listening_at)
    assert contents(source) == contents(open_source("shards", str(made), True, {}))
    assert network.connections > 3
    network.close()


@pytest.mark.parametrize(("what", "reason"), [("hang", "tried"), ("cut", "tried")])
def test_a_network_that_stays_bad_is_told_in_time(
    what: str, reason: str, reached: Callable[..., Shards], server: int, tmp_path: Path
) -> None:
    bad = False
    network = Network(server, lambda number, passed: what if bad else "pass")
    source = reached("s3://pictures/shards", network.listening_at)
    source.encoded(0)
    bad = True
    began = time.monotonic()
    with pytest.raises(
        BadShard, match=rf"s3://pictures/shards/train-0000\d\.(tar|json): .*{reason}"
    ) as caught:
        source.encoded(len(source) - 1)
    assert time.monotonic() - began < 30, "it neither hangs nor waits for more than it was given"
    with pytest.raises(BadShard):  # the others of the shard are told at once
        source.encoded(len(source) - 2)
    assert caught.value.lost > 1
    bad = False
    again = reached("s3://pictures/shards", network.listening_at)  # as after a new start
    assert again.encoded(len(again) - 1)
    network.close()


def test_a_network_that_is_slow_and_comes_back_is_waited_for(
    reached: Callable[..., Shards], made: Path, server: int
) -> None:
    away = time.monotonic() + 1

    def slow(number: int, passed: int) -> str:
        time.sleep(0.01)
        return "cut" if time.monotonic() < away else "pass"

    network = Network(server, slow)
    source = reached("s3://pictures/shards", network.listening_at)
    assert source.encoded(7) == open_source("shards", str(made), True, {}).encoded(7)
    network.close()


def test_a_shard_that_is_missing_or_changed_on_the_server_is_told_by_its_name(
    reached: Callable[..., Shards],
    made: Path,
    server: int,
    here: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.upload(server, made, "changed")
    data = (made / "train-00001.tar").read_bytes()
    store.put(server, "pictures/changed/train-00001.tar", data[:700] + b"?" + data[701:])
    store.put(server, "pictures/changed/train-00002.tar", data[:1000])
    store.put(server, "pictures/changed/train-00003.tar", b"-")
    source = reached("s3://pictures/changed", server)
    numbers = source.firsts.tolist()
    with pytest.raises(
        BadShard, match=r"s3://pictures/changed/train-00001\.tar: not what the index says \(checksum\)"
    ):
        source[numbers[1]]
    with pytest.raises(BadShard, match=r"train-00002\.tar: (ends after 1,000|has 1,000) bytes"):
        source[numbers[2]]
    words = [*TRAIN, "data.root=s3://pictures/changed", f"data.download_dir={tmp_path / 'kept'}"]
    with pytest.raises(UserError, match=r"train-0000[123]\.tar: "):
        here(*words, "run.name=stopped")
    here(*words, "data.on_bad_sample=skip")
    lines = (tmp_path / "runs/run/bad_samples.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["sample"] for line in lines) == [
        f"s3://pictures/changed/train-0000{number}.tar" for number in (1, 2, 3)
    ]


def test_mistakes_are_told_before_anything_is_read(
    reached: Callable[..., Shards], made: Path, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"s3://pictures/nothing/index\.json: there is no such object"):
        reached("s3://pictures/nothing", server)
    with pytest.raises(UserError, match="there is no 'ftp://' here; give a folder, or one of s3, gs"):
        reached("ftp://pictures/shards")
    with pytest.raises(
        UserError, match=r"data\.download_gb: 1e-05 is too little for two windows of 2 shards"
    ):
        reached(f"file://{made}", limit=10_000)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.download_dir: .*file can't be used"):
        open_source("shards", f"file://{made}", True, {}, Downloads(str(tmp_path / "file")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"takes obstore; install it by pip install 'dist-train\[cloud\]'"):
        reached("s3://pictures/shards")


# --- the folder --------------------------------------------------------------------------------------


def test_several_processes_share_a_folder_that_stays_small(
    ranks: Callable[..., list[Finished]], made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    limit, seen, ended = 50_000, [0], threading.Event()  # about half of the shards

    def watch() -> None:
        while not ended.wait(0.005):
            seen.append(kept(folder))

    watching = threading.Thread(target=watch)
    watching.start()
    results = ranks(3, read_all, f"file://{made}", str(folder), limit)
    ended.set()
    watching.join()
    expected = hashlib.sha256(repr(contents(open_source("shards", str(made), True, {}))).encode()).hexdigest()
    assert [result.out.split() for result in results] == [[expected] * 2] * 3, results[0]
    assert limit / 2 < max(seen) <= limit
    assert sum(path.stat().st_size for path in made.glob("train*")) > limit, "it could not hold all"


def read_all(url: str, folder: str, limit: int) -> None:
    """Reads all samples twice; prints what they were in short."""
    source = open_source("shards", url, True, {"window": 2}, Downloads(folder, limit, 20))
    for _ in range(2):
        source.soon(iter(range(len(source.shards))))
        print(hashlib.sha256(repr(contents(source)).encode()).hexdigest())


def test_what_was_not_used_for_longest_goes_first_and_nothing_that_is_on_its_way(tmp_path: Path) -> None:
    names = [hashlib.sha256(bytes([number])).hexdigest() for number in range(5)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 + number, 1000 + number))
    os.utime(tmp_path / names[0])
    (tmp_path / "mine.txt").write_bytes(bytes(1000))  # no object: it is neither counted nor deleted
    left, busy = tmp_path / f"{names[3]}.part", tmp_path / f"{names[4]}.part"
    for part in (left, busy):
        part.write_bytes(bytes(100))
        os.utime(part, (1, 1))
    with busy.open() as file, (tmp_path / names[1]).open("rb") as reader:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert fetch._make_room(tmp_path, 350)
        assert reader.read() == bytes(100), "who reads it reads on"
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {names[0], names[4], "mine.txt", busy.name}
    assert not fetch._make_room(tmp_path, 50) or not busy.exists()


def test_a_damaged_copy_is_fetched_again(reached: Callable[..., Shards], made: Path, tmp_path: Path) -> None:
    source = reached(f"file://{made}")
    before = contents(source)
    copy = tmp_path / "kept" / source.shards[0].tar.sha256
    copy.write_bytes(bytes(copy.stat().st_size))
    assert contents(source) == before


def test_the_process_that_copies_is_started_again_and_ends_with_the_last_that_asks(
    reached: Callable[..., Shards], made: Path
) -> None:
    source = reached(f"file://{made}")
    first = remote._copier
    assert first
    first.kill()
    first.wait()
    assert source.encoded(len(source) - 1)
    second = remote._copier
    assert second and second is not first and second.stdin
    holder = subprocess.Popen(["sleep", "60"], pass_fds=[second.stdin.fileno()])  # as a forked worker has it
    second.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.3)
    holder.kill()
    holder.wait()
    assert second.wait(10) == 0


def wanted(folder: Path, data: bytes) -> fetch.Request:
    """A request for an object of these bytes, to be copied from `folder`/objects to `folder`/copies."""
    for name in ("objects", "copies"):
        (folder / name).mkdir()
    (folder / "objects/one.tar").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    return fetch.Request(
        f"file://{folder}/objects", "one.tar", len(data), sha256, sha256, str(folder / "copies"),
        10**6, 5.0, True,
    )  # fmt: skip


def test_a_write_that_takes_less_than_all_loses_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = wanted(tmp_path, os.urandom(10_000))
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, rest, offset: whole(file, rest[:3000], offset))
    fetch.fetch(request)
    copy = tmp_path / "copies" / request.entry
    assert copy.read_bytes() == (tmp_path / "objects/one.tar").read_bytes()


@pytest.mark.parametrize("fails", [False, True])
def test_a_copy_gets_its_name_or_goes_while_nobody_looks_through_the_folder(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, locked = wanted(tmp_path, bytes(100)), []
    rename, unlink = os.rename, Path.unlink

    def look() -> None:
        with (tmp_path / "copies/lock").open("w") as file:
            locked.append(not fetch._lock(file.fileno()))

    def renamed(source: Path, target: Path) -> None:
        look()
        if fails:
            raise OSError("no name for it")
        rename(source, target)

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        look()
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(Path, "unlink", unlinked)
    with pytest.raises(OSError, match="no name") if fails else contextlib.nullcontext():
        fetch.fetch(request)
    assert locked == [True] * (1 + fails)
    there = {path.name for path in (tmp_path / "copies").iterdir()}
    assert there == ({"lock"} if fails else {"lock", request.entry})
