"""Checkpoints: one file that rank 0 writes, atomically and behind the loop's back, and that can be trusted.

A file is a dict of state_dicts, the step, the resolved configuration and a format version, saved by
torch.save; its zip container holds a CRC-32 of each tensor, so that a truncated or altered file is
recognized. Loading never runs code from a file (`weights_only=True`).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_train.config import UserError

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})\.pt")


class Damaged(UserError):
    """A checkpoint that is truncated, altered, or no checkpoint of ours."""


class Checkpoints:
    """The folder of a run's checkpoints, on rank 0.

    Args:
        run: the run's folder; they lie in its `checkpoints`.
        keep: how many of the newest to keep; the best is kept besides.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.folder, self.keep = run / "checkpoints", keep
        self.folder.mkdir(parents=True, exist_ok=True)
        for stray in self.folder.glob("*.tmp"):  # of a process that was killed while it wrote
            stray.unlink(missing_ok=True)
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: dict[str, Any], best: bool) -> None:
        """Copies `state` to memory, then writes it in a thread; waits first for the save before it.

        Raises the error of that save, if it failed.
        """
        self.wait()
        copy = to_cpu(state)  # the loop goes on changing the weights
        self._writer = threading.Thread(target=self._write, args=(copy, best), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Waits until the save in flight is durable; raises its error."""
        if self._writer:
            self._writer.join()
            self._writer = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write(self, state: dict[str, Any], best: bool) -> None:
        try:
            path = self.folder / f"step-{state['step']:08d}.pt"
            write_atomically(path, lambda file: torch.save(state, file))
            _point(self.folder / "last.pt", path.name)
            if best:
                _point(self.folder / "best.pt", path.name)
            self._prune()
        except BaseException as error:
            self._error = error

    def _prune(self) -> None:
        """Deletes what is neither among the newest nor the best; only after a new one is durable."""
        best = self.folder / "best.pt"
        kept = {best.resolve().name} if best.is_symlink() else set()
        for path in newest_first(self.folder)[self.keep :]:
            if path.name not in kept:
                path.unlink(missing_ok=True)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their steps, the newest first."""
    found = [path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: step_of(path), reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    match = NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def newest_good(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; `warn` hears of each damaged one that is passed over."""
    for path in newest_first(folder):
        try:
            verify(path)
            return path
        except Damaged as error:
            warn(f"{error} It is passed over.")
    return None


def find(place: str | Path) -> Path:
    """The checkpoint that `place` means: a file, or in a run's folder the best, else the newest.

    Raises UserError if there is none.
    """
    place = Path(place)
    if place.is_file():
        return place
    if not place.exists():
        raise UserError(f"{place}: there is no such run or checkpoint file.")
    for folder in (place / "checkpoints", place):
        if (folder / "best.pt").exists():
            return folder / "best.pt"
        if found := newest_first(folder):
            return found[0]
    raise UserError(f"{place}: holds no checkpoint; give a run's folder or a .pt file.")


def verify(path: Path) -> None:
    """Reads the whole file against its checksums. Raises Damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise Damaged(f"{path}: the checkpoint is truncated or no checkpoint ({error}).") from None
    except ValueError as error:  # a flipped bit in a name or a length
        raise Damaged(f"{path}: the checkpoint is damaged ({error}).") from None
    if broken:
        raise Damaged(f"{path}: the checkpoint is damaged (checksum of {broken}).")


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
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise Damaged(f"{path}: the checkpoint is damaged ({error}).") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: not a checkpoint of dist_train.")
    if state["format"] > FORMAT:
        raise UserError(
            f"{path}: written by a newer dist_train (format {state['format']}, this one knows {FORMAT})."
        )
    return state


def to_cpu(value: Any) -> Any:
    """A copy of nested dicts and lists with every tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(item) for item in value)
    return value


def save_weights(path: Path, model: torch.nn.Module, metadata: dict[str, str]) -> None:
    """The model's weights alone, as a safetensors file that any library reads."""
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
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


def _point(link: Path, name: str) -> None:
    """Makes `link` a symbolic link to the file `name` beside it, replacing an older one at once."""
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
