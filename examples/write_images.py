"""Some Fashion-MNIST as image files, to try own data with: python examples/write_images.py FOLDER"""

import csv
import sys
from pathlib import Path

from PIL import Image

from dist_train.data.fashion_mnist import fashion_mnist

top = Path(sys.argv[1])
for part, count in (("train", 600), ("val", 200)):
    data, rows = fashion_mnist(train=part == "train"), [("file_name", "label")]
    for index in range(count):
        image, label = data[index]
        name = data.classes[label].replace("/", " or ")
        path = top / part / name / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
        rows.append((path.relative_to(top), name))
    with (top / f"{part}.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    print(f"{count} images: {top / part}, listed in {top / part}.csv")
