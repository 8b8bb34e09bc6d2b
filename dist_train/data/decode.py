"""JPEG files to pixels by a quicker decoder than Pillow's, which stays for what that one refuses.

simplejpeg (an extra of the package) comes first, then torchvision's, as long as torchvision has one. All of
them use libjpeg-turbo and give the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a header that tells the size


def decode_jpeg(data: bytearray, channels: int) -> torch.Tensor | None:
    """A JPEG file as uint8 `[C, H, W]` of 1 or 3 channels, in memory `[H, W, C]`; None where Pillow must.

    That is for other files, other conversions of colors than from grey, and images so large that Pillow
    warns of them.
    """
    from PIL import Image

    found = _frame(data) if data[:2] == b"\xff\xd8" else None
    if found is None or channels not in (1, 3):
        return None
    height, width, components = found
    if components not in (1, channels) or height * width > (Image.MAX_IMAGE_PIXELS or 2**31):
        return None
    for decode in decoders()[:1]:
        try:
            return decode(data, channels)
        except (RuntimeError, ValueError):  # it is stricter: Pillow has the last word
            return None
    return None


@cache
def decoders() -> list[Callable[[bytearray, int], torch.Tensor]]:
    """Those that are installed, the quickest first."""
    found: list[Callable[[bytearray, int], torch.Tensor]] = []
    try:
        import simplejpeg

        def by_simplejpeg(data: bytearray, channels: int) -> torch.Tensor:
            pixels = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
            return torch.from_numpy(pixels).permute(2, 0, 1)

        found.append(by_simplejpeg)
    except ImportError:
        pass
    try:
        from torchvision.io import ImageReadMode
        from torchvision.io import decode_jpeg as decode

        def by_torchvision(data: bytearray, channels: int) -> torch.Tensor:
            mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
            return decode(torch.frombuffer(data, dtype=torch.uint8), mode)

        found.append(by_torchvision)
    except ImportError:
        pass
    return found


def _frame(data: bytearray) -> tuple[int, int, int] | None:
    """Height, width and number of components, from the header of a JPEG file."""
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in FRAMES:
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (place + 5, place + 7))
            return height, width, data[place + 9]
        if marker == 0xFF:  # a byte that only fills
            place += 1
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None
