"""Letters in fonts as JPEG files, to try fine-tuning with: python examples/write_letters.py FOLDER [FONTS]

FOLDER/strokes has small letters and digits, to pretrain on. FOLDER/letters has capitals: its train and val
are in different families of fonts, and strokes/train is in others again. FONTS is a folder; without one,
fonts are those of the system and of matplotlib.
"""

import string
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

SIZE = 32  # of an image
FACES = 4  # of a family, such as its bold one
SMALL, CAPITALS = string.ascii_lowercase + string.digits, string.ascii_uppercase


def families(folder: str | None) -> list[list[str]]:
    """The files of some faces of each family that has all letters, in the order of their names."""
    ours = [str(path) for path in Path(matplotlib.get_data_path(), "fonts/ttf").glob("*.ttf")]
    found = defaultdict(dict)  # the faces of each family: a font may lie in two places
    for path in findSystemFonts([folder] if folder else None) + ([] if folder else ours):
        font = FT2Font(path)
        if {ord(letter) for letter in SMALL + CAPITALS} <= font.get_charmap().keys():
            found[font.family_name][font.style_name] = path
    chosen = []
    for _, faces in sorted(found.items()):
        names = sorted(faces)
        chosen.append([faces[name] for name in names[:: -(-len(names) // FACES)]])
    return chosen


def render(letter: str, face: str, random: np.random.Generator) -> Image.Image:
    """A letter, roughly in the middle of a grey image, turned a little, dark on light."""
    ink, paper = random.integers(0, 90), random.integers(160, 256)
    image = Image.new("L", (SIZE, SIZE), int(paper))
    place, font = random.uniform(0.44, 0.56, 2) * SIZE, ImageFont.truetype(face, random.integers(18, 26))
    ImageDraw.Draw(image).text(tuple(place), letter, int(ink), font, anchor="mm")
    image = image.rotate(random.uniform(-10, 10), Image.Resampling.BICUBIC, fillcolor=int(paper))
    pixels = np.asarray(image) + random.normal(0, 12, (SIZE, SIZE))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def main(top: Path, folder: str | None) -> None:
    """Of any four families in a row two are to pretrain on, one is to train on, and one to measure on."""
    groups, random = families(folder), np.random.default_rng(0)
    if len(groups) < 4:
        sys.exit(
            f"{len(groups)} families of fonts are too few, four are needed; install more, or name a folder."
        )
    for name, letters, places, copies in (
        ("strokes/train", SMALL, [0, 2], 2),
        ("strokes/val", SMALL, [1], 1),
        ("letters/train", CAPITALS, [1], 1),
        ("letters/val", CAPITALS, [3], 1),
    ):
        own = [family for number, family in enumerate(groups) if number % 4 in places]
        faces = [face for family in own for face in family]
        for letter in letters:
            (top / name / letter).mkdir(parents=True, exist_ok=True)
            for number in range(copies * len(faces)):
                image = render(letter, faces[number % len(faces)], random)
                image.save(top / name / letter / f"{number:04}.jpg", quality=85)
        count = len(letters) * copies * len(faces)
        print(f"{count:,} images in {len(own)} families of fonts: {top / name}")


main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
