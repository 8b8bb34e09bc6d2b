"""Checkpoints: one file that rank 0 writes, atomically and behind the loop's back, and that can be trusted.

A file is a dict of state_dicts, the step, the configuration and a format version, saved by
torch.save; its zip container holds a CRC-32 of each tensor, so that a truncated or altered file is
recognized. Loading never runs code from a file (`weights_only=True`).
"""

from __future__ import annotations

import math
import pickle
import re
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_train.checkpoint import sharded
from dist_train.checkpoint.files import Damaged, delete, point, write_atomically
from dist_train.checkpoint.sharded import Wanted
from dist_train.checkpoint.snapshot import is_finite, to_cpu, unreadable
from dist_train.config import UserError

FORMAT = 2
# What each file holds, and of which kinds.
CONTENT: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "config": (dict,),
    "model": (dict,),
    "average": (dict, type(None)),
    "optimizer": (dict,),
    "scaler": (dict, type(None)),
    "best": (int, float, type(None)),
    "metrics": (dict,),
    "window": (dict,),
    "parts": (int,),
    "world_size": (int,),
    "classes": (list,),
    "sample_shape": (list,),
}
# A step that is saved again, as another kind or as a folder, which no rename replaces, gets a number.
NAME = re.compile(r"step-(\d{8,})(?:-(\d{1,8}))?\.(?:pt|sharded)")
LINKS = ("best.pt", "best.sharded", "last.pt", "last.sharded")
FIRST_SECONDS = 60.0  # from the start to the first save whose cost is measured
SHORTEST_SECONDS, LONGEST_SECONDS = 10.0, 3600.0


class Checkpoints:
    """The folder of a run's checkpoints, each one file: rank 0 writes, and on other ranks it does nothing.

    A save that fails, as on a full disk, ends nothing: it is told, and the next one tries again. Each file
    tells by `best_step` which one is the best; the links best.pt and last.pt are made from that.

    Args:
        run: the run's folder; they lie in its `checkpoints`.
        keep: how many of the newest to keep; the best is kept besides.
        say: hears of saves that failed.
        is_on: whether this is rank 0.
    """

    suffix = ".pt"

    def __init__(self, run: Path, keep: int, say: Callable[[str], None], is_on: bool = True) -> None:
        self.folder, self.keep, self._say, self.is_on = run / "checkpoints", keep, say, is_on
        if is_on:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear()
        self.failure = ""  # why the last save failed, or empty
        self.is_broken = False  # whether the next one would fail like the last one
        self.best: float | None = None  # value of the metric in the best one
        self.best_step: int | None = None
        self.stall_seconds: list[float] = []  # of each save: what the loop waited for it
        self.write_seconds = 0.0  # of the last save
        self._whole: dict[str, bool] = {}  # by name: those that were written or verified by this process
        self._writer: threading.Thread | None = None
        self._copy: Any = None
        self._writes = is_on

    def go_on(self, step: int, best: float | None, best_step: int | None) -> None:
        """Begins with the checkpoint of `step`, which is whole, and the best of those that are there."""
        self.best, self.best_step = best, best_step
        known = {path_of(self.folder, number).name for number in (step, best_step) if number is not None}
        self._whole = dict.fromkeys(known, True)
        self._link(step)

    def save(self, state: dict[str, Any]) -> None:
        """Copies `state` to memory, then writes it in a thread; waits first for the save before it."""
        if not self._writes:
            return
        begin = time.monotonic()
        self.wait()
        path = self._free(state["step"])
        try:
            copied = self._take(state)
        except UserError as error:
            self.is_broken = True
            self._fail(path, str(error))
            return
        best = state.get("best"), state.get("best_step")
        self._writer = threading.Thread(
            target=self._write, args=(path, copied, best), name="checkpoint", daemon=True
        )
        self._writer.start()
        self.stall_seconds.append(time.monotonic() - begin)

    def wait(self) -> str:
        """Waits until the save in flight is durable; returns why it failed, or nothing."""
        if self._writer:
            self._writer.join()
            self._writer = None
        return self.failure

    def close(self) -> None:
        """Waits for the save in flight where the run has failed, and other ranks may be gone."""
        self.wait()

    def interval(self, between_interruptions: float) -> float:
        """Seconds from save to save at which least time is lost: sqrt(2 x cost of a save x mean time
        between interruptions), after Young (1974) and Daly (2006), within reason.
        """
        costs = self.stall_seconds[1:] or self.stall_seconds  # the first save also allocates
        if not costs:
            return FIRST_SECONDS
        best = math.sqrt(2 * (sum(costs) / len(costs)) * between_interruptions)
        return min(max(best, SHORTEST_SECONDS, 4 * self.write_seconds), LONGEST_SECONDS)

    def _take(self, state: dict[str, Any]) -> Any:
        """A copy of what is written: the loop goes on changing the weights. Raises UserError."""
        if bad := unreadable(state):
            raise UserError(bad)
        self._copy = to_cpu(state, self._copy)
        return self._copy

    def _put(self, path: Path, state: Any) -> None:
        """Writes what `_take` has copied. Raises whatever happens."""
        if names := [name for name, value in state["model"].items() if not is_finite(value)]:
            raise ValueError(f"the weights are not finite ({names[0]})")
        write_atomically(path, lambda file: torch.save(state, file))

    def _write(self, path: Path, copied: Any, best: tuple[float | None, int | None]) -> None:
        begin = time.monotonic()
        try:
            self._put(path, copied)
            self._whole[path.name] = True
            self.best, self.best_step = best
            self._link(step_of(path))
            self.prune()
            self.failure = ""
        except Exception as error:
            # These may go away by themselves; torch makes a RuntimeError of one of the file system.
            self.is_broken = not isinstance(error, (OSError, RuntimeError, ValueError))
            why = reason_of(error)
            self._fail(path, f"{type(error).__name__}: {why}" if self.is_broken else why)
        self.write_seconds = time.monotonic() - begin

    def _fail(self, path: Path, why: str) -> None:
        self.failure = f"{path} could not be written: {why}"
        end = "" if self.is_broken else ", the next one is tried"
        self._say(f"{self.failure}; the checkpoints before it are untouched{end}.")

    def _free(self, step: int) -> Path:
        """Where the state after `step` is written: over no folder, nor beside another kind of that name."""
        same = [path for path in newest_first(self.folder) if step_of(path) == step]
        if not same or (self.suffix == ".pt" and all(path.suffix == ".pt" for path in same)):
            return same[0] if same else self.folder / f"step-{step:08d}{self.suffix}"
        return self.folder / f"step-{step:08d}-{_order(same[0])[1] + 1}{self.suffix}"

    def _link(self, newest: int) -> None:
        """Makes the links what the files say, whatever a process that was killed has left."""
        wanted = links(self.folder, newest, self.best_step)
        for name, target in wanted.items():
            point(self.folder / name, target)
        for name in LINKS:
            if name not in wanted and (self.folder / name).is_symlink():
                (self.folder / name).unlink()

    def prune(self) -> None:
        """Deletes what is older than the newest ones and not the best; only after a new one is durable.

        Only whole ones count. A damaged one among them is left as it is.
        """
        kept: set[int] = set()
        for path in newest_first(self.folder) if self.is_on else ():
            step = step_of(path)
            if len(kept) < self.keep and step not in kept:
                if path.name not in self._whole:
                    self._whole[path.name] = is_whole(path)
                if self._whole[path.name]:
                    kept.add(step)
            elif step in kept or step != self.best_step:
                delete(path)

    def _clear(self) -> None:
        """Deletes what a process left that was killed while it wrote."""
        for stray in self.folder.glob("*.tmp"):
            delete(stray)


def reason_of(error: Exception) -> str:
    """What an error says, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")


def name_of(step: int) -> str:
    """The name of the checkpoint after `step` optimizer steps, where it is one file."""
    return f"step-{step:08d}.pt"


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` lies in a folder of checkpoints, or would lie as one file."""
    found = (path for path in newest_first(folder) if step_of(path) == step)
    return next(found, folder / name_of(step))


def links(folder: Path, newest: int, best_step: int | None) -> dict[str, str]:
    """The links that belong into a folder of checkpoints, and the name to which each one points."""
    steps = {"last": newest} | ({} if best_step is None else {"best": best_step})
    paths = {word: path_of(folder, step) for word, step in steps.items()}
    return {f"{word}{path.suffix}": path.name for word, path in paths.items()}


def is_linked(folder: Path, newest: int, best_step: int | None) -> bool:
    """Whether the links to the last and the best checkpoint are what they should be."""
    wanted = links(folder, newest, best_step)
    return all((folder / name).resolve().name == target for name, target in wanted.items())


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their steps, the newest first; of one step the last that was saved."""
    return sorted(filter(_is_named, folder.glob("step-*")), key=_order, reverse=True)


def _is_named(path: Path) -> bool:
    return NAME.fullmatch(path.name) is not None


def _order(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    assert match, path
    return int(match[1]), int(match[2] or 0)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return _order(path)[0]


def newest_good(folder: Path, warn: Callable[[str], None], before: float = math.inf) -> Path | None:
    """The newest checkpoint that is whole; `warn` hears of each damaged one that is passed over.

    Args:
        before: only those of earlier steps count.
    """
    for path in newest_first(folder):
        if step_of(path) >= before:
            continue
        try:
            verify(path)
            return path
        except Damaged as error:
            warn(f"{error} It is passed over.")
    return None


def tell(text: str) -> None:
    """Shows a note of a command that has no log."""
    print(f"note: {text}", file=sys.stderr)


def find(place: str | Path, warn: Callable[[str], None] = tell) -> Path:
    """The whole checkpoint that `place` means: a file, or in a run's folder the best, else the newest.

    Damaged ones of a folder are passed over, of which `warn` hears. Raises UserError if there is none, and
    Damaged if none is whole.
    """
    place = Path(place)
    if place.is_file() or place.suffix == ".sharded":
        verify(place)
        return place
    if not place.exists():
        raise UserError(f"{place}: there is no such run or checkpoint file.")
    for folder in (place / "checkpoints", place):
        best = [folder / name for name in LINKS if name.startswith("best") and (folder / name).exists()]
        for path in best:
            try:
                verify(path)
                return path
            except Damaged as error:
                warn(f"{error} The newest good one takes its place.")
        if found := newest_good(folder, warn):
            return found
        if best or newest_first(folder):
            raise Damaged(f"{folder}: all its checkpoints are damaged.")
    raise UserError(f"{place}: holds no checkpoint; give a run's folder or a .pt file.")


def verify(path: Path) -> None:
    """Reads the whole checkpoint against its checksums. Raises Damaged."""
    if path.is_dir():
        return sharded.verify(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members, size = archive.infolist(), path.stat().st_size
            if any(m.compress_type for m in members) or sum(m.file_size for m in members) > size:
                raise zipfile.BadZipFile("it would grow when it is read")  # torch.save compresses nothing
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise Damaged(f"{path}: the checkpoint is truncated or no checkpoint ({error}).") from None
    except ValueError as error:  # a flipped bit in a name or a length
        raise Damaged(f"{path}: the checkpoint is damaged ({error}).") from None
    if broken:
        raise Damaged(f"{path}: the checkpoint is damaged (checksum of {broken}).")


def is_whole(path: Path) -> bool:
    """Whether a checkpoint agrees with its checksums."""
    try:
        verify(path)
    except Damaged:
        return False
    return True


def size_of(path: Path) -> int:
    """The size of a checkpoint in bytes. Raises Damaged for a folder that is none."""
    return sharded.size_of(path) if path.is_dir() else path.stat().st_size


def load(path: Path, verified: bool = False, wanted: Wanted | None = None) -> dict[str, Any]:
    """The state in a checkpoint, its tensors on the CPU.

    Args:
        wanted: which rows of a tensor are read of a sharded checkpoint, as for `sharded.load`; None: all.

    Raises Damaged if it isn't whole, and UserError if it holds anything but tensors and plain values.
    """
    if not verified:
        verify(path)
    state = sharded.load(path, wanted) if path.is_dir() else _read(path)
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise UserError(f"{path}: not a checkpoint of dist_train.")
    if state["format"] > FORMAT:
        raise UserError(
            f"{path}: written by a newer dist_train (format {state['format']}, this one knows {FORMAT})."
        )
    if state["format"] == 1:
        _bring_up(state)
    for key, kinds in CONTENT.items():
        if not isinstance(state.get(key), kinds):
            raise UserError(
                f"{path}: not a checkpoint of dist_train: its '{key}' is missing or no such thing."
            )
    shape, classes = state["sample_shape"], state["classes"]
    if not all(type(n) is int and n > 0 for n in shape) or not all(isinstance(c, str) for c in classes):
        raise UserError(f"{path}: not a checkpoint of dist_train: it tells no shape, or no names of classes.")
    return state


def _read(path: Path) -> Any:
    """What torch.save has written. Raises Damaged, and UserError for pickled objects."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused: it holds pickled code or objects, and loading those could run anything."
        ) from None
    except (RuntimeError, EOFError, LookupError, TypeError, ValueError, MemoryError) as error:
        raise Damaged(f"{path}: the checkpoint is damaged ({error}).") from None


def _bring_up(state: dict[str, Any]) -> None:
    """Makes of what a file of format 1 holds that of format 2; what isn't there is found missing later."""
    if isinstance(losses := state.pop("losses", None), list):
        state["window"] = {"loss": losses}
    config = state.get("config")
    train = config.get("train") if isinstance(config, dict) else None
    accumulate = train.get("accumulate", 1) if isinstance(train, dict) else 1
    state.setdefault("world_size", 1)
    if isinstance(accumulate, int) and isinstance(state["world_size"], int):
        state["parts"] = state["world_size"] * accumulate


def save_weights(path: Path, weights: dict[str, Any], metadata: dict[str, str]) -> None:
    """The weights of a model's state_dict alone, as a safetensors file that any library reads."""
    from safetensors.torch import save

    tensors = {
        name: value for name, value in weights.items() if isinstance(value, torch.Tensor)
    }  # no extra state
    state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    seen: dict[int, str] = {}
    for name, value in state.items():  # safetensors stores no shared memory
        if seen.setdefault(value.data_ptr(), name) != name and value.numel():
            state[name] = value.clone()
    data = save(state, metadata)
    write_atomically(path, lambda file: file.write(data))
