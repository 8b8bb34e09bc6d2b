"""Image files: decoded as Pillow does it, made into batches by threads, the same whoever makes them."""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train import data
from dist_train.config import UserError
from dist_train.data import decode
from dist_train.data.images import BadSample, read_image
from dist_train.data.loader import Threads
from dist_train.record.history import read_metrics, read_status
from dist_train.tools.replay import replay
from tests.distributed.ranks import last, same_bits
from tests.processes import Finished
from tests.test_data import config, rank
from tests.worlds import SMALL

CROPS: list[Any] = [{"RandomResizedCrop": {"size": [8, 8]}}, "RandomHorizontalFlip"]


# --- decoding ------------------------------------------------------------------------------------


def photo(mode: str = "RGB", size: tuple[int, int] = (61, 43)) -> Image.Image:
    """Something smooth, as photographs are."""
    y, x = np.mgrid[: size[1], : size[0]]
    planes = [128 + 90 * np.sin(x / (5 + n)) * np.cos(y / (7 - n)) + n * 9 for n in range(4)]
    pixels = np.stack(planes, 2).clip(0, 255).astype(np.uint8)
    count = len(Image.new(mode, (1, 1)).getbands())
    return Image.fromarray(pixels[:, :, :count].squeeze(), mode=mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "quality": 95}, {"subsampling": 2}], ids=str)
def test_a_jpeg_has_the_pixels_that_pillow_reads(mode: str, options: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    photo(mode).save(path, "JPEG", **options)
    for channels, name in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        with Image.open(path) as opened:
            expected = np.atleast_3d(np.asarray(opened.convert(name)))
        assert np.array_equal(read_image(path, channels).permute(1, 2, 0).numpy(), expected)
    quick = decode.decode_jpeg(bytearray(path.read_bytes()), 3)
    assert (quick is None) == (mode == "CMYK")  # else Pillow is not asked
    for decoder in decode.decoders() if quick is not None else ():
        assert torch.equal(decoder(bytearray(path.read_bytes()), 3), quick)


def test_a_damaged_jpeg_is_read_or_refused_as_pillow_does(tmp_path: Path) -> None:
    whole = io.BytesIO()
    photo().save(whole, "JPEG")
    content, path = whole.getvalue(), tmp_path / "a.jpg"
    random = np.random.default_rng(0)
    refused = 0
    for number in range(60):
        damaged = bytearray(content[: random.integers(len(content))] if number % 2 else content)
        for place in random.integers(0, len(damaged), number // 20) if damaged else ():
            damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            with Image.open(path) as opened:
                expected = np.asarray(opened.convert("RGB"))
        except (OSError, SyntaxError, ValueError):
            refused += 1
            with pytest.raises(BadSample, match=r"a\.jpg: not a readable image \("):
                read_image(path)
        else:
            assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), expected)
    assert 10 < refused < 60


def test_an_image_of_which_pillow_warns_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    photo().save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 61 * 43 // 2 - 1)
    with pytest.raises(BadSample, match="exceeds limit"):
        read_image(path)


# --- threads -------------------------------------------------------------------------------------


def batches(root: Path, workers: int, batch: int = 7, steps: list[Any] = CROPS) -> list[data.Batch]:
    """Those of two epochs of 30 images."""
    source = {"name": "image_folder", "root": str(root), "train_transform": steps, "workers": workers}
    setup = config(data=source | {"mean": [0.4], "std": [0.3]}, train={"epochs": 2, "batch_size": batch})
    sets = data.build(setup)
    loader = sets.train_loader(setup, rank(), 0, sets.total_steps(setup))
    assert isinstance(loader, Threads) == (workers > 0)  # without workers a DataLoader in this process
    return [item.to(torch.device("cpu")) for item in loader]


def test_threads_make_the_same_batches_and_leave_the_generator_alone(image_folder: Path) -> None:
    expected = batches(image_folder, 0)
    state, count = torch.get_rng_state(), torch.get_num_threads()
    for one, other in zip(batches(image_folder, 3), expected, strict=True):
        assert one.part.indices.tolist() == other.part.indices.tolist()
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == count
    by_sample = {}
    for size in (7, 30):  # in each epoch a sample has one look, whatever the batch
        for item in batches(image_folder, 2, batch=size):
            for index, image in zip(item.part.indices.tolist(), item.inputs, strict=True):
                first = by_sample.setdefault((item.part.epoch, index), image)
                assert torch.equal(first, image)
    differing = [not torch.equal(by_sample[0, n], by_sample[1, n]) for n in range(30)]
    assert sum(differing) > 27


def test_pixels_are_normalized_once_they_are_on_the_device(image_folder: Path) -> None:
    source = {
        "name": "image_folder",
        "root": str(image_folder),
        "mean": [0.4],
        "std": [0.3],
        "shuffle": False,
    }
    setup = config(data=source, train={"steps": 1, "batch_size": 5})
    sets = data.build(setup)
    (batch,) = sets.train_loader(setup, rank(), 0, 1)
    assert batch.inputs.dtype == torch.uint8 and batch.inputs.is_contiguous(memory_format=torch.channels_last)
    expected = (batch.inputs.double() / 255 - 0.4) / 0.3
    for channels_last in (False, True):
        seen = batch.to(torch.device("cpu"), channels_last)
        assert torch.allclose(seen.inputs.double(), expected, atol=1e-6)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert seen.inputs.is_contiguous(memory_format=layout)
        assert seen.to(torch.device("cpu")).inputs is seen.inputs  # no second time
        for row in range(5):
            assert torch.equal(seen.inputs[row], sets.train.sample(row, 0)[0])


def test_images_of_8_and_of_16_bits_come_into_one_batch(image_folder: Path) -> None:
    deep = image_folder / "train/bright/000.png"
    Image.fromarray(np.full((8, 8), 13107, np.uint16)).save(deep)
    setup = config(data={"name": "image_folder", "root": str(image_folder), "shuffle": False})
    sets = data.build(setup)
    batch = next(iter(sets.train_loader(setup, rank(), 0, 1))).to(torch.device("cpu"))
    assert torch.allclose(batch.inputs[0], torch.tensor(0.2))
    assert torch.equal(batch.inputs[1], sets.train.sample(1, 0)[0])


def test_threads_end_with_the_loader_and_make_no_more_than_they_were_asked(image_folder: Path) -> None:
    source = {"name": "image_folder", "root": str(image_folder), "workers": 2, "prefetch": 2}
    setup = config(data=source, train={"steps": 10**6, "batch_size": 5})
    sets = data.build(setup)
    asked: list[int] = []
    inner = sets.train.prepared
    sets.train.prepared = lambda index, *rest: (asked.append(index), inner(index, *rest))[1]  # type: ignore[method-assign]
    loader = iter(sets.train_loader(setup, rank(), 0, 10**6))
    for _ in range(3):
        next(loader)
    assert len(asked) <= 5 * (3 + 4)
    loader.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name.startswith("ahead"):
            thread.join(timeout=20)
            assert not thread.is_alive()


def test_an_image_that_cannot_be_read_is_told_by_a_thread_when_its_batch_is_due(image_folder: Path) -> None:
    (image_folder / "train/dark/004.png").write_bytes(b"no image")
    source = {"name": "image_folder", "root": str(image_folder), "workers": 2, "shuffle": False}
    setup = config(data=source, train={"steps": 6, "batch_size": 5})
    loader = iter(data.build(setup).train_loader(setup, rank(), 0, 6))
    assert [next(loader).part.step for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match=r"dark/004\.png: not a readable image") as caught:
        next(loader)
    assert not caught.value.everywhere


def test_a_signal_and_a_bad_image_end_a_training_whose_threads_are_at_work(
    begin: Callable[..., Any], cli: Callable[..., Finished], wait_for: Any, image_folder: Path, tmp_path: Path
) -> None:
    process = begin("train", *WORDS, "train.steps=1000000")
    wait_for(lambda: read_status(tmp_path / "runs/run").get("step", 0) >= 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    (image_folder / "train/dark/004.png").write_bytes(b"no image")
    ended = cli("train", *WORDS, "run.name=bad")
    assert ended.rc == 2 and ended.err.count("dark/004.png: not a readable image") == 1, ended


def test_who_makes_the_batches_is_chosen_and_told(image_folder: Path) -> None:
    def told(**options: Any) -> str:
        setup = config(data={"name": "image_folder", "root": str(image_folder), "workers": 2} | options)
        return data.described(data.build(setup).train, setup, rank())

    assert told(train_transform=CROPS) == "images: read and transformed in 2 threads"
    other = "images: read and transformed in 2 worker processes, as"
    assert told(train_transform=[*CROPS, "RandAugment"]) == f"{other} RandAugment needs them"
    assert told(target_transform="tests.test_images:negative") == f"{other} this data set needs them"
    assert told(workers=0) == ""


def test_a_folder_of_torchvision_is_read_as_ours(image_folder: Path) -> None:
    ours = {"name": "image_folder", "root": str(image_folder), "train_transform": CROPS}
    theirs = {"name": "ImageFolder", "root": str(image_folder / "train"), "train_transform": CROPS}
    samples = [
        data.build(config(data=source | {"eval_fraction": 0.2 * (source is theirs)})).train
        for source in (ours, theirs)
    ]
    assert all(one.in_threads for one in samples)
    kept = samples[1].source.positions
    assert kept is not None
    for place, index in enumerate(kept[:5]):
        one, other = samples[0].pair(int(index)), samples[1].pair(place)
        assert torch.equal(one[0], other[0]) and one[1] == other[1]


def negative(label: int) -> int:
    """A target of one's own."""
    return 2 - label


WORDS = [*SMALL, "data.name=image_folder", "data.root=images", "data.workers=2", "train.batch_size=8",
         "log.every=1", "data.train_transform=[{RandomResizedCrop: {size: 8}},RandomHorizontalFlip]",
         "train.parts=2", "model.args.dropout=0.3", "data.mean=[0.4]", "data.std=[0.3]",
         "checkpoint.every=5"]  # fmt: skip


def test_a_run_has_the_same_bits_on_two_ranks_after_a_resume_and_when_replayed(
    ranks: Callable[..., list[Finished]], here: Callable[..., Any], image_folder: Path, tmp_path: Path
) -> None:
    results = ranks(2, "train", *WORDS, "run.name=two")
    assert [result.rc for result in results] == [0, 0], results[0]
    assert "read and transformed in 2 threads of each rank" in results[0].err
    here(*WORDS, "run.name=one", "train.steps=6")  # in the middle of an epoch of four steps
    here(*WORDS, "run.name=one", "data.workers=0")
    assert same_bits(last(tmp_path, "two"), last(tmp_path, "one"))
    losses = {
        row["step"]: row["train/loss"] for row in read_metrics(tmp_path / "runs/two") if "train/loss" in row
    }
    assert replay(Path("runs/two"), 12).loss == losses[12]
