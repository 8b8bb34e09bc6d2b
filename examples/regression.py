"""A task of another kind: a number for each image. python examples/regression.py"""

import torch

import dist_train
from dist_train.data.images import InMemory


class Regression:
    best = "min eval/loss"  # what tells the best checkpoint

    def loss(self, outputs, targets):  # [B, 1], [B] -> [B]: one for each sample
        return (outputs[:, 0] - targets).square()

    def metrics(self, outputs, targets):
        return {"error": (outputs[:, 0] - targets).abs()}


if __name__ == "__main__":
    images = torch.rand(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data = InMemory(images, images[:, 0, 0].mean(1), classes=[])  # the target: how bright the first row is
    config = {"data": {"eval_fraction": 0.2}, "optim": {"lr": 0.1}, "train": {"epochs": 10}}
    dist_train.fit(config | {"run": {"name": "regression"}}, train_data=data, task=Regression())
