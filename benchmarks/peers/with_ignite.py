"""PyTorch-Ignite."""

import ignite.distributed as idist
from ignite.engine import create_supervised_trainer
from jobs import RANKS, dataset, loader_options, loss, model, optimizer


def training(local_rank: int) -> None:
    """Trains one epoch on this rank."""
    options = loader_options()
    options["batch_size"] *= RANKS  # which auto_dataloader divides
    options["num_workers"] *= RANKS
    loader = idist.auto_dataloader(dataset(), shuffle=True, **options)
    network = idist.auto_model(model())
    update = idist.auto_optim(optimizer(network.parameters()))
    create_supervised_trainer(network, update, loss, device=idist.device()).run(loader, max_epochs=1)


if __name__ == "__main__":
    with idist.Parallel(backend="gloo" if RANKS > 1 else None) as parallel:
        parallel.run(training)
