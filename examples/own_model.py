"""An own model, own data and an own loss, trained from Python: python examples/own_model.py"""

import torch

import dist_train
from dist_train.tasks import Classification


class Focal(Classification):
    def loss(self, outputs, targets):
        losses = super().loss(outputs, targets)  # [B]: one for each sample
        return losses * (1 - (-losses).exp()) ** 2


images = torch.rand(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
data = torch.utils.data.TensorDataset(images, (images[:, 0, 0].mean(1) > 0.5).long())
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
config = {"data": {"eval_fraction": 0.2, "workers": 0}, "optim": {"lr": 1.0}, "train": {"epochs": 10}}
dist_train.fit(config | {"run": {"name": "own-model"}}, model=model, train_data=data, task=Focal())
