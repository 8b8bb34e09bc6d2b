"""Lightning."""

import lightning as L
from jobs import RANKS, dataset, loader_options, loss, model, optimizer
from torch.utils.data import DataLoader


class Classifier(L.LightningModule):
    """The job."""

    def __init__(self) -> None:
        super().__init__()
        self.network = model()

    def training_step(self, batch, index):
        """The loss of a batch."""
        inputs, targets = batch
        value = loss(self.network(inputs), targets)
        self.log("train_loss", value)
        return value

    def configure_optimizers(self):
        """What updates the weights."""
        return optimizer(self.parameters())


if __name__ == "__main__":
    loader = DataLoader(dataset(), shuffle=True, **loader_options())
    trainer = L.Trainer(
        accelerator="cpu", devices=RANKS, strategy="ddp" if RANKS > 1 else "auto", max_epochs=1
    )
    trainer.fit(Classifier(), loader)
