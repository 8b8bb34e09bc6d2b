"""pytorch-accelerated."""

from jobs import collate, dataset, loader_options, loss, model, optimizer
from pytorch_accelerated import Trainer

network = model()
options = loader_options()
trainer = Trainer(network, loss_func=loss, optimizer=optimizer(network.parameters()))
trainer.train(
    train_dataset=dataset(),
    num_epochs=1,
    per_device_batch_size=options["batch_size"],
    collate_fn=collate,
    train_dataloader_kwargs={"num_workers": options["num_workers"]},
)
