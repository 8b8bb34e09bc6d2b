"""Text as a data set: the bytes of any files, in sequences of equal length.

All files together are one stream, a byte 0 after each. Sequence i is a fixed piece of it, read from disk
when it is wanted: nothing is held in memory but where files begin, and nothing is made in advance.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad
from torch.utils.data import Dataset

from dist_train.config import UserError
from dist_train.data.images import BadSample, as_text, is_hidden, near_path

IGNORED = -100  # the target beyond the end of the stream
NAMES = [repr(chr(byte))[1:-1] if byte < 128 else f"\\x{byte:02x}" for byte in range(256)]


class Text(Dataset):
    """Sequences `(inputs [T], targets [T])`, int64: bytes, and the byte that follows each.

    The inputs of a sequence are its targets moved by one place, and the very first input is 0: so each byte
    is a target exactly once. What the last sequence is too long for has targets of -100.

    Args:
        paths: the files, in the order of the stream.
        context: T.
    """

    is_images = False
    in_threads = True  # worker processes would take from ranks a CPU that they need

    def __init__(self, paths: Iterable[Path], context: int) -> None:
        files = list(paths)
        # Arrays, not lists: these would be copied into each worker as soon as they are looked at.
        self.paths = np.array([os.fsencode(path) for path in files], dtype=np.bytes_)
        self.ends = np.cumsum([path.stat().st_size + 1 for path in files], dtype=np.int64)
        self.context, self.classes = context, NAMES

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.context) if len(self.ends) else 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index * self.context
        piece = self.read(start - 1, start + self.context).long()
        beyond = self.context + 1 - len(piece)
        return pad(piece[:-1], (0, beyond)), pad(piece[1:], (0, beyond), value=IGNORED)

    def path(self, index: int) -> Path:
        """The file in which a sequence begins."""
        return Path(os.fsdecode(self.paths[np.searchsorted(self.ends, index * self.context, "right")]))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Bytes `[N]` of the stream, as far as it goes; the one before the first is 0.

        Raises BadSample for a file that is gone, or shorter than it was.
        """
        stop = min(stop, int(self.ends[-1]))
        piece = np.zeros(stop - start, np.uint8)
        place = max(start, 0)
        number = int(np.searchsorted(self.ends, place, "right"))
        while place < stop:
            begin = int(self.ends[number - 1]) if number else 0
            end = int(self.ends[number]) - 1  # where its byte 0 is
            wanted = min(stop, end) - place
            if wanted > 0:
                piece[place - start : place - start + wanted] = self._bytes(number, place - begin, wanted)
            place, number = end + 1, number + 1
        return torch.from_numpy(piece)

    def _bytes(self, number: int, offset: int, count: int) -> np.ndarray:
        path: bytes = self.paths[number]
        try:
            file = os.open(path, os.O_RDONLY)  # a fifth of the time that NumPy takes to open it
            try:
                found = os.pread(file, count, offset)
            finally:
                os.close(file)
        except OSError as error:
            raise BadSample(f"{as_text(path)}: can't be read: {error.strerror}.") from None
        if len(found) < count:
            raise BadSample(f"{as_text(path)}: the file is shorter than it was when the run started.")
        return np.frombuffer(found, np.uint8)


def text(
    root: str | None = None,
    train: bool = True,
    context: int = 256,
    files: str | list[str] = "**/*",
    eval_files: str | list[str] = (),  # type: ignore[assignment]
) -> Text | None:
    """The bytes of a text file `root`, or of the files in the folder `root` and below it.

    `files` and `eval_files` are patterns below the folder, such as `*.txt` or `[a.txt, old/**/*.txt]`: which
    files there are, and which of them are for evaluation and not for training. Sequences are `context` bytes
    long. What is hidden is left out; a file that several links lead to counts once.
    """
    if not root:
        raise UserError("data.root: text needs a file, or the folder of its files.")
    if context < 1:
        raise UserError(f"data.args.context: a sequence can't have {context} bytes.")
    top = Path(root)
    if not top.exists():
        raise UserError(f"data.root: there is no file or folder {top}{near_path(top)}.")
    if top.is_file():
        if eval_files:
            raise UserError("data.args.eval_files: data.root is one file; give the folder that holds it.")
        return Text([top], context) if train else None
    held = _found(top, eval_files, "data.args.eval_files")
    if not train:
        return Text(sorted(held.values()), context) if held else None
    found = _found(top, files, "data.args.files")
    return Text(sorted(path for real, path in found.items() if real not in held), context)


def _found(folder: Path, patterns: str | list[str], key: str) -> dict[Path, Path]:
    """The files that patterns mean, by where links to them lead. Raises UserError for one that means none."""
    found: dict[Path, Path] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            matches = sorted(folder.glob(pattern))
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{key}: {pattern!r} is no pattern of files below {folder}: {error}.") from None
        below = [path for path in matches if not any(map(is_hidden, path.relative_to(folder).parts))]
        files = [path for path in below if path.is_file()]
        if not files:
            raise UserError(f"{key}: {folder} has no file '{pattern}'{near_path(folder / pattern)}.")
        for path in files:
            found.setdefault(path.resolve(), path)
    return found
