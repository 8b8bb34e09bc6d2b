"""The cache: image files decoded once, their pixels as uint8 in one file that all readers map into memory.

Of an image with a mask both are kept, the mask behind the image.

A cache lies in a folder whose name is a fingerprint of the files and of what is kept of them, so a changed
file means another cache. `pixels` holds the images one after another, `index` where each lies, with a
checksum of its own; it appears when all are there. Each image is checked when a process first reads it, and
made again from its file where it is not what was kept: a reader never gets other pixels than without a cache.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import struct
import tempfile
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dist_train.config import UserError
from dist_train.config.sections import DataConfig
from dist_train.data.ahead import ahead
from dist_train.data.images import ImageFiles
from dist_train.data.masks import ImageMasks

FORMAT = 1
RECORD = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("crc", "<u4"), ("state", "<u4")])
MISSING, KEPT, BY_FILE = range(3)  # of an image; the last are bad ones, or have more than 8 bits
DIGEST = 16  # bytes of the checksum at the end of the index
CHUNK = 1000  # files that a thread looks at in one go


class Maps(NamedTuple):
    """The files of a cache, mapped into memory."""

    records: np.ndarray  # [N] of RECORD
    pixels: np.ndarray  # uint8, flat
    stat: os.stat_result  # of the file of pixels


Files = ImageFiles | ImageMasks


class Cached(Dataset[Any]):
    """Image files whose pixels are kept in the cache that `folder` holds.

    Args:
        release: called when this process needs the cache no more.
    """

    in_threads = True

    def __init__(self, files: Any, folder: Path, release: Callable[[], None] | None = None) -> None:
        self.files, self.folder, self.classes = files, folder, files.classes
        self.checked = np.zeros(len(files), bool)  # which images this process has compared to their checksums
        self._maps: Maps | None = None
        if release is not None:
            weakref.finalize(self, release)
        gigabytes = (folder / "pixels").stat().st_size / 1e9
        self.note = (
            f"data.cache: {len(files):,} images are decoded in {folder} ({gigabytes:.3g} GB){files.note}"
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict[str, Any]:  # for workers that are not forked: a map would be sent whole
        return self.__dict__ | {"_maps": None}

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return self.files.path(index)

    def all_labels(self) -> torch.Tensor:
        """The labels `[N, ...]` of all samples."""
        labels: torch.Tensor = self.files.all_labels()
        return labels

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        """An image uint8 `[C, H, W]`, in memory `[H, W, C]`, and its label."""
        if self._maps is None:
            self._maps = open_maps(self.folder, self.files)
        offset, height, width, crc, state = self._maps.records[index].tolist()
        if state != KEPT:
            return self.files[index]
        size = height * width * self.files.channels
        kept = self._maps.pixels[offset : offset + height * width * bytes_of_pixel(self.files)]
        if not self.checked[index]:
            if zlib.crc32(kept.data) != crc:
                sample = self.files[index]
                self._mend(offset, flat(*sample), crc)
                return sample
            self.checked[index] = True
        image = torch.from_numpy(kept[:size].reshape(height, width, self.files.channels)).permute(2, 0, 1)
        return image, self.target(index, kept[size:].reshape(height, -1))

    def target(self, index: int, rest: np.ndarray) -> Any:
        """The label of a sample; `rest` is what is kept behind its image."""
        return self.files.labels[index].item()

    def _mend(self, offset: int, pixels: memoryview | None, crc: int) -> None:
        """Writes a sample anew that is damaged in the cache, if it is what was kept, and if we may."""
        if pixels is None or zlib.crc32(pixels) != crc:  # its file has changed meanwhile
            return
        with contextlib.suppress(OSError):
            descriptor = os.open(self.folder / "pixels", os.O_WRONLY)
            try:
                # In a file that another process has made meanwhile other images lie there.
                if self._maps and os.path.samestat(os.fstat(descriptor), self._maps.stat):
                    os.pwrite(descriptor, pixels, offset)
            finally:
                os.close(descriptor)


class CachedMasks(Cached):
    """Images with their masks, both in the cache: no labels, and no threads, as Source says of a base."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        """An image uint8 `[C, H, W]` and its mask uint8 `[H, W]`."""
        return super().__getitem__(index)

    def target(self, index: int, rest: np.ndarray) -> Any:
        """The mask of a sample."""
        from torchvision.tv_tensors import Mask

        return Mask(torch.from_numpy(rest))


def with_cache(source: Any, options: DataConfig) -> Any:
    """A data set as the configuration keeps it: image files made smaller, and their pixels in a cache.

    Raises UserError where its samples are no image files, or the cache can't be written.
    """
    if options.cache == "none" and options.cache_size is None:
        return source
    key = "data.cache" if options.cache != "none" else "data.cache_size"
    if options.name == "shards":
        raise UserError(
            f"{key}: shards are copied to data.download_dir, if they are not in a folder, and their images"
            " are decoded when they are read; leave it out."
        )
    if type(source) not in (ImageFiles, ImageMasks):
        raise UserError(
            f"{key}: '{options.name}' has no image files that could be decoded once; leave it out."
        )
    if type(source) is ImageMasks and options.cache_size is not None:
        raise UserError("data.cache_size: masks are kept as large as they are; leave it out.")
    files = copy.copy(source)
    files.shorter = options.cache_size
    if options.cache_size:
        files.note = f"; their shorter side has at most {options.cache_size} pixels: another data set"
    if options.cache == "none":
        return files
    from dist_train.data.cache_build import kept_in

    in_memory = options.cache == "memory"
    return kept_in(files, place(options), in_memory)


def place(options: DataConfig) -> Path:
    """The folder that holds caches: of pixels in memory one that Linux keeps there."""
    if options.cache == "memory":
        shared = Path("/dev/shm")
        return (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"dist_train-{os.getuid()}"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(options.cache_dir or Path(home) / "dist_train")


def bytes_of_pixel(files: Files) -> int:
    """How many bytes are kept of each pixel."""
    return files.channels + isinstance(files, ImageMasks)


def fingerprint(files: Files, threads: int) -> str:
    """What the pixels in a cache are a function of: paths, sizes and times of the files, and settings."""
    masked = f" {len(files.classes)} classes" if isinstance(files, ImageMasks) else ""
    paths = np.concatenate([files.images, files.masks]) if isinstance(files, ImageMasks) else files.paths

    def looked_at(first: int) -> bytes:
        found = []
        for packed in paths[first : first + CHUNK]:
            path = os.path.abspath(packed)
            try:
                stat = os.stat(path)
                size, time = stat.st_size, stat.st_mtime_ns
            except OSError:
                size, time = -1, 0
            found.append(struct.pack("<qqq", len(path), size, time) + path)
        return b"".join(found)

    settings = f"{FORMAT} {files.channels} {files.shorter}{masked}"
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for piece in ahead(looked_at, range(0, len(paths), CHUNK), threads, 2 * threads):
        digest.update(piece)
    return digest.hexdigest()


def open_maps(folder: Path, files: Files) -> Maps:
    """A whole cache of these files. Raises ValueError or OSError where it is none."""
    data = np.fromfile(folder / "index", np.uint8)
    if len(data) != len(files) * RECORD.itemsize + DIGEST or checksum(data[:-DIGEST]) != bytes(
        data[-DIGEST:]
    ):
        raise ValueError("the index is damaged")
    records = data[:-DIGEST].view(RECORD)
    stat = (folder / "pixels").stat()
    end = int((records["offset"] + sizes(records, files)).max(initial=0))
    if stat.st_size < end or (records["state"] == MISSING).any():
        raise ValueError("pixels are missing")
    # What somebody writes into an image stays in this process: nothing reaches the file.
    pixels = np.memmap(folder / "pixels", np.uint8, "c") if end else np.empty(0, np.uint8)
    return Maps(records, np.asarray(pixels), stat)


def sizes(records: np.ndarray, files: Files) -> np.ndarray:
    """How many bytes each sample takes, int64 `[N]`."""
    return records["height"].astype(np.int64) * records["width"] * bytes_of_pixel(files)


def checksum(records: np.ndarray) -> bytes:
    """Of the whole index."""
    return hashlib.blake2b(records.tobytes(), digest_size=DIGEST).digest()


def flat(image: torch.Tensor, target: Any) -> memoryview | None:
    """The pixels of an image uint8 `[C, H, W]` as they lie in the file, `[H * W * C]`; behind them its mask.

    None for an image of more than 8 bits.
    """
    if image.dtype != torch.uint8:
        return None
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy()).reshape(-1)
    if isinstance(target, torch.Tensor):
        pixels = np.concatenate([pixels, target.numpy().reshape(-1)])
    return pixels.data
