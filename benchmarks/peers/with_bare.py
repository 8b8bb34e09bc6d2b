"""Plain PyTorch, as its tutorials of DataLoader and DistributedDataParallel have it."""

import torch.distributed as dist
from jobs import RANKS, dataset, loader_options, loss, model, optimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

data, network = dataset(), model()
if RANKS > 1:
    dist.init_process_group("gloo")
    loader = DataLoader(data, sampler=DistributedSampler(data), **loader_options())
    network = DistributedDataParallel(network)
else:
    loader = DataLoader(data, shuffle=True, **loader_options())
update = optimizer(network.parameters())
network.train()
for inputs, targets in loader:
    update.zero_grad()
    loss(network(inputs), targets).backward()
    update.step()
if RANKS > 1:
    dist.destroy_process_group()
