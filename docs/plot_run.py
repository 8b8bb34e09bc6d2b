"""A picture of a run: python docs/plot_run.py RUN PICTURE.png"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dist_train.record.history import read_metrics

run, picture = Path(sys.argv[1]), Path(sys.argv[2])
rows = read_metrics(run)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for axis, name, label, style in (
    (left, "train/loss", "training", "C0-"),
    (left, "eval/loss", "evaluation", "C1o-"),
    (right, "eval/accuracy", "evaluation", "C1o-"),
):
    points = [(row["step"], row[name]) for row in rows if name in row]
    axis.plot(*zip(*points, strict=True), style, markersize=4, label=label)
left.set(xlabel="step", ylabel="loss")
right.set(xlabel="step", ylabel="accuracy", xlim=left.get_xlim())
left.legend(frameon=False)
last = points[-1]
right.annotate(f"{last[1]:.2%}", last, xytext=(0, -18), textcoords="offset points", ha="right")
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
figure.savefig(picture, dpi=110)
