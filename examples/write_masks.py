"""Some Fashion-MNIST as images of several garments with masks, to try segmentation with:
python examples/write_masks.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dist_train.data.fashion_mnist import fashion_mnist
from dist_train.data.masks import mask_file

SIZE = 56  # of an image; a garment has 28
top = Path(sys.argv[1])
for part, count in (("train", 600), ("val", 150)):
    data, random = fashion_mnist(train=part == "train"), np.random.default_rng(count)
    for folder in ("images", "masks"):
        (top / part / folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, mask = np.zeros((2, SIZE, SIZE), np.uint8)  # class 0 is the background
        for sample in random.integers(len(data), size=3):
            garment, label = data[int(sample)]
            row, column = random.integers(SIZE - 28, size=2)
            place = np.s_[row : row + 28, column : column + 28]
            there = garment[0].numpy() > 20
            image[place] = np.where(there, garment[0].numpy(), image[place])
            mask[place] = np.where(there, int(label) + 1, mask[place])
        Image.fromarray(image).save(top / part / "images" / f"{index:04}.png")
        mask_file(mask).save(top / part / "masks" / f"{index:04}.png")
    print(f"{count} images with masks: {top / part}")
