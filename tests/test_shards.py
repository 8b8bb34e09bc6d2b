"""Shards on a disk: what is written, the order in which it is read, and what becomes of damage."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from dist_train.config import UserError
from dist_train.config.trust import from_file
from dist_train.data.order import DistributedSampler, EvalSampler, Order
from dist_train.data.shards import BadShard, Shards
from dist_train.data.source import View
from dist_train.data.sources import open_source
from dist_train.data.windows import Groups
from dist_train.tools import shard
from tests.distributed.ranks import equal, last
from tests.processes import Finished
from tests.worlds import CLASSES, SMALL, listing

SIZE = 8_000  # bytes: 4 of the small images
TRAIN = [*SMALL, "data.name=shards", "data.root=shards", "data.args.window=2", "train.parts=4",
         "data.train_transform=[RandomHorizontalFlip]", "model.args.dropout=0.2"]  # fmt: skip


@pytest.fixture
def shards(image_folder: Path, tmp_path: Path) -> Path:
    """The images of `image_folder` in about 8 shards for training and 4 for evaluation."""
    shard.make(image_folder, tmp_path / "shards", [], SIZE, seed=0)
    return tmp_path / "shards"


def opened(root: Path | str, train: bool = True, **args: Any) -> Shards:
    found = open_source("shards", str(root), train, args)
    assert isinstance(found, Shards)
    return found


# --- writing ---------------------------------------------------------------------------------------


def test_shards_are_plain_tar_files_of_all_images_as_they_were(shards: Path, image_folder: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    assert index["classes"] == CLASSES
    assert len(index["shards"]["train"]) > 6 and len(index["shards"]["val"]) > 2
    for part, count in (("train", 30), ("val", 12)):
        images = {path.read_bytes(): path.parent.name for path in (image_folder / part).rglob("*.png")}
        found, numbers = {}, []
        for entry in index["shards"][part]:
            tar = shards / f"{entry['name']}.tar"
            assert hashlib.sha256(tar.read_bytes()).hexdigest() == entry["tar"]["sha256"]
            with tarfile.open(tar) as file:  # as WebDataset reads it: names up to the dot belong together
                members = {item.name: file.extractfile(item).read() for item in file}  # type: ignore[union-attr]
            keys = dict.fromkeys(name.partition(".")[0] for name in members)
            assert len(keys) == entry["samples"] and len(members) == 2 * len(keys)
            numbers += map(int, keys)
            found |= {members[f"{key}.png"]: CLASSES[int(members[f"{key}.cls"])] for key in keys}
        assert numbers == list(range(count)) and found == images
    first = list(found.values())[:4]
    assert set(first) == {"bright"}, "images for evaluation stay in their order"


def test_a_sample_is_what_the_folder_has_and_is_told_by_its_old_name(
    shards: Path, image_folder: Path
) -> None:
    for train in (True, False):
        ours, folder = opened(shards, train), open_source("image_folder", str(image_folder), train, {})
        places = {str(folder.path(number)): number for number in range(len(folder))}
        for number, (image, label) in enumerate(ours):
            path = ours.path(number)
            assert path.startswith(str(shards)) and f"{number:09}.png (" in path
            expected = folder[places.pop(path.partition("(")[2].rstrip(")"))]
            assert torch.equal(image, expected[0]) and label == expected[1]
        assert not places
    mixed = [label for _, label in opened(shards)]
    assert len(set(mixed[:8])) > 1, "images for training are mixed as they are written"


def test_a_csv_file_becomes_the_same_shards_each_time_and_another_seed_others(
    cli: Callable[..., Finished], csv_data: Path, tmp_path: Path
) -> None:
    words = ["data.args.img_dir=pictures", "data.args.eval_annotations_file=eval.csv"]
    result = cli("shard", csv_data / "train.csv", "one", *words, "--size=0.01")
    assert result.rc == 0 and "train: 30 images in " in result.out, result
    for name, seed in (("again", 0), ("other", 1)):
        shard.make(csv_data / "train.csv", tmp_path / name, words, 10_000, seed)
    content = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")}
        for name in ("one", "again", "other")
    }
    assert content["one"] == content["again"] != content["other"]


def test_shards_that_were_begun_are_gone_on_with_and_are_no_set_before_the_end(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    shard.make(image_folder, whole, [], SIZE, 0)
    write = shard._write

    def interrupted(plan: shard.Plan, out: Path) -> None:
        if plan.name == "train-00005":
            raise KeyboardInterrupt
        write(plan, out)

    monkeypatch.setattr(shard, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shard.make(image_folder, begun, [], SIZE, 0)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"index\.json can't be read.*when all shards are there"):
        opened(begun)
    with pytest.raises(UserError, match="of other images, or of another size, were begun"):
        shard.make(image_folder, begun, [], SIZE + 1, 0)
    done = {name: seen for name, seen in listing(begun).items() if name.startswith("train")}
    assert done
    shard.make(image_folder, begun, [], SIZE, 0)
    assert done.items() <= listing(begun).items(), "what was whole is not written again"
    assert {p.name: p.read_bytes() for p in begun.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def test_nothing_is_overwritten_and_mistakes_are_told(
    image_folder: Path, shards: Path, tmp_path: Path
) -> None:
    before = listing(tmp_path)
    with pytest.raises(UserError, match="holds a whole set of shards already"):
        shard.make(image_folder, shards, [], SIZE, 0)
    with pytest.raises(UserError, match="is not empty"):
        shard.make(image_folder, image_folder, [], SIZE, 0)
    with pytest.raises(UserError, match=r"takes data\.args\.KEY=VALUE alone"):
        shard.make(image_folder, tmp_path / "out", ["data.shuffle=false"], SIZE, 0)
    with pytest.raises(UserError, match="no such folder or CSV file"):
        shard.make(tmp_path / "nothing", tmp_path / "out", [], SIZE, 0)
    assert listing(tmp_path) == before


# --- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 20])
@pytest.mark.parametrize("sizes", [[5, 3, 8, 2, 7, 7, 1], [4], [0, 6, 0, 0, 5]])
def test_each_epoch_has_each_sample_once_from_a_few_groups_at_a_time(sizes: list[int], window: int) -> None:
    groups = Groups(np.array(sizes), window)
    total, of = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    order = Order(total, 4, seed=3, groups=groups)
    epochs = [order.positions(epoch) for epoch in range(3)]
    for epoch, positions in enumerate(epochs):
        assert sorted(positions.tolist()) == list(range(total))
        assert order.windows is not None
        read = [number for number, _ in zip(order.windows.ahead(epoch, 0), sizes, strict=False)]
        assert sorted(read) == list(range(len(sizes)))
        bounds = np.cumsum(
            [0, *(sum(sizes[g] for g in read[n : n + window]) for n in range(0, len(read), window))]
        )
        for number, (begin, end) in enumerate(pairwise(bounds)):
            seen = set(of[positions[begin:end]].tolist())
            assert seen <= set(read[number * window : (number + 1) * window])
        for begin, end in ((0, 0), (1, 5), (total - 2, total), (3, total)):  # any slice by itself
            alone = Order(total, 4, seed=3, groups=groups)
            assert np.array_equal(alone.positions(epoch, begin, end), positions[begin:end])
    if total > 20:
        assert len({tuple(positions.tolist()) for positions in epochs}) == 3


def test_the_order_of_shards_stays_what_it_is() -> None:
    order = Order(10, 4, seed=1, groups=Groups(np.array([3, 4, 3]), 2))
    assert [order.positions(epoch).tolist() for epoch in (0, 1)] == [
        [1, 3, 4, 2, 5, 0, 6, 7, 8, 9],
        [4, 6, 5, 9, 3, 7, 8, 2, 1, 0],
    ]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_batches_of_one_and_going_on_costs_no_step(world: int) -> None:
    groups = Groups(np.array([9, 14, 6, 11, 10]), 2)
    whole = Order(50, 12, seed=5, groups=groups)
    ranks = [
        list(DistributedSampler(Order(50, 12, seed=5, groups=groups), range(7, 13), 4, rank, world))
        for rank in range(world)
    ]
    for step in range(7, 13):
        parts = [part.indices for rank in ranks for part in rank if part.step == step and part.size]
        assert np.array_equal(np.concatenate(parts), whole.global_batch(step))


def test_shards_are_told_ahead_in_the_order_in_which_they_are_read() -> None:
    groups = Groups(np.array([4] * 6), 2)
    order, told = Order(24, 4, seed=2, groups=groups), []
    sampler = DistributedSampler(
        order, range(3, 12), soon=lambda ahead: told.append([next(ahead) for _ in range(6)])
    )
    read = [int(index) // 4 for part in sampler for index in part.indices]
    windows = [dict.fromkeys(read[first : first + 8]) for first in (4, 12, 20, 28)]
    assert [set(ahead[:2]) for ahead in told[1:5]] == [set(window) for window in windows]
    assert told[0][2:] == told[1][:4], "from the middle of a window on it is told whole"
    heard: list[list[int]] = []
    list(EvalSampler(24, 5, 1, 2, groups, lambda ahead: heard.append(list(ahead))))
    assert heard == [[2, 3, 4, 5], [3, 4, 5], [5]]


def test_held_out_samples_leave_the_others_in_their_groups(shards: Path) -> None:
    source = opened(shards, window=2)
    kept = [n for n in range(30) if n % 5]
    groups = View(Subset(source, kept)).groups()
    bounds = source.firsts.tolist()
    assert groups is not None and groups.window == 2
    assert groups.sizes.tolist() == [sum(a <= n < b for n in kept) for a, b in pairwise(bounds)]
    assert View(Subset(source, kept[::-1])).groups() is None, "an order of the user's own has no windows"


def test_a_run_has_the_same_bits_on_one_and_two_processes_and_interrupted(
    ranks: Callable[..., list[Finished]], here: Callable[..., Any], shards: Path, tmp_path: Path
) -> None:
    here(*TRAIN, "run.name=one")
    results = ranks(2, "train", *TRAIN, "run.name=two", "train.steps=7", "data.workers=1")
    assert [result.rc for result in results] == [0, 0], results[0]
    here(*TRAIN, "run.name=two", "data.root=" + str(shards))  # from step 7 on, in the middle of an epoch
    assert equal(last(tmp_path, "one")["model"], last(tmp_path, "two")["model"])


# --- damage ----------------------------------------------------------------------------------------


def test_a_shard_that_was_changed_is_told_by_its_name(shards: Path) -> None:
    source = opened(shards)
    tar, table = shards / "train-00001.tar", shards / "train-00002.json"
    number = int(source.firsts[1])
    data = bytearray(tar.read_bytes())
    data[600] ^= 1  # in the first image
    tar.write_bytes(data)
    with pytest.raises(UserError, match=rf"train-00001\.tar/{number:09}\.png \(.*checksum"):
        source[number]
    assert torch.is_tensor(source[number + 1][0]), "the others of the shard are good"
    tar.write_bytes(data[:-1])
    with pytest.raises(BadShard, match=r"train-00001\.tar: has .* bytes, not the .* that the index says"):
        source[number + 1]
    tar.unlink()
    with pytest.raises(BadShard, match=r"train-00001\.tar: can't be read: No such file"):
        source[number]
    table.write_bytes(table.read_bytes().replace(b"0", b"1"))
    with pytest.raises(BadShard, match=r"train-00002\.json: not what the index says \(checksum\)") as caught:
        source[int(source.firsts[2])]
    assert caught.value.lost == source.shards[2].samples
    assert source.path(int(source.firsts[2])) == f"{shards}/train-00002.tar"


@pytest.mark.long
def test_a_lost_shard_is_skipped_as_a_whole_alike_on_any_number_of_processes(
    ranks: Callable[..., list[Finished]], here: Callable[..., Any], shards: Path, tmp_path: Path
) -> None:
    (shards / "train-00003.tar").unlink()
    (shards / "val-00001.tar").unlink()
    with pytest.raises(UserError, match=r"shards/train-00003\.tar: can't be read"):
        here(*TRAIN, "run.name=stopped")
    words = [*TRAIN, "data.on_bad_sample=skip"]
    result = here(*words, "run.name=one")
    assert 0 < result.metrics["eval/accuracy"] <= 1
    results = ranks(2, "train", *words, "run.name=two")
    assert [result.rc for result in results] == [0, 0], results[0]
    assert equal(last(tmp_path, "one")["model"], last(tmp_path, "two")["model"])
    lines = (tmp_path / "runs/two/bad_samples.jsonl").read_text().splitlines()
    lost = sorted(json.loads(line)["sample"] for line in lines)
    assert lost == ["shards/train-00003.tar", "shards/val-00001.tar"]
    for path in shards.glob("train-*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="Nor could any of the"):
        here(*words, "run.name=nothing")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("classes"),
        lambda index: index.update(format=99),
        lambda index: index["shards"]["train"][0].update(name="../train-00000"),
        lambda index: index["shards"]["train"][0].update(samples=-1),
        lambda index: index["shards"]["train"][0]["tar"].update(sha256="../../x"),
        lambda index: index["shards"]["train"][0]["tar"].update(bytes="many"),
        lambda index: index["shards"].update(train=[]),
        lambda index: index["shards"].update(train=7),
    ],
)
def test_an_index_is_not_believed(change: Callable[[Any], Any], shards: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    change(index)
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"shards/index\.json: "):
        opened(shards)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.pop("names"),
        lambda table: table["offsets"].pop(),
        lambda table: table["sizes"].__setitem__(0, 10**9),
        lambda table: table["offsets"].__setitem__(0, -5),
        lambda table: table["labels"].__setitem__(0, 3),
        lambda table: table["labels"].__setitem__(0, 10**30),
    ],
)
def test_nor_is_a_table(change: Callable[[Any], Any], shards: Path) -> None:
    path = shards / "train-00000.json"
    table = json.loads(path.read_text())
    change(table)
    data = json.dumps(table).encode()
    path.write_bytes(data)
    index = json.loads((shards / "index.json").read_text())
    index["shards"]["train"][0]["json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(BadShard, match=r"train-00000\.json: no table of a shard's samples"):
        opened(shards)[0]


def test_a_file_from_elsewhere_does_not_say_where_to_fetch_from_or_where_to_keep_it(tmp_path: Path) -> None:
    read = partial(from_file, where=tmp_path, needed=["data."])
    given = {"data": {"name": "shards", "root": "s3://elsewhere/shards"}}
    with pytest.raises(UserError, match=r"data\.root: the file says where it would be fetched from"):
        read(given)
    assert read(given, overrides=["data.root=s3://mine/shards"]).data.root == "s3://mine/shards"
    with pytest.raises(UserError, match=r"data\.download_dir: files would be written and deleted"):
        read({"data": {"name": "shards", "root": "shards", "download_dir": "/home"}})
    assert read({"data": {"name": "shards", "root": "shards"}}).data.root == "shards"
