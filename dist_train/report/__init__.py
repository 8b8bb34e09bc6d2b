"""Looking at a run: the model's layers, the training images."""
