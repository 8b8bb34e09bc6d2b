"""dist_train trains image models exactly: one readable loop for one CPU or many GPUs on many nodes.

Importing this package does not import torch; the names below are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "UserError", "fit", "load"]

if TYPE_CHECKING:
    from dist_train.config import Config, UserError, load
    from dist_train.train import fit


def __getattr__(name: str) -> Any:
    if name == "fit":
        from dist_train.importing import importing

        with importing(for_good=False):
            from dist_train.train import fit
        return fit
    if name in __all__:
        from dist_train import config

        return getattr(config, name)
    raise AttributeError(f"module 'dist_train' has no attribute {name!r}")
