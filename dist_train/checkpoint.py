"""Checkpoints: one file that rank 0 writes, atomically and behind the loop's back, and that can be trusted.

A file is a dict of state_dicts, the step, the configuration and a format version, saved by
torch.save; its zip container holds a CRC-32 of each tensor, so that a truncated or altered file is
recognized. Loading never runs code from a file (`weights_only=True`).
"""

from __future__ import annotations

import contextlib
import math
import os
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

from dist_train.config import UserError
from dist_train.snapshot import is_finite, to_cpu, unreadable

FORMAT = 1
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
    "losses": (list,),
    "classes": (list,),
    "sample_shape": (list,),
}
NAME = re.compile(r"step-(\d{8,})\.pt")
FIRST_SECONDS = 60.0  # from the start to the first save whose cost is measured
SHORTEST_SECONDS, LONGEST_SECONDS = 10.0, 3600.0


class Damaged(UserError):
    """A checkpoint that is truncated, altered, or no checkpoint of ours."""


class Checkpoints:
    """The folder of a run's checkpoints, on rank 0.

    A save that fails, as on a full disk, ends nothing: it is told, and the next one tries again. Each file
    tells by `best_step` which one is the best; the links best.pt and last.pt are made from that.

    Args:
        run: the run's folder; they lie in its `checkpoints`.
        keep: how many of the newest to keep; the best is kept besides.
        say: hears of saves that failed.
    """

    def __init__(self, run: Path, keep: int, say: Callable[[str], None]) -> None:
        self.folder, self.keep, self._say = run / "checkpoints", keep, say
        self.folder.mkdir(parents=True, exist_ok=True)
        for stray in self.folder.glob("*.tmp"):  # of a process that was killed while it wrote
            stray.unlink(missing_ok=True)
        self.failure = ""  # why the last save failed, or empty
        self.is_broken = False  # whether the next one would fail like the last one
        self.best: float | None = None  # value of the metric in the best one
        self.best_step: int | None = None
        self.stall_seconds: list[float] = []  # of each save: what the loop waited for it
        self.write_seconds = 0.0  # of the last save
        self._whole: dict[str, bool] = {}  # by name: those that were written or verified by this process
        self._writer: threading.Thread | None = None
        self._copy: Any = None

    def go_on(self, step: int, best: float | None, best_step: int | None) -> None:
        """Begins with the checkpoint of `step`, which is whole, and the best of those that are there."""
        self.best, self.best_step = best, best_step
        names = {name_of(number) for number in (step, best_step) if number is not None}
        self._whole = dict.fromkeys(names, True)
        self._link(step)

    def save(self, state: dict[str, Any]) -> None:
        """Copies `state` to memory, then writes it in a thread; waits first for the save before it."""
        begin = time.monotonic()
        self.wait()
        if bad := unreadable(state):
            self.is_broken = True
            self._fail(state["step"], bad)
            return
        self._copy = to_cpu(state, self._copy)  # the loop goes on changing the weights
        self._writer = threading.Thread(
            target=self._write, args=(self._copy,), name="checkpoint", daemon=True
        )
        self._writer.start()
        self.stall_seconds.append(time.monotonic() - begin)

    def wait(self) -> str:
        """Waits until the save in flight is durable; returns why it failed, or nothing."""
        if self._writer:
            self._writer.join()
            self._writer = None
        return self.failure

    def interval(self, between_interruptions: float) -> float:
        """Seconds from save to save at which least time is lost: sqrt(2 x cost of a save x mean time
        between interruptions), after Young (1974) and Daly (2006), within reason.
        """
        costs = self.stall_seconds[1:] or self.stall_seconds  # the first save also allocates
        if not costs:
            return FIRST_SECONDS
        best = math.sqrt(2 * (sum(costs) / len(costs)) * between_interruptions)
        return min(max(best, SHORTEST_SECONDS, 4 * self.write_seconds), LONGEST_SECONDS)

    def _write(self, state: dict[str, Any]) -> None:
        begin, step = time.monotonic(), state["step"]
        path = self.folder / name_of(step)
        try:
            if names := [name for name, value in state["model"].items() if not is_finite(value)]:
                raise ValueError(f"the weights are not finite ({names[0]})")
            write_atomically(path, lambda file: torch.save(state, file))
            self._whole[path.name] = True
            self.best, self.best_step = state.get("best"), state.get("best_step")
            self._link(step)
            self.prune()
            self.failure = ""
        except Exception as error:
            # These may go away by themselves; torch makes a RuntimeError of one of the file system.
            self.is_broken = not isinstance(error, (OSError, RuntimeError, ValueError))
            why = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
            self._fail(step, f"{type(error).__name__}: {why}" if self.is_broken else why)
        self.write_seconds = time.monotonic() - begin

    def _fail(self, step: int, why: str) -> None:
        self.failure = f"{self.folder / name_of(step)} could not be written: {why}"
        end = "" if self.is_broken else ", the next one is tried"
        self._say(f"{self.failure}; the checkpoints before it are untouched{end}.")

    def _link(self, newest: int) -> None:
        """Makes the links what the files say, whatever a process that was killed has left."""
        for name, step in (("last.pt", newest), ("best.pt", self.best_step)):
            if step is not None:
                _point(self.folder / name, name_of(step))
            elif (self.folder / name).is_symlink():
                (self.folder / name).unlink()

    def prune(self) -> None:
        """Deletes what is older than the newest ones and not the best; only after a new one is durable.

        Only whole ones count. A damaged one among them is left as it is.
        """
        whole = 0
        for path in newest_first(self.folder):
            if whole < self.keep:
                if path.name not in self._whole:
                    self._whole[path.name] = is_whole(path)
                whole += self._whole[path.name]
            elif step_of(path) != self.best_step:
                path.unlink(missing_ok=True)


def name_of(step: int) -> str:
    """The name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}.pt"


def is_linked(folder: Path, newest: int, best_step: int | None) -> bool:
    """Whether last.pt and best.pt are what they should be."""
    wanted = {"last.pt": newest} | ({} if best_step is None else {"best.pt": best_step})
    return all((folder / name).resolve().name == name_of(step) for name, step in wanted.items())


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their steps, the newest first."""
    found = [path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: step_of(path), reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    match = NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


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
    if place.is_file():
        verify(place)
        return place
    if not place.exists():
        raise UserError(f"{place}: there is no such run or checkpoint file.")
    for folder in (place / "checkpoints", place):
        best = folder / "best.pt"
        try:
            if best.exists():
                verify(best)
                return best
        except Damaged as error:
            warn(f"{error} The newest good one takes its place.")
        if found := newest_good(folder, warn):
            return found
        if best.exists() or newest_first(folder):
            raise Damaged(f"{folder}: all its checkpoints are damaged.")
    raise UserError(f"{place}: holds no checkpoint; give a run's folder or a .pt file.")


def verify(path: Path) -> None:
    """Reads the whole file against its checksums. Raises Damaged."""
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
    """Whether a file agrees with its checksums."""
    try:
        verify(path)
    except Damaged:
        return False
    return True


def load(path: Path, verified: bool = False) -> dict[str, Any]:
    """The state in a checkpoint file, its tensors on the CPU.

    Raises Damaged if it isn't whole, and UserError if it holds anything but tensors and plain values.
    """
    if not verified:
        verify(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused: it holds pickled code or objects, and loading those could run anything."
        ) from None
    except (RuntimeError, EOFError, LookupError, TypeError, ValueError, MemoryError) as error:
        raise Damaged(f"{path}: the checkpoint is damaged ({error}).") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise UserError(f"{path}: not a checkpoint of dist_train.")
    if state["format"] > FORMAT:
        raise UserError(
            f"{path}: written by a newer dist_train (format {state['format']}, this one knows {FORMAT})."
        )
    for key, kinds in CONTENT.items():
        if not isinstance(state.get(key), kinds):
            raise UserError(
                f"{path}: not a checkpoint of dist_train: its '{key}' is missing or no such thing."
            )
    shape, classes = state["sample_shape"], state["classes"]
    if not all(type(n) is int and n > 0 for n in shape) or not all(isinstance(c, str) for c in classes):
        raise UserError(f"{path}: not a checkpoint of dist_train: it tells no shape, or no names of classes.")
    return state


def save_weights(path: Path, model: torch.nn.Module, metadata: dict[str, str]) -> None:
    """The model's weights alone, as a safetensors file that any library reads."""
    from safetensors.torch import save

    values = model.state_dict().items()
    tensors = {name: value for name, value in values if isinstance(value, torch.Tensor)}  # no extra state
    state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    seen: dict[int, str] = {}
    for name, value in state.items():  # safetensors stores no shared memory
        if seen.setdefault(value.data_ptr(), name) != name and value.numel():
            state[name] = value.clone()
    data = save(state, metadata)
    write_atomically(path, lambda file: file.write(data))


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes a file that is there whole or not at all, whatever happens, and durable on return."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_output(path: Path, data: bytes) -> None:
    """Writes what a command was asked for: whole or not at all, but into a device or pipe as it comes.

    Raises UserError if that is impossible.
    """
    try:
        if (path.exists() and not path.is_file()) or Path("/dev") in path.absolute().parents:
            path.write_bytes(data)
        else:
            write_atomically(path.resolve(), lambda file: file.write(data))  # a link stays one
    except OSError as error:
        raise UserError(f"--output: {path} can't be written: {error.strerror}.") from None


def _point(link: Path, name: str) -> None:
    """Makes `link` a symbolic link to the file `name` beside it, replacing an older one at once."""
    if link.is_symlink() and os.readlink(link) == name:
        return
    temporary = link.with_name(f"{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, link)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
