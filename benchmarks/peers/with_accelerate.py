"""Hugging Face's Accelerate."""

from accelerate import Accelerator
from jobs import dataset, loader_options, loss, model, optimizer
from torch.utils.data import DataLoader

accelerator = Accelerator(cpu=True)
network = model()
loader = DataLoader(dataset(), shuffle=True, **loader_options())
network, update, loader = accelerator.prepare(network, optimizer(network.parameters()), loader)
network.train()
for inputs, targets in loader:
    update.zero_grad()
    accelerator.backward(loss(network(inputs), targets))
    update.step()
accelerator.end_training()
