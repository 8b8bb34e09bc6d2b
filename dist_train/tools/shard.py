"""Shards: the images of a folder or a CSV file as plain tar files of even size, with tables and an index.

A sample is two members, as WebDataset has them: `000000035.png`, the image file as it was, and
`000000035.cls`, the number of its class. What is written is a function of the images, their order and a seed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from dist_train.checkpoint import write_atomically
from dist_train.config import UserError, counted, from_mapping
from dist_train.data.images import ImageFiles, as_text
from dist_train.data.permutation import permuted
from dist_train.data.shards import FORMAT, INDEX, member
from dist_train.data.sources import open_source
from dist_train.runtime import allowed_cpus
from dist_train.seeds import key

MAKING = "making.json"  # there while a set is made; says which
BLOCK = 512  # bytes, of a tar file


class Part(NamedTuple):
    """The images for training, or those for evaluation."""

    images: ImageFiles
    sizes: np.ndarray  # int64 [N], in bytes
    times: np.ndarray  # int64 [N], of the last change, in ns


class Plan(NamedTuple):
    """A shard that is to be written."""

    name: str
    images: ImageFiles
    first: int  # the number of its first sample
    positions: np.ndarray  # [N] of its samples among the images


def make(source: Path, out: Path, words: Sequence[str], size: int, seed: int) -> list[str]:
    """Writes shards of about `size` bytes into `out`; returns a line for each part of the set.

    Goes on where it was interrupted. The index comes last: without it there is no set.

    Args:
        source: a folder as `image_folder` has it, or a CSV file.
        words: `data.args.KEY=VALUE`, of image_folder or csv.

    Raises UserError for images that can't be read, and where `out` holds anything else.
    """
    parts = _parts(source, words)
    plans = {name: list(_plans(name, part, size, seed)) for name, part in parts.items()}
    with _making(out, {"of": _fingerprint(parts, size, seed)}):
        _write_all([plan for listed in plans.values() for plan in listed], out)
        shards = {name: [_entry(out, plan) for plan in listed] for name, listed in plans.items()}
        classes = next(iter(parts.values())).images.classes
        _write_json(out / INDEX, {"format": FORMAT, "classes": classes, "shards": shards})
    return [
        f"{name}: {counted(len(parts[name].images), 'image')} in {counted(len(entries), 'shard')},"
        f" {sum(entry['tar']['bytes'] for entry in entries) / 1e6:.1f} MB"
        for name, entries in shards.items()
    ]


def _parts(source: Path, words: Sequence[str]) -> dict[str, Part]:
    """The images for training and, if there are any, for evaluation."""
    for word in words:
        if not word.startswith("data.args."):
            raise UserError(f"argument '{word}': shard takes data.args.KEY=VALUE alone, of what it reads.")
    if not source.exists():
        raise UserError(f"{source}: there is no such folder or CSV file.")
    name, root = ("image_folder", source) if source.is_dir() else ("csv", source.parent)
    args = {"annotations_file": source.name} if name == "csv" else {}
    given = {"name": name, "root": str(root), "args": args}
    options = from_mapping({"data": given, "train": {"epochs": 1}}, words).data
    found = {}
    for part in ("train", "val"):
        images = open_source(name, str(root), part == "train", options.args)
        if images is not None:
            found[part] = _measured(images)
    return found


def _measured(images: ImageFiles) -> Part:
    sizes, times = np.empty(len(images), np.int64), np.empty(len(images), np.int64)
    for position in range(len(images)):
        path = images.path(position)
        try:
            found = path.stat()
        except OSError as error:
            raise UserError(f"{as_text(path)}: can't be read: {error.strerror}.") from None
        sizes[position], times[position] = found.st_size, found.st_mtime_ns
    return Part(images, sizes, times)


def _plans(name: str, part: Part, size: int, seed: int) -> Iterator[Plan]:
    """Shards of even size. Images for training are mixed, so that each shard has some of all classes."""
    count = len(part.images)
    order = permuted(count, key(seed, "shards"), 0, count) if name == "train" else np.arange(count)
    ends = np.cumsum(3 * BLOCK + _padded(part.sizes[order]))
    shards = -(-int(ends[-1]) // size)
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, shards) / shards, side="right")
    bounds = np.unique([0, *cuts, count]).tolist()  # a shard has one image at least
    for number, (first, last) in enumerate(pairwise(bounds)):
        yield Plan(f"{name}-{number:05}", part.images, first, order[first:last])


def _fingerprint(parts: dict[str, Part], size: int, seed: int) -> str:
    """Of all that the files of a set depend on."""
    digest = hashlib.sha256(json.dumps([FORMAT, size, seed]).encode())
    for name, (images, sizes, times) in parts.items():
        digest.update(json.dumps([name, images.classes]).encode())
        for array in (images.paths, np.asarray(images.labels, np.int64), sizes, times):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@contextmanager
def _making(out: Path, what: dict[str, str]) -> Iterator[None]:
    """The folder of a set that is being made. Raises UserError where it holds anything else."""
    note = out / MAKING
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / INDEX).exists():
            raise UserError(f"{out}: holds a whole set of shards already; choose another folder.")
        if not note.exists() and any(out.iterdir()):
            raise UserError(f"{out}: is not empty; shards go into a folder of their own.")
        with note.open("a+", encoding="utf-8") as file:
            _lock(file, out)
            file.seek(0)
            before = file.read()
            if before and before != json.dumps(what):
                raise UserError(
                    f"{out}: shards of other images, or of another size, were begun there; delete the"
                    " folder, or choose another one."
                )
            if not before:
                json.dump(what, file)
                file.flush()
            yield
            note.unlink()
    except OSError as error:
        raise UserError(f"{out}: can't be written: {error.strerror}.") from None


def _lock(file: Any, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another process is writing shards there.") from None


def _write_all(plans: Sequence[Plan], out: Path) -> None:
    """Writes all shards that aren't there yet, several at a time."""
    pool = ThreadPoolExecutor(allowed_cpus())
    try:
        done = pool.map(lambda plan: _write(plan, out), plans)
        for _ in track(done, "shards", len(plans), console=Console(stderr=True), transient=True):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _write(plan: Plan, out: Path) -> None:
    """Writes a shard, and then its table: what has a table is whole."""
    tar, table = out / f"{plan.name}.tar", out / f"{plan.name}.json"
    if table.exists():
        return
    columns: dict[str, Any] = {name: [] for name in ("offsets", "sizes", "crc32", "labels", "names")}
    write_atomically(tar, partial(_write_tar, plan, columns))
    _write_json(table, columns)


def _write_tar(plan: Plan, columns: dict[str, Any], file: BinaryIO) -> None:
    """Writes the members of a shard; adds what its table says of them to `columns`."""
    digest, offset = hashlib.sha256(), 0
    for number, position in enumerate(plan.positions.tolist(), plan.first):
        path, label = plan.images.path(position), int(plan.images.labels[position])
        name = as_text(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{name}: can't be read: {error.strerror}.") from None
        row = (offset + BLOCK, len(data), zlib.crc32(data), label, name)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
        members = {member(number, path.name): data, f"{number:09}.cls": str(label).encode()}
        block = b"".join(_member(name, content) for name, content in members.items())
        digest.update(block)
        offset += file.write(block)
    end = bytes(2 * BLOCK)
    digest.update(end)
    columns |= {"bytes": offset + file.write(end), "sha256": digest.hexdigest()}


def _member(name: str, data: bytes) -> bytes:
    """A file in a tar file: a header, and blocks of content."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data.ljust(int(_padded(np.int64(len(data)))), b"\0")


def _padded(size: Any) -> Any:
    """A number of bytes, or several, in whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _entry(out: Path, plan: Plan) -> dict[str, Any]:
    """What the index says of a shard that was written."""
    data = (out / f"{plan.name}.json").read_bytes()
    table = json.loads(data)
    tar = {"bytes": table["bytes"], "sha256": table["sha256"]}
    if (out / f"{plan.name}.tar").stat().st_size != tar["bytes"]:
        raise UserError(f"{out / plan.name}.tar: was changed since it was written; delete the folder {out}.")
    of_table = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {"name": plan.name, "samples": len(plan.positions), "tar": tar, "json": of_table}


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content).encode()))
