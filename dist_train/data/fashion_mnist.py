"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747): where it is found, how it is read."""

from __future__ import annotations

import gzip
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from dist_train.config import UserError
from dist_train.data.images import InMemory

ASSETS = Path(__file__).parent.parent / "assets"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


def fashion_mnist(root: str | None = None, train: bool = True, download: bool = True) -> InMemory:
    """Fashion-MNIST (Xiao et al., 2017): 60,000 training and 10,000 test images [1, 28, 28], 10 classes.

    Looked for in `root`, in the folder of Debian's package, in torchvision's download, and at last
    in the sample that this package ships.
    """
    part = "train" if train else "t10k"
    given = [Path(root), Path(root) / "FashionMNIST" / "raw"] if root else []
    cache = Path(torch.hub.get_dir()).parent / "dist_train"
    for folder in [*given, DEBIAN, cache / "FashionMNIST" / "raw"]:
        if _idx_file(folder, f"{part}-images-idx3-ubyte"):
            return _fashion_files(folder, part)
    if root and Path(root).exists() and not Path(root).is_dir():
        raise UserError(f"data.root: {root} is not a folder.")
    target = Path(root) if root else cache
    if download and _download_fashion_mnist(target):
        return _fashion_files(target / "FashionMNIST" / "raw", part)
    sample = _fashion_files(ASSETS, part)
    if train:  # said once
        sample.note = (
            "Fashion-MNIST is not at hand: using the shipped sample of 6,000 training and 1,000 test images;"
            " set data.root to the folder of the whole set."
        )
    return sample


def _fashion_files(folder: Path, part: str) -> InMemory:
    arrays = []
    for name, magic in ((f"{part}-images-idx3-ubyte", 2051), (f"{part}-labels-idx1-ubyte", 2049)):
        file = _idx_file(folder, name)
        if file is None:
            raise UserError(f"{folder}: {name}.gz is missing beside the other files of Fashion-MNIST.")
        arrays.append(read_idx(file, magic))
    if len(arrays[0]) != len(arrays[1]):
        raise UserError(f"{folder}: {len(arrays[0])} images but {len(arrays[1])} labels in '{part}'.")
    return InMemory(arrays[0].unsqueeze(1), arrays[1].long(), FASHION_CLASSES)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None)


def read_idx(file: Path, magic: int) -> torch.Tensor:
    """A file in MNIST's idx format, gzipped or not, as a uint8 tensor.

    Raises UserError, naming the file, if it is truncated, corrupt, or of another kind.
    """
    try:
        raw = file.read_bytes()
        data = gzip.decompress(raw) if file.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: truncated or corrupt ({error}); fetch it anew.") from None
    if len(data) < 8 or struct.unpack(">i", data[:4])[0] != magic:
        raise UserError(f"{file}: not an idx file with magic number {magic}; fetch it anew.")
    dimensions = magic % 256
    shape = struct.unpack(f">{dimensions}i", data[4 : 4 + 4 * dimensions])
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    if body.size != np.prod(shape):
        raise UserError(
            f"{file}: truncated or corrupt: {body.size:,} bytes of data, not {np.prod(shape):,};"
            " fetch it anew."
        )
    return torch.from_numpy(body.reshape(shape).copy())


def _download_fashion_mnist(target: Path) -> bool:
    """Whether torchvision's download of all four files into `target` succeeded."""
    import torchvision

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds; a dead network must not hold the run up
    try:
        torchvision.datasets.FashionMNIST(str(target), download=True)
        return True
    except (OSError, RuntimeError):
        return False
    finally:
        socket.setdefaulttimeout(timeout)
