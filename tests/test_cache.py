"""The cache of decoded images: the same pixels as without it, whoever makes it and whatever happens to it."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dist_train import data
from dist_train.config import UserError
from dist_train.data import cache, cache_build
from dist_train.data.cache import Cached
from dist_train.data.images import BadSample, ImageFiles, read_image
from dist_train.predict import evaluate_run, predict
from dist_train.record.history import read_metrics
from dist_train.tools.replay import replay
from tests.distributed.ranks import last, same_bits
from tests.processes import Finished
from tests.test_data import config
from tests.test_images import WORDS, photo
from tests.warm import Process


@pytest.fixture
def files(image_folder: Path) -> ImageFiles:
    """The 30 training images: 8 x 8, but for one of another size, one of 16 bits and one that is none."""
    photo().save(image_folder / "train/bright/000.png")
    Image.fromarray(np.full((8, 8), 13107, np.uint16)).save(image_folder / "train/dark/001.png")
    (image_folder / "train/dark/004.png").write_bytes(b"no image")
    paths = sorted((image_folder / "train").rglob("*.png"))
    return ImageFiles(paths, range(30), [str(n) for n in range(30)])


def equal(cached: Cached, files: ImageFiles) -> bool:
    """Whether each sample, also one that can't be read, is what it is without the cache."""
    for index in range(len(files)):
        try:
            image, label = files[index]
        except BadSample as error:
            with pytest.raises(BadSample, match=str(error).replace("(", r"\(").replace(")", r"\)")):
                cached[index]
            continue
        if not torch.equal(cached[index][0], image) or cached[index][1] != label:
            return False
    return True


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which the number of each image is added that is decoded in this process."""
    numbers: list[int] = []
    inner = ImageFiles.__getitem__
    monkeypatch.setattr(
        ImageFiles, "__getitem__", lambda self, index: (numbers.append(int(index)), inner(self, index))[1]
    )
    return numbers


def test_images_are_decoded_once_and_the_same(
    files: ImageFiles, tmp_path: Path, decoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    made = cache_build.kept_in(files, tmp_path / "kept")
    assert sorted(decoded) == list(range(30))
    assert "data.cache: decoding images into" in capsys.readouterr().err
    assert equal(made, files)
    decoded.clear()
    again = cache_build.kept_in(files, tmp_path / "kept")
    for index in range(30):
        if index not in (10, 11):  # that of 16 bits, and that is none
            again[index]
    assert not decoded and not capsys.readouterr().err
    sent = pickle.loads(pickle.dumps(again))  # as to a worker that is not forked
    assert len(pickle.dumps(again)) < 10_000 and torch.equal(sent[3][0], again[3][0])
    image = again[3][0]
    image.zero_()  # reaches neither the file nor other processes
    assert equal(cache_build.kept_in(files, tmp_path / "kept"), files)


def test_a_changed_file_or_setting_means_another_cache(files: ImageFiles, tmp_path: Path) -> None:
    folders = {cache_build.kept_in(files, tmp_path / "kept").folder}
    path = files.path(3)
    stat, content = path.stat(), path.read_bytes()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    folders.add(cache_build.kept_in(files, tmp_path / "kept").folder)
    path.write_bytes(files.path(5).read_bytes() + b"more")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = cache_build.kept_in(files, tmp_path / "kept")
    assert torch.equal(changed[3][0], changed[5][0])
    folders.add(changed.folder)
    fewer = ImageFiles([files.path(n) for n in range(29)], range(29), files.classes)
    grey = ImageFiles([files.path(n) for n in range(30)], range(30), files.classes, channels=1)
    smaller = ImageFiles([files.path(n) for n in range(30)], range(30), files.classes)
    smaller.shorter = 5
    for other in (fewer, grey, smaller):
        kept = cache_build.kept_in(other, tmp_path / "kept")
        assert equal(kept, other)
        folders.add(kept.folder)
    assert len(folders) == 6
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache_build.kept_in(files, tmp_path / "kept").folder in folders  # the first is right again


@pytest.mark.parametrize("damage", ["pixels", "cut", "index", "shorter index", "no pixels"])
def test_a_damaged_cache_gives_no_other_pixels_and_is_whole_again(
    damage: str, files: ImageFiles, tmp_path: Path, decoded: list[int]
) -> None:
    folder = cache_build.kept_in(files, tmp_path / "kept").folder
    pixels, index = folder / "pixels", folder / "index"
    before = {path.name: path.read_bytes() for path in (pixels, index)}
    if damage == "pixels":
        with pixels.open("r+b") as file:
            file.seek(len(before["pixels"]) // 2)
            file.write(b"damaged")
    elif damage == "cut":
        os.truncate(pixels, len(before["pixels"]) - 1)
    elif damage == "index":
        index.write_bytes(before["index"][:50] + b"?" + before["index"][51:])
    elif damage == "shorter index":
        index.write_bytes(before["index"][:-24])
    else:
        pixels.unlink()
    decoded.clear()
    assert equal(cache_build.kept_in(files, tmp_path / "kept"), files)
    decoded.clear()
    again = cache_build.kept_in(files, tmp_path / "kept")
    for number in range(30):
        if number not in (10, 11):
            again[number]
    assert not decoded  # all are there, and right
    if damage == "pixels":  # mended in its place
        assert pixels.read_bytes() == before["pixels"]


def slow_build(paths: list[str], folder: str, forever_at: int) -> None:
    """Makes a cache in a process of its own; decoding the image of this number takes for ever."""
    inner = ImageFiles.__getitem__

    def read(self: ImageFiles, index: int) -> Any:
        if index == forever_at:
            time.sleep(600)
        return inner(self, index)

    ImageFiles.__getitem__ = read  # type: ignore[method-assign]
    files = ImageFiles(list(map(Path, paths)), range(len(paths)), [])
    print("made", len(cache_build.kept_in(files, Path(folder))))


def test_a_build_that_was_killed_goes_on_and_a_second_builder_waits(
    files: ImageFiles, begin: Callable[..., Process], tmp_path: Path, wait_for: Any, decoded: list[int]
) -> None:
    paths = [str(files.path(n)) for n in range(30)]
    kept = tmp_path / "kept"
    builder = begin(slow_build, paths, str(kept), 20)

    def states() -> list[int]:
        found = list(kept.glob("*/index.part"))
        return np.fromfile(found[0], cache.RECORD)["state"].tolist() if found else []

    wait_for(lambda: sum(map(bool, states())) >= 16, builder)
    second = begin(slow_build, paths, str(kept), -1)
    wait_for(lambda: "another process" in second.errors.read_text() if second.errors.exists() else 0, second)
    done = [n for n, state in enumerate(states()) if state]
    with next(kept.glob("*/pixels")).open("r+b") as file:  # what did not reach the disk
        file.write(b"\0" * 20)
    builder.kill()
    out, _ = second.communicate(timeout=60)
    assert out == "made 30\n"  # in place of the dead one
    assert 16 <= len(done) < 30
    assert equal(cache_build.kept_in(files, kept), files)


def test_many_ranks_make_one_cache(
    files: ImageFiles, ranks: Callable[..., list[Finished]], tmp_path: Path
) -> None:
    paths = [str(files.path(n)) for n in range(30)]
    results = ranks(3, slow_build, paths, str(tmp_path / "kept"), -1)
    assert [result.out for result in results] == ["made 30\n"] * 3, results
    assert sum(result.err.count("decoding images into") for result in results) == 1
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_a_cache_in_memory_is_deleted_by_the_last_that_uses_it(files: ImageFiles, tmp_path: Path) -> None:
    place = tmp_path / "shm"
    one, other = (cache_build.kept_in(files, place, in_memory=True) for _ in range(2))
    assert one.folder == other.folder and place.stat().st_mode & 0o777 == 0o700
    del one
    assert equal(other, files)
    folder = other.folder
    dead = place / "dead"  # of a process that was killed
    dead.mkdir()
    (dead / "used").touch()
    alive = place / "alive"
    alive.mkdir()
    with (alive / "used").open("w") as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        third = cache_build.kept_in(files, place, in_memory=True)
        assert not dead.exists() and alive.exists()
    del other, third
    assert not folder.exists()


def test_a_cache_that_cannot_be_is_told_in_one_sentence(
    files: ImageFiles, tmp_path: Path, npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.cache: .*file/.* can't hold the images \(Not a directory\)"):
        cache_build.kept_in(files, tmp_path / "file" / "kept")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"can't hold the images \(No space left on device\); give another"):
        cache_build.kept_in(files, tmp_path / "kept", in_memory=True)
    assert not list((tmp_path / "kept").iterdir())  # of memory nothing is kept back
    for options in ({"cache": "disk"}, {"cache_size": 4}):
        with pytest.raises(UserError, match=f"{next(iter(options))}: 'arrays' has no image files"):
            data.build(config(data={"name": "arrays", "root": str(npz)} | options))
    with pytest.raises(UserError, match=r"data.cache: shards are copied to data.download_dir"):
        cache.with_cache(None, config(data={"name": "shards", "cache": "disk"}).data)


def test_a_shorter_side_is_that_of_resize_and_small_images_stay(tmp_path: Path) -> None:
    large, small = tmp_path / "large.png", tmp_path / "small.png"
    photo(size=(61, 43)).save(large)
    photo(size=(20, 61)).save(small)
    files = ImageFiles([large, small], [0, 1], ["a", "b"])
    files.shorter = 30
    for source in (files, cache_build.kept_in(files, tmp_path / "kept")):
        expected = v2.functional.resize(read_image(large), [30], antialias=True)
        assert (source[0][0].int() - expected.int()).abs().max() <= 1
        assert torch.equal(source[1][0], read_image(small))


def test_a_cache_of_many_images_takes_little_memory(tmp_path: Path) -> None:
    """Of 100,000 images: only their records, 24 bytes each, whatever they have been asked for."""
    count = 100_000
    path = tmp_path / "one.png"
    Image.new("RGB", (4, 4)).save(path)
    files = ImageFiles([path] * count, np.zeros(count, np.int64), ["a"])
    folder = tmp_path / "kept"
    folder.mkdir()
    records = np.zeros(count, cache.RECORD)
    records["offset"], records["height"], records["width"] = np.arange(count) * 48, 4, 4
    records["state"], records["crc"] = cache.KEPT, zlib.crc32(bytes(48))
    (folder / "index").write_bytes(records.tobytes() + cache.checksum(records.view(np.uint8)))
    with (folder / "pixels").open("wb") as file:
        file.truncate(48 * count)
    tracemalloc.start()
    cached = Cached(files, folder)
    for index in range(0, count, 7):
        assert not cached[index][0].any()
    assert tracemalloc.get_traced_memory()[0] < 60 * count
    tracemalloc.stop()


@pytest.mark.parametrize("options", [["cache=disk"], ["cache=memory", "cache_size=6"]], ids=str)
def test_a_run_has_the_same_bits_with_a_cache(
    options: list[str],
    ranks: Callable[..., list[Finished]],
    here: Callable[..., Any],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On two ranks, without the cache, after a resume without it, and when replayed."""
    monkeypatch.setattr(cache, "place", lambda options: tmp_path / "kept")  # of this process
    words = [*WORDS, *(f"data.{option}" for option in options), f"data.cache_dir={tmp_path / 'kept'}",
             "data.eval_transform=[{Resize: {size: [8, 8]}}]"]  # fmt: skip
    results = ranks(2, "train", *words, "run.name=two")
    assert [result.rc for result in results] == [0, 0], results[0]
    assert "30 images are decoded in" in results[0].err
    here(*words, "run.name=one", "train.steps=6")
    here(*words, "run.name=one", "data.cache=none")
    assert same_bits(last(tmp_path, "two"), last(tmp_path, "one"))
    rows = [row for row in read_metrics(tmp_path / "runs/two") if "train/loss" in row]
    assert replay(Path("runs/two"), 12).loss == rows[-1]["train/loss"]
    if "cache_size=6" not in options:
        return
    here(*words, "data.cache=none", "data.cache_size=null", "run.name=whole")  # and it is another data set
    assert not same_bits(last(tmp_path, "whole"), last(tmp_path, "one"))


def test_prediction_makes_images_as_small_as_training_did(
    here: Callable[..., Any], image_folder: Path
) -> None:
    here(*WORDS, "data.cache_size=4", "data.train_transform=null")
    path = image_folder / "val/dark/001.png"
    before = predict("runs/run", [path])[0][0]["top"]
    small = v2.functional.to_pil_image(v2.functional.resize(read_image(path), [4], antialias=True))
    small.save(path)
    assert predict("runs/run", [path])[0][0]["top"] == before


def test_a_file_from_elsewhere_asks_for_no_cache(
    here: Callable[..., Any], image_folder: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    here(*WORDS, "data.cache=disk", f"data.cache_dir={kept}")
    assert kept.exists()
    shutil.rmtree(kept)
    evaluate_run("runs/run")
    assert not kept.exists()
    evaluate_run("runs/run", ["data.cache=disk", f"data.cache_dir={kept}"])
    assert kept.exists()
