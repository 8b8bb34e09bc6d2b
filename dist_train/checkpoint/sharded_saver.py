"""What each rank writes of a sharded checkpoint behind the loop's back, and how it becomes visible at once.

The parts are written to a folder of a temporary name. Each rank tells by a small file there that its part
is durable; rank 0 waits for these, writes the manifest, and renames the folder. So no thread needs the
process group, and wherever a rank is killed, there is a whole checkpoint or none.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from dist_train.checkpoint.files import sync_folder, write_atomically
from dist_train.checkpoint.saver import Checkpoints, reason_of
from dist_train.checkpoint.sharded import DTYPES, FORMAT, MANIFEST, dump, is_covered, rows
from dist_train.checkpoint.snapshot import PLAIN, is_finite, to_cpu
from dist_train.checkpoint.stored import step_of
from dist_train.config import UserError
from dist_train.rows import held

SMALL = 2**20  # bytes; of what all ranks hold, rank 0 writes the tensors that are smaller
GRACE_SECONDS = 5.0  # for the parts of ranks that may be gone
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Part:
    """What one rank writes of a state, and how all of it is put together again."""

    tree: Any  # the state as JSON has it; tensors by their names
    shapes: dict[str, tuple[str, list[int]]]  # of each whole tensor: its type and shape
    tensors: dict[str, torch.Tensor]  # those that this rank writes, or its rows of them
    first: dict[str, int]  # the first row of each of these


def cut(state: Mapping[str, Any], rank: int, world_size: int) -> Part:
    """The part of `state` that `rank` writes; nothing is copied, and no rank waits for another.

    A tensor that is sharded (DTensor) is written by each rank that has rows of it. Of those that every rank
    holds, rank 0 writes the small ones; the others are spread over the ranks by their sizes.

    Raises UserError for what could not be read back, by its name.
    """
    tensors: dict[str, torch.Tensor] = {}
    part = Part(flatten(state, "", tensors), {}, {}, {})
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES or tensor.layout != torch.strided:
            raise UserError(f"a sharded checkpoint can't hold {name}, a {tensor.layout} of {tensor.dtype}.")
        part.shapes[name] = NAMES[tensor.dtype], list(tensor.shape)
        values, first, is_first = held(tensor, name)
        if first is None:
            whole[name] = values
        elif is_first and len(values):
            part.tensors[name], part.first[name] = values, first
    for name, owner in _owners(whole, world_size).items():
        if owner == rank:
            part.tensors[name], part.first[name] = whole[name], 0
    return part


def _owners(tensors: dict[str, torch.Tensor], world_size: int) -> dict[str, int]:
    """Which rank writes each of the tensors that all of them hold: the next largest goes to who has least."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    owners = dict.fromkeys(sizes, 0)
    loads = [(0, rank) for rank in range(world_size)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if sizes[name] >= SMALL:
            load, owners[name] = heapq.heappop(loads)
            heapq.heappush(loads, (load + sizes[name], owners[name]))
    return owners


def flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON has it, with its tensors put into `tensors` by names that are paths.

    What JSON lacks is an object with one key, which begins with $. Raises UserError for what is neither a
    tensor nor a plain value.
    """
    if isinstance(value, torch.Tensor):
        while name in tensors:  # keys with a slash in them
            name += "'"
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        items = [(key, flatten(item, f"{name}/{key}".lstrip("/"), tensors)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key in value):
            return dict(items)
        return {"$items": [[flatten(key, f"a key of {name}", {}), item] for key, item in items]}
    if type(value) in (list, tuple, torch.Size):
        flat = [flatten(item, f"{name}/{number}", tensors) for number, item in enumerate(value)]
        return flat if type(value) is list else {"$tuple": flat}
    if type(value) is bytes:
        return {"$bytes": value.hex()}
    if type(value) in PLAIN:
        return value
    raise UserError(f"{name} is a {type(value).__qualname__}; only tensors and plain values can be saved.")


def write_part(folder: Path, rank: int, part: Part) -> None:
    """Writes a rank's part into `folder`, then tells by a file that it is there; durable on return."""
    name = f"part-{rank:05d}.safetensors"
    size, digest = _write_tensors(folder / name, part.tensors)
    held = {name: [first, rows(part.tensors[name].shape)] for name, first in part.first.items()}
    tell(folder, rank, {"file": name, "size": size, "sha256": digest, "rows": held})


def tell(folder: Path, rank: int, what: dict[str, Any]) -> None:
    """Tells rank 0 of a part that is there, or, by `failed`, why it won't come."""
    write_atomically(folder / f"rank-{rank}.json", lambda file: file.write(dump(what)))


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[int, str]:
    """Writes a file of safetensors; returns its size and SHA-256.

    Format: the length of the header, the header, the numbers (github.com/huggingface/safetensors). Its own
    library would hold all of them a second time, and the file would be read again for the checksum.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = dump(header)
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in (struct.pack("<Q", len(text)), text, *map(_bytes, tensors.values())):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def finish(
    folder: Path, path: Path, part: Part, world_size: int, cancelled: threading.Event, seconds: float
) -> None:
    """On rank 0: waits until all parts are durable, writes the manifest, and renames `folder` to `path`.

    Raises RuntimeError if a rank tells that its part won't come, and if one doesn't come in `seconds` or
    until the save is `cancelled`.
    """
    reports: dict[int, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    while missing := sorted(set(range(world_size)) - reports.keys()):
        for rank in missing:
            if (note := folder / f"rank-{rank}.json").exists():
                reports[rank] = json.loads(note.read_bytes())
                if why := reports[rank].get("failed"):
                    raise RuntimeError(f"rank {rank}: {why}")
        if len(reports) < world_size and (cancelled.wait(0.02) or time.monotonic() > end):
            raise RuntimeError(f"the part of rank {missing[0]} has not come")
    tensors: dict[str, Any] = {n: {"dtype": d, "shape": s, "rows": []} for n, (d, s) in part.shapes.items()}
    for _, what in sorted(reports.items()):
        for name, (first, count) in what["rows"].items():
            tensors[name]["rows"].append([what["file"], first, count])
    for name, entry in tensors.items():
        entry["rows"].sort(key=lambda piece: piece[1])
        if not is_covered(entry["rows"], rows(entry["shape"])):
            raise RuntimeError(f"some rows of {name} were written by no rank")
    files = {what["file"]: {"size": what["size"], "sha256": what["sha256"]} for what in reports.values()}
    manifest = {"format": FORMAT, "state": part.tree, "tensors": tensors, "files": files}
    text = dump({"sha256": hashlib.sha256(dump(manifest)).hexdigest(), "manifest": manifest})
    write_atomically(folder / MANIFEST, lambda file: file.write(text))
    for rank in reports:
        (folder / f"rank-{rank}.json").unlink()
    sync_folder(folder)
    folder.rename(path)
    sync_folder(path.parent)


class ShardedCheckpoints(Checkpoints):
    """The folder of a run's sharded checkpoints, on each rank; ranks must share it.

    `save` and `wait` are collective: all ranks call them, for the same steps.

    Args:
        ranks: this rank among the others.
        seconds: how long rank 0 waits for the part of another one.
    """

    suffix = ".sharded"

    def __init__(
        self, run: Path, keep: int, say: Callable[[str], None], ranks: Ranks, seconds: float = 600
    ) -> None:
        self._ranks, self._seconds = ranks, seconds
        self._cancelled, self._lost = threading.Event(), ""
        super().__init__(run, keep, say, ranks.rank == 0)
        self._writes = True
        # No rank of an attempt that is over, but has not noticed, writes where this one does.
        self._attempt, self._saves = os.urandom(4).hex(), 0  # rank 0's, from the first `wait` on

    def wait(self) -> str:
        """Waits until the save in flight is durable on all ranks; returns why it failed, or nothing."""
        if self._ranks.rank > 0:
            super().wait()
        failed = [f"rank {rank}: {why}" for rank, why in enumerate(self._ranks.gather(self.failure)) if why]
        if self._ranks.rank == 0:
            if failed:  # a rank that could not even tell so by a file
                self._lost = failed[0]
                self._cancelled.set()
            super().wait()
            self._clear()  # all threads are at rest
            self._cancelled.clear()
        outcome = self.failure, self.best, self.best_step, self._attempt
        self.failure, self.best, self.best_step, self._attempt = self._ranks.from_main(outcome)
        return self.failure

    def close(self) -> None:
        """Waits for the save in flight; not long for the parts of ranks that may be gone."""
        if self._writer and self._ranks.rank == 0:
            self._writer.join(max(GRACE_SECONDS, 2 * self.write_seconds))
            self._cancelled.set()
        super().wait()

    def _take(self, state: dict[str, Any]) -> Part:
        self._saves += 1
        self.failure = self._lost = ""
        part = cut(state, self._ranks.rank, self._ranks.world_size)
        self._copy = to_cpu(part.tensors, self._copy)
        return replace(part, tensors=self._copy)

    def _put(self, path: Path, part: Part) -> None:
        folder = self.folder / f"step-{step_of(path):08d}.{self._attempt}-{self._saves}.tmp"
        rank = self._ranks.rank
        try:
            weights = (item for item in part.tensors.items() if item[0].startswith("model/"))
            if bad := [name for name, value in weights if not is_finite(value)]:
                raise ValueError(f"the weights are not finite ({bad[0].removeprefix('model/')})")
            folder.mkdir(exist_ok=True)
            write_part(folder, rank, part)
            if rank == 0:
                finish(folder, path, part, self._ranks.world_size, self._cancelled, self._seconds)
        except Exception as error:
            if rank > 0:
                with suppress(OSError):
                    folder.mkdir(exist_ok=True)
                    tell(folder, rank, {"failed": reason_of(error)})
            elif self._lost:
                raise RuntimeError(self._lost) from error
            raise

    def _write(self, path: Path, copied: Any, best: tuple[float | None, int | None]) -> None:
        if self._ranks.rank == 0:
            return super()._write(path, copied, best)
        try:
            self._put(path, copied)
        except Exception as error:
            self.failure = reason_of(error)

    def _fail(self, path: Path, why: str) -> None:
        super()._fail(path, why)
        self.failure = why if self._ranks.rank > 0 else self.failure


class Ranks(Protocol):
    """What is needed of this process's place among the others: see runtime.py."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""

    def from_main(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
