"""Images in shards: plain tar files, each with a table of what lies where, in a folder or behind a URL.

`index.json` names the shards of each part with their sizes and checksums, and the classes; it is small. The
table of a shard (`train-00000.json`) is read when the first of its samples is. tools/shard.py writes both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch.utils.data import Dataset

from dist_train.config import UserError
from dist_train.data.images import BadSample, decode, near_path
from dist_train.data.remote import Downloads, Object, Remote, Unreachable
from dist_train.data.windows import Groups

FORMAT = 1
INDEX = "index.json"
NAME = re.compile(r"[A-Za-z0-9_-]+")


class BadShard(BadSample):
    """A shard that is missing, or not what the index says."""


class Shard(NamedTuple):
    """What the index says of a shard."""

    samples: int
    tar: Object
    table: Object


class Table(NamedTuple):
    """What lies where in a shard: an entry for each sample."""

    offsets: np.ndarray  # int64 [N], of the image's first byte in the tar file
    sizes: np.ndarray  # int64 [N], of the image in bytes
    crc32: np.ndarray  # int64 [N]
    labels: np.ndarray  # int64 [N]
    names: list[str]  # of the files that the images were


class Index(NamedTuple):
    """What there is: shards of each part of the set, and the names of the classes."""

    shards: dict[str, list[Shard]]
    classes: list[str]


class Folder:
    """The objects in a folder, read where they lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, item: Object) -> int:
        """The object as a file to read."""
        return os.open(self.folder / item.name, os.O_RDONLY)

    def renew(self, item: Object) -> bool:
        """Whether another copy of a damaged object can be had: no."""
        return False


class Shards(Dataset[Any]):
    """One part of a set of shards; an image is decoded when it is read."""

    in_threads = True

    def __init__(
        self, root: str, index: Index, part: str, files: Folder | Remote, window: int = 8, channels: int = 3
    ) -> None:
        self.root, self.files, self.classes, self.channels = root, files, index.classes, channels
        self.shards = index.shards[part]
        self.firsts = np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])])
        self.window = window
        self._tables: dict[int, Table] = {}  # of the shards that were read last

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        data, label = self.encoded(index)
        return decode(data, self.path(index), self.channels), label

    def encoded(self, index: int) -> tuple[bytes, int]:
        """The bytes of a sample's image file, and its label. Raises BadSample if they were changed."""
        number, row = self._place(index)
        table = self._table(number)
        span = int(table.offsets[row]), int(table.sizes[row])
        data = self._read(number, *span)
        if zlib.crc32(data) != table.crc32[row] and self.files.renew(self.shards[number].tar):
            data = self._read(number, *span)
        if zlib.crc32(data) != table.crc32[row]:
            raise BadSample(
                f"{self.path(index)}: not what was written (checksum): the shard is damaged, or was changed."
            )
        return data, int(table.labels[row])

    def path(self, index: int) -> str:
        """The place of a sample, and the name of the file that it was; the shard where that can't be told."""
        number, row = self._place(index)
        try:
            name = self._table(number).names[row]
        except BadShard:
            return self._shown(number)
        return f"{self._shown(number)}/{member(index, name)} ({name})"

    def groups(self) -> Groups:
        """The samples of a shard lie together."""
        return Groups(np.diff(self.firsts), self.window)

    def soon(self, groups: Iterator[int]) -> None:
        """Has shards fetched in the order in which they will be read."""
        if isinstance(self.files, Remote):
            wanted = (item for n in groups for item in (self.shards[n].table, self.shards[n].tar))
            self.files.fetch(wanted, in_use=_most(self.shards, self.window))

    def _shown(self, number: int) -> str:
        """The place of a shard."""
        return f"{self.root.rstrip('/')}/{self.shards[number].tar.name}"

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return number, index - int(self.firsts[number])

    def _table(self, number: int) -> Table:
        table = self._tables.get(number)
        if table is None:
            shard = self.shards[number]
            data = self._read(number, 0, shard.table.bytes, of_table=True)
            if hashlib.sha256(data).hexdigest() != shard.table.sha256:
                self._lose(
                    number, shard.table, "not what the index says (checksum): it is damaged, or changed"
                )
            try:
                table = _read_table(data, shard, len(self.classes))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                self._lose(number, shard.table, "no table of a shard's samples")
            self._tables[number] = table
            for old in list(self._tables)[: -2 * self.window]:
                self._tables.pop(old, None)
        return table

    def _read(self, number: int, offset: int, size: int, of_table: bool = False) -> bytes:
        """So many bytes of a shard or of its table. Raises BadShard."""
        shard = self.shards[number]
        item = shard.table if of_table else shard.tar
        try:
            # Opened for each read: what is not held open can be deleted when room is needed.
            file = self.files.open(item)
            try:
                if (there := os.fstat(file).st_size) != item.bytes:
                    self._lose(
                        number, item, f"has {there:,} bytes, not the {item.bytes:,} that the index says"
                    )
                return os.pread(file, size, offset)
            finally:
                os.close(file)
        except Unreachable as error:
            self._lose(number, item, str(error))
        except OSError as error:
            self._lose(number, item, f"can't be read: {error.strerror}")

    def _lose(self, number: int, item: Object, reason: str) -> NoReturn:
        error = BadShard(f"{self.root.rstrip('/')}/{item.name}: {reason}.")
        error.lost, error.whole = self.shards[number].samples, self._shown(number)
        raise error


def shards(
    root: str | None = None,
    train: bool = True,
    channels: int = 3,
    window: int = 8,
    downloads: Downloads | None = None,
) -> Shards | None:
    """What `dist-train shard` wrote, in a folder or behind a URL (`s3://`, `gs://`, `az://`, `https://`).

    So many shards as `window` says are read at a time, their samples mixed with each other.
    """
    if not root:
        raise UserError("data.root: shards needs the folder or the URL that holds them.")
    if window < 1:
        raise UserError(f"data.args.window: is at least 1, not {window}.")
    files: Folder | Remote
    if "://" in root:
        files = Remote(root, downloads or Downloads())
        index = read_index(files.read(INDEX), f"{root}/{INDEX}")
    else:
        files = Folder(Path(root))
        if not Path(root).is_dir():
            raise UserError(f"data.root: there is no folder {root}{near_path(Path(root))}.")
        try:
            index = read_index((Path(root) / INDEX).read_bytes(), f"{root}/{INDEX}")
        except OSError as error:
            raise UserError(
                f"data.root: {root}/{INDEX} can't be read: {error.strerror}; dist-train shard writes it"
                " when all shards are there."
            ) from None
    part = "train" if train else "val"
    if not index.shards.get(part):
        if train:
            raise UserError(f"{root}/{INDEX}: lists no shards for training.")
        return None
    least = 2 * _most(index.shards[part], window)
    if isinstance(files, Remote) and least > files.downloads.limit:
        raise UserError(
            f"data.download_gb: {files.downloads.limit / 1e9:g} is too little for two windows of {window}"
            f" shards ({least / 1e9:.3g}); give more, or a smaller data.args.window."
        )
    return Shards(root, index, part, files, window, channels)


def _most(listed: Sequence[Shard], window: int) -> int:
    """The most bytes that a window of shards takes."""
    sizes = sorted((shard.tar.bytes + shard.table.bytes for shard in listed), reverse=True)
    return sum(sizes[:window])


def member(number: int, name: str) -> str:
    """The name in a shard of an image that is the sample `number` and was the file `name`."""
    return f"{number:09}{Path(name).suffix.lower()}"


def read_index(data: bytes, where: str) -> Index:
    """An index; nothing that it says is believed. Raises UserError where it is none."""
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise UserError(
                f"{where}: written in format {content['format']}, but this version reads {FORMAT}; make the"
                " set anew, or use the version that made it."
            )
        classes = [str(name) for name in content["classes"]]
        parts = {str(part): list(map(_shard, listed)) for part, listed in content["shards"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{where}: not an index of shards, as dist-train shard writes it.") from None
    return Index(parts, classes)


def _shard(entry: Any) -> Shard:
    """What an index says of a shard. Raises ValueError for what can't be."""
    name, samples = entry["name"], entry["samples"]
    items = [Object(f"{name}.{end}", entry[end]["bytes"], entry[end]["sha256"]) for end in ("tar", "json")]
    numbers = (samples, *(item.bytes for item in items))
    sums = (item.sha256 for item in items)
    if not (NAME.fullmatch(name) and all(type(n) is int and 0 < n < 2**53 for n in numbers)):
        raise ValueError
    if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in sums):
        raise ValueError
    return Shard(samples, *items)


def _read_table(data: bytes, shard: Shard, classes: int) -> Table:
    """A table. Raises ValueError and such for what can't be."""
    content = json.loads(data)
    offsets, sizes, crc32, labels = columns = [
        np.array(content[name], np.int64) for name in ("offsets", "sizes", "crc32", "labels")
    ]
    table = Table(offsets, sizes, crc32, labels, [str(name) for name in content["names"]])
    shapes = {column.shape for column in columns} | {(len(table.names),)}
    ends = table.offsets + table.sizes
    if shapes != {(shard.samples,)} or (table.labels < 0).any() or (table.labels >= classes).any():
        raise ValueError
    if (table.offsets < 0).any() or (table.sizes < 0).any() or (ends > shard.tar.bytes).any():
        raise ValueError
    return table
