"""The record of a run: its files, what a terminal shows of it, and its mirror in Weights & Biases."""
