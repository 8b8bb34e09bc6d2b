"""Sharded checkpoints: a folder that holds the parts of a state that each rank has written.

    step-00000012.sharded/
      part-00000.safetensors   tensors, or some rows of them; one file for each rank
      manifest.json            what is no tensor, which file holds which rows, size and SHA-256 of each file

Nothing in it is pickled, and nothing of it is believed before it agrees with the checksums.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dist_train.checkpoint.files import Damaged
from dist_train.config import UserError

FORMAT = 1
MANIFEST = "manifest.json"
PART = re.compile(r"part-\d{5,}\.safetensors")
# By the names that safetensors gives them.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# What malformed contents make Python, torch and safetensors raise.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, MemoryError,
             SafetensorError)  # fmt: skip

Wanted = Callable[[str, torch.Size], tuple[int, int]]  # (name, whole shape) -> (first row, rows)


def verify(path: Path, files: slice = slice(None)) -> None:
    """Reads the manifest, and `files` of the parts, against their checksums. Raises Damaged."""
    for name, entry in [*read_manifest(path)["files"].items()][files]:
        digest = hashlib.sha256()
        try:
            with (path / name).open("rb") as file:
                while data := file.read(2**20):
                    digest.update(data)
        except OSError as error:
            raise Damaged(f"{path / name}: can't be read ({error.strerror}).") from None
        if digest.hexdigest() != entry["sha256"]:
            raise Damaged(f"{path / name}: the checkpoint is damaged (checksum).")


def load(path: Path, wanted: Wanted | None = None) -> Any:
    """The state in a sharded checkpoint that was verified, its tensors on the CPU.

    Args:
        wanted: the first row and the number of rows that are read of a tensor, by its name, such as
            "model/0.weight", and its whole shape; None: all of them, as one process needs it.

    Raises Damaged.
    """
    manifest = read_manifest(path)
    tensors: dict[str, torch.Tensor] = {}
    try:
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(safe_open(path / name, "pt"))  # type: ignore[no-untyped-call]
                for name in manifest["files"]
            }
            for name, entry in manifest["tensors"].items():
                whole = 0, rows(entry["shape"])
                first, count = wanted(name, torch.Size(entry["shape"])) if wanted else whole
                tensors[name] = _read_rows(name, entry, files, first, count)
        return restored(manifest["state"], tensors)
    except OSError as error:
        raise Damaged(f"{path}: can't be read ({error.strerror}).") from None
    except MALFORMED as error:
        raise Damaged(f"{path}: the checkpoint is damaged ({' '.join(str(error).split())}).") from None


def size_of(path: Path) -> int:
    """The size of all parts in bytes. Raises Damaged."""
    return sum(entry["size"] for entry in read_manifest(path)["files"].values())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, and whether files of the right sizes are there. Raises Damaged.

    No name in it leads out of the folder, and no tensor is larger than the files.
    """
    place = path / MANIFEST
    try:
        held = json.loads(place.read_bytes())
        manifest = held["manifest"]
        if hashlib.sha256(dump(manifest)).hexdigest() != held["sha256"]:
            raise ValueError("checksum")
        if isinstance(manifest["format"], int) and manifest["format"] > FORMAT:
            raise UserError(
                f"{path}: written by a newer dist_train (sharded format {manifest['format']}, this one knows"
                f" {FORMAT})."
            )
        for objection in _objections(path, manifest):
            raise ValueError(objection)
    except OSError as error:
        raise Damaged(f"{place}: the checkpoint is incomplete ({error.strerror}).") from None
    except MALFORMED as error:
        raise Damaged(f"{place}: the checkpoint is damaged ({' '.join(str(error).split())}).") from None
    return manifest


def _objections(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """What can't be true of a manifest."""
    for name, entry in manifest["files"].items():
        if not PART.fullmatch(name) or (path / name).is_symlink() or not (path / name).is_file():
            yield f"{name} is missing, or no part of it"
        elif (path / name).stat().st_size != entry["size"]:
            yield f"{name} is truncated"
    for name, entry in manifest["tensors"].items():
        shape, pieces = entry["shape"], entry["rows"]
        numbers = [*shape, *(number for _, *numbers in pieces for number in numbers)]
        if not all(type(number) is int and number >= 0 for number in numbers) or math.prod(shape) >= 2**60:
            yield f"{name} is of no shape"
        files = {file for file, _, _ in pieces}
        if not files <= manifest["files"].keys() or len(files) < len(pieces):
            yield f"{name} does not lie in its files"
        if entry["dtype"] not in DTYPES or not is_covered(pieces, rows(shape)):
            yield f"some rows of {name} are missing"


def _read_rows(
    name: str, entry: dict[str, Any], files: dict[str, Any], first: int, count: int
) -> torch.Tensor:
    """`count` rows of a tensor from `first` on, out of the files that have them."""
    shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
    for file, _, held in entry["rows"]:  # before there is memory for them
        part = files[file].get_slice(name)
        if part.get_shape() != [held, *shape[1:]][: len(shape)] or part.get_dtype() != entry["dtype"]:
            raise ValueError(f"{name} in {file} is a {part.get_dtype()} of shape {part.get_shape()}")
    result = torch.empty([count, *shape[1:]][: len(shape)], dtype=dtype)
    for file, at, held in entry["rows"]:
        begin, end = max(first, at), min(first + count, at + held)
        if not shape:
            result.copy_(files[file].get_tensor(name))
        elif begin < end:
            result[begin - first : end - first] = files[file].get_slice(name)[begin - at : end - at]
    return result


def is_covered(pieces: list[Any], wanted: int) -> bool:
    """Whether pieces [file, first row, rows], in their order, are `wanted` rows, each once."""
    at = 0
    for _, first, held in pieces:
        if first != at:
            return False
        at += held
    return at == wanted


def rows(shape: Any) -> int:
    """The number of rows; a tensor without dimensions has one."""
    return int(shape[0]) if len(shape) else 1


def restored(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state of which `value` is what JSON holds: see `flatten` in sharded_saver.py."""
    if isinstance(value, list):
        return [restored(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    for kind, content in value.items():
        if kind == "$tensor":
            return tensors[content]
        if kind == "$bytes":
            return bytes.fromhex(content)
        if kind == "$tuple":
            return tuple(restored(item, tensors) for item in content)
        if kind == "$items":
            return {restored(key, {}): restored(item, tensors) for key, item in content}
        if kind.startswith("$"):
            raise ValueError(f"there is nothing like {kind}")
    return {key: restored(item, tensors) for key, item in value.items()}


def dump(value: Any) -> bytes:
    """JSON in few bytes; the same for the same value."""
    return json.dumps(value, separators=(",", ":")).encode()
