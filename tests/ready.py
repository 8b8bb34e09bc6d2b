"""What the server of warm.py does once for all that are forked from it: the keys with their defaults."""

from dist_train.config import load

load([], ["train.steps=1"])
