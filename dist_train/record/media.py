"""What W&B shows beyond numbers: histograms, tables and pictures, made of what an evaluation gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def histograms(wandb: Any, weights: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """W&B's histograms by `weights/<name>`, of `low`, `high` and `counts` each."""
    found = {}
    for name, one in weights.items():
        low, high, counts = one["low"], one["high"], one["counts"]
        low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
        edges = np.linspace(low, high, len(counts) + 1)
        found[f"weights/{name}"] = wandb.Histogram(np_histogram=(np.array(counts), edges))
    return found


def tables(
    wandb: Any,
    classes: Sequence[str],
    by_class: Any,
    confusions: Iterable[tuple[int, int, int]],
    samples: Iterable[Any],
) -> dict[str, Any]:
    """W&B's tables of classes and samples, and its chart of confusions.

    Args:
        by_class: as `outcomes.ByClass`: columns `samples`, `predicted`, `right`, `recall`, `precision`, `f1`.
        confusions: a class, what its samples are said to be, and how often.
        samples: of each `number`, `image` uint8 `[H, W, C]`, `label`, `predicted`, `probability`, `loss`.
    """
    names = ("samples", "predicted", "right", "recall", "precision", "f1")
    columns = [[None if n != n else n for n in getattr(by_class, name).tolist()] for name in names]
    found = {
        "tables/classes": wandb.Table(
            columns=["class", *names], data=[list(row) for row in zip(classes, *columns, strict=True)]
        ),
        "tables/confusion": wandb.plot_table(
            vega_spec_name="wandb/confusion_matrix/v1",
            data_table=wandb.Table(
                columns=["Actual", "Predicted", "nPredictions"],
                data=[[classes[own], classes[said], often] for own, said, often in confusions],
            ),
            fields={"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
            string_fields={"title": "Confusion matrix"},
        ),
    }
    rows = [
        [one.number, wandb.Image(one.image), one.label, one.predicted, one.probability, one.loss]
        for one in samples
    ]
    if rows:
        head = ["sample", "image", "class", "predicted", "probability", "loss"]
        found["tables/samples"] = wandb.Table(columns=head, data=rows)
    return found
