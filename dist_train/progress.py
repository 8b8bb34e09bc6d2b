"""The old place of `counted`: see config/errors.py."""

from dist_train.config import counted

__all__ = ["counted"]
