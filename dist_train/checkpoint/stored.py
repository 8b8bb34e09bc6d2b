"""Checkpoints on a disk: their names, which of them are whole, and what is in them.

A file is a dict of state_dicts, the step, the configuration and a format version, saved by torch.save; its
zip container holds a CRC-32 of each tensor, so that a truncated or altered file is recognized. Loading never
runs code from a file (`weights_only=True`).
"""

from __future__ import annotations

import json
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dist_train.checkpoint import sharded
from dist_train.checkpoint.files import Damaged, write_atomically
from dist_train.checkpoint.sharded import Wanted
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
    return sorted(filter(_is_named, folder.glob("step-*")), key=place_of, reverse=True)


def _is_named(path: Path) -> bool:
    return NAME.fullmatch(path.name) is not None


def place_of(path: Path) -> tuple[int, int]:
    """The step that a checkpoint's name tells, and its number among those of this step."""
    match = NAME.fullmatch(path.name)
    assert match, path
    return int(match[1]), int(match[2] or 0)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return place_of(path)[0]


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
    columns = [column for column in state["window"].values() if isinstance(column, list)]
    numbers = all(isinstance(value, (int, float)) for column in columns for value in column)
    if len(columns) < len(state["window"]) or not numbers or min(state["parts"], state["world_size"]) < 1:
        raise UserError(
            f"{path}: not a checkpoint of dist_train: its 'window', 'parts' or 'world_size' is no such thing."
        )
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


def load_weights(path: Path) -> dict[str, Any]:
    """The weights in a file: a checkpoint's that are evaluated; a state_dict, perhaps within a dict, as
    `torch.save` wrote it; or those of a safetensors file.

    Raises Damaged, and UserError for what holds anything but tensors and plain values, or no weights.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors | extra_state(file.metadata() or {})
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise Damaged(f"{path}: damaged, or no safetensors file ({error}).") from None
    if path.is_dir() or zipfile.is_zipfile(path):  # older files of torch.save are none, and have no checksums
        verify(path)
    try:
        found = load(path, verified=True) if path.is_dir() else _read(path)
    except OSError as error:  # of a file that is cut off, torch reads where nothing is
        raise Damaged(f"{path}: damaged, or it can't be read ({error.strerror}).") from None
    if isinstance(found, dict) and "format" in found:
        found = load(path, verified=True)
        return dict(found["average"] or found["model"])
    for name in ("state_dict", "model", "model_state_dict"):  # as the programs of others nest it
        found = found[name] if isinstance(found, dict) and isinstance(found.get(name), dict) else found
    if not isinstance(found, dict) or not any(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"{path}: holds no weights.")
    return found


def save_weights(path: Path, weights: dict[str, Any], metadata: dict[str, str]) -> list[str]:
    """The weights of a model's state_dict alone, as a safetensors file that any library reads.

    What modules keep beside tensors (`get_extra_state`) stands in its metadata, as JSON. Returns the names of
    what JSON can't hold, which is left out.
    """
    from safetensors.torch import save

    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    further = {name: value for name, value in weights.items() if name not in tensors}
    kept = {name: value for name, value in further.items() if _is_plain(value)}
    if kept:
        metadata = metadata | {EXTRA_STATE: json.dumps(kept)}
    state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    seen: dict[int, str] = {}
    for name, value in state.items():  # safetensors stores no shared memory
        if seen.setdefault(value.data_ptr(), name) != name and value.numel():
            state[name] = value.clone()
    data = save(state, metadata)
    write_atomically(path, lambda file: file.write(data))
    return sorted(further.keys() - kept.keys())


EXTRA_STATE = "extra_state"


def extra_state(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What modules keep beside tensors, by names of the state_dict: from a safetensors file's metadata."""
    found = json.loads(metadata.get(EXTRA_STATE, "{}"))
    return found if isinstance(found, dict) else {}


def _is_plain(value: Any) -> bool:
    """Whether JSON gives a value back as it is."""
    try:
        return repr(json.loads(json.dumps(value))) == repr(value)
    except (TypeError, ValueError, RecursionError):
        return False
