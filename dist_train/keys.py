"""The old place of `key`: see seeds.py."""

from dist_train.seeds import key

__all__ = ["key"]
