"""What lies in the training and the eval set of a run: counts, sizes, images that come twice, and leaks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from dist_train.data.normalize import as_tensor
from dist_train.data.samples import UNREADABLE, Samples

MOST_BYTES = 1_000_000_000  # of pixels that are looked at in a set, unless all are asked for
THREADS, CHUNK = 8, 64
UNREAD = 0  # the digest of an image that can't be read: it is like no other


@dataclass
class Looked:
    """What was found in the first samples of a set, or in all."""

    samples: int  # in the set
    labels: np.ndarray | None  # int64, of all samples where they are at hand, else of those looked at
    seen: int = 0  # samples that were looked at
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # [seen], of the pixels
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)  # [C, H, W] of the images
    unreadable: list[str] = field(default_factory=list)  # why


def look(samples: Samples, everything: bool = False) -> Looked:
    """Looks at the images of a set as they are read, the first ones up to MOST_BYTES or `everything`."""
    labels = samples.source.all_labels()
    by_class = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    found = Looked(len(samples), labels.numpy() if labels is not None and by_class else None)
    if samples.transform is None:  # no images
        return found
    digests, own, read = [], [], 0
    for label, shape, digest, reason in _all(samples):
        found.seen += 1
        digests.append(digest)
        own.append(label)
        if reason:
            found.unreadable.append(reason)
            continue
        found.shapes[shape] += 1
        read += int(np.prod(shape))
        if read >= MOST_BYTES and not everything:
            break
    found.digests = np.array(digests, np.uint64)
    if labels is None and all(type(label) is int for label in own):
        found.labels = np.array(own)
    return found


def _all(samples: Samples) -> Iterator[tuple[object, tuple[int, ...], int, str]]:
    """Of each sample its label, the shape of its image, what tells its pixels from others, and an error."""

    def one(index: int) -> tuple[object, tuple[int, ...], int, str]:
        try:
            image, label = samples.pair(index)
        except UNREADABLE as error:
            return None, (), UNREAD, str(error)
        pixels = as_tensor(image).as_subclass(torch.Tensor).contiguous()
        content = hashlib.blake2b(pixels.view(torch.uint8).numpy().data, digest_size=8)
        content.update(str((pixels.dtype, pixels.shape)).encode())
        label = label.item() if isinstance(label, torch.Tensor) and label.ndim == 0 else label
        return label, tuple(pixels.shape), int.from_bytes(content.digest(), "little"), ""

    with ThreadPoolExecutor(THREADS if samples.source.in_threads else 1) as pool:
        for first in range(0, len(samples), CHUNK):
            yield from pool.map(one, range(first, min(first + CHUNK, len(samples))))


def twins(found: Looked) -> list[list[int]]:
    """The groups of samples, by their numbers, that have the same pixels."""
    order = np.argsort(found.digests, kind="stable")
    cuts = np.flatnonzero(np.diff(found.digests[order])) + 1
    groups = np.split(order, cuts)
    return sorted(group.tolist() for group in groups if len(group) > 1 and found.digests[group[0]] != UNREAD)


def leaks(train: Looked, evaluation: Looked) -> list[tuple[int, int]]:
    """(training sample, eval sample) with the same pixels: each such eval sample once, in their order."""
    order = np.argsort(train.digests, kind="stable")
    known = train.digests[order]
    place = np.searchsorted(known, evaluation.digests)
    inside = (place < len(known)) & (evaluation.digests != UNREAD)
    inside[inside] = known[place[inside]] == evaluation.digests[inside]
    return [(int(order[place[n]]), int(n)) for n in np.flatnonzero(inside)]
