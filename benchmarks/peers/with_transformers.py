"""Hugging Face's Trainer."""

from jobs import LR, collate, dataset, loader_options, loss, model
from torch import nn
from transformers import Trainer, TrainingArguments


class Wrapped(nn.Module):
    """The model as the Trainer asks for it: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = model()

    def forward(self, inputs, labels):
        """The loss of a batch."""
        return {"loss": loss(self.network(inputs), labels)}


def batch(samples):
    """A batch by names."""
    inputs, labels = collate(samples)
    return {"inputs": inputs, "labels": labels}


options = loader_options()
arguments = TrainingArguments(
    "transformers-run",
    per_device_train_batch_size=options["batch_size"],
    dataloader_num_workers=options["num_workers"],
    num_train_epochs=1,
    learning_rate=LR,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=0,
    use_cpu=True,
    report_to="none",
    logging_steps=100,
    save_strategy="no",
    remove_unused_columns=False,
)
Trainer(Wrapped(), arguments, train_dataset=dataset(), data_collator=batch).train()
